"""Settings: in step with configs/base.py, checked by name and type, saved as before."""

import dataclasses
import json
import typing

import pytest
from ml_collections import config_dict

from configs import base
from flax_densenet import UserError, settings
from flax_densenet.data import dataset
from flax_densenet.models import densenet, factory, rdnet
from flax_densenet.settings import sizes
from helpers.paths import ROOT


def base_fields():
    """Name -> type and default of each field of configs/base.py."""
    config, found = base.get_config(), {}
    for section, fields in config.items():
        if not isinstance(fields, config_dict.ConfigDict):
            found[section] = config.get_type(section), fields
            continue
        for name, value in fields.items():
            found[f'{section}.{name}'] = fields.get_type(name), value
    return found


def test_base_and_the_dataclasses_have_the_same_fields():
    """Names, types and defaults; whether None is allowed, too."""
    defaults, kinds = settings.flatten(settings.Settings()), {'init_from': str}
    for section, groups in settings.SECTIONS.items():
        for group in groups:
            kind = typing.get_type_hints(settings.Settings)[group]
            for name, hint in typing.get_type_hints(kind).items():
                kinds[f'{section}.{name}'] = hint
    base_of = base_fields()
    assert set(base_of) == set(defaults) == set(kinds)
    for name, (kind, default) in base_of.items():
        assert default == defaults[name] and type(default) is type(defaults[name]), name
        plain = [k for k in typing.get_args(kinds[name]) if k is not type(None)]
        is_open = type(None) in typing.get_args(kinds[name])
        plain = plain[0] if is_open else kinds[name]
        plain = object if plain == sizes.Size else typing.get_origin(plain) or plain
        assert plain is kind, name
        assert is_open == (default is None), name


@pytest.mark.parametrize(
    ('value', 'size'),
    [
        (32, 32), ('32', 32), ('(32)', 32), ([32, 32], 32), ('32x32', 32),
        ((32, 16), (32, 16)), ([32, 16], (32, 16)), ('32,16', (32, 16)),
        ('(32, 16)', (32, 16)), ('[32,16]', (32, 16)), ('32X16', (32, 16)),
    ],
)  # fmt: skip
def test_a_size_is_a_side_or_height_and_width(value, size):
    made = settings.from_config({'data': {'image_size': value}})
    assert made.preparation.image_size == size
    assert type(made.preparation.image_size) is type(size)
    assert sizes.parse(sizes.plain(size)) == size
    saved = json.loads(json.dumps(settings.to_config(made)))
    assert settings.from_saved(saved) == made


@pytest.mark.parametrize(
    'value',
    [True, 8.5, '8.5', 'x', '', None, (8,), (8, 8, 3), (8, '4'), (True, 8), '-8', {}],
)
def test_what_is_no_size_is_refused(value):
    with pytest.raises(UserError, match=r"data\.image_size=.* as '\(100,50\)'"):
        settings.from_config({'data': {'image_size': value}})


class Recorder:
    """The fields of a dataclass, and which of them were read."""

    def __init__(self, fields):
        self._fields, self.read = fields, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self._fields, name)


def test_functions_take_the_fields():
    """A field of one that the other forgot would be out of reach."""
    networks = {
        name
        for network in (densenet.DenseNet, rdnet.RDNet)
        for name in factory.field_defaults(network).keys() - set(network.head_fields)
    }
    fields = {'variant'} | networks - {'num_classes'}
    assert set(vars(settings.ModelSettings())) == fields
    data = Recorder(settings.SourceSettings(cache='memory'))
    preparation = Recorder(
        settings.PreparationSettings(8, 'stretch', 1.0, 'bilinear', channels=3)
    )
    dataset.from_settings(data, preparation)
    assert data.read == set(vars(settings.SourceSettings()))
    assert preparation.read == set(vars(settings.PreparationSettings())) - {
        'mean',
        'std',
    }


def test_a_config_comes_back_as_it_was():
    config = base.get_config()
    config.data.size_schedule = ((0.5, 16), (0.8, 24))
    made = settings.from_config(config)
    assert made.augmentation.size_schedule == ((0.5, 16), (0.8, 24))
    assert settings.to_config(made) == config.to_dict()
    # JSON has lists for tuples.
    saved = json.loads(json.dumps(settings.to_config(made)))
    assert settings.from_config(saved) == settings.from_saved(saved) == made
    assert settings.from_config(made) is made
    assert hash(made) == hash(settings.from_config(config))


def test_the_same_keys_are_saved_as_before():
    """But for one that got another name; in the same order."""
    before = json.loads((ROOT / 'tests/data/v0/run/config.json').read_text())
    now = json.loads(json.dumps(settings.to_config(settings.from_saved(before))))
    before['data']['color_jitter'] = before['data'].pop('colour_jitter')
    assert [name for name in now if name in before] == list(before)
    assert now['init_from'] == before['init_from']
    for section in settings.SECTIONS.keys() & before.keys():
        # What came later has its default.
        for name, value in before[section].items():
            assert now[section][name] == value, name
        assert list(now[section]) == sorted(now[section])


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (
            {'data': {'batchsize': 4}},
            'data.batchsize is not a field; did you mean data.batch_size',
        ),
        (
            {'trian': {'epochs': 4}},
            'trian.epochs is not a field; did you mean train.epochs',
        ),
        (
            {'epochs': 4},
            r'epochs is not a field; .*he fields are init_from, model\.\*, data',
        ),
        ({'model': 'densenet121'}, "model='densenet121' must be a section"),
        ({'data': {'batch_size': '4'}}, "data.batch_size='4' must be a whole number"),
        ({'data': {'batch_size': 4.0}}, 'data.batch_size=4.0 must be a whole number'),
        ({'data': {'batch_size': True}}, 'batch_size=True must be a whole number'),
        ({'data': {'batch_size': None}}, 'batch_size=None must be a whole number'),
        ({'model': {'fast': 1}}, 'model.fast=1 must be True or False'),
        ({'optimizer': {'drop_at': 0.5}}, 'drop_at=0.5 must be values in brackets'),
        ({'optimizer': {'name': 3}}, 'optimizer.name=3 must be text'),
        ({'init_from': None}, 'init_from=None must be text'),
    ],
)
def test_what_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        settings.from_config(config)


def test_values_have_their_fields_types():
    made = settings.from_config(
        {'optimizer': {'learning_rate': 1}, 'data': {'mean': [0, 0.5]}}
    )
    assert type(made.schedule.learning_rate) is float
    assert made.preparation.mean == (0, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.train.epochs = 3


def test_a_former_name_is_read_with_a_notice(capsys):
    notice = (
        'warning: data.colour_jitter is now called data.color_jitter; the old name '
        'still works\n'
    )
    old = {'data': {'colour_jitter': [0.4], 'color_jitter': ()}}
    made = settings.from_config(old)
    assert made.augmentation.color_jitter == (0.4,)
    assert capsys.readouterr().out == notice
    for config in (
        {'data': {'colour_jitter': (0.4,), 'color_jitter': (0.2,)}},
        {'data': {'color_jitter': (0.2,), 'colour_jitter': (0.4,)}},
    ):
        assert settings.from_config(config).augmentation.color_jitter == (0.2,)
    # A recipe of one's own, which begins with base.
    config = base.get_config()
    config.data.colour_jitter = (0.4,)
    assert settings.from_config(config).augmentation.color_jitter == (0.4,)
    capsys.readouterr()
    assert settings.from_saved(old).augmentation.color_jitter == (0.4,)
    assert capsys.readouterr().out == ''


def test_what_was_saved_may_have_other_fields():
    """Of an earlier version, or a later one."""
    saved = {'epoch': 3, 'data': {'source': 'folder:x', 'taste': 'sweet'}}
    made = settings.from_saved(saved)
    assert made.data == settings.SourceSettings(source='folder:x', groups='none')
    assert dataclasses.replace(made, data=settings.SourceSettings()) == (
        settings.Settings()
    )
