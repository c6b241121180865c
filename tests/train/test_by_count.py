"""`train --pretrained`: what is chosen, from which weights; and that it resumes."""

import json

import pytest

from flax_densenet import settings as settings_lib
from flax_densenet.cli import command_line, commands
from flax_densenet.errors import UserError
from flax_densenet.sweeps import plan as sweep_plan
from flax_densenet.train import by_count
from helpers import commands as helper
from helpers import runs
from helpers.paths import ROOT

ALL_OPEN = {'train.by_count': True, **by_count.OPEN}


def settings_of(**fields):
    config = runs.tiny_config(**{'model.block_sizes': (1, 1, 1)})
    for name, value in (ALL_OPEN | fields).items():
        section, _, field = name.partition('.')
        config[section][field] = value
    return settings_lib.from_config(config)


def chosen(count, blocks=4, **fields):
    found = by_count.choose(settings_of(**fields), count, blocks=blocks)
    assert not by_count.find_open(found)
    values = settings_lib.flatten(found)
    return {name: values[name] for name in by_count.OPEN}


def test_fewer_images_change_less():
    tiers = [chosen(count) for count in (20, 300, 301, 2001, 10**6)]
    assert tiers[0] == tiers[1] != tiers[2]
    for name, ascending in (
        ('optimizer.layer_decay', True),
        ('train.epochs', False),
        ('train.head_warmup_epochs', False),
        ('train.patience', False),
    ):
        values = [tier[name] for tier in tiers]
        assert values == sorted(values, reverse=not ascending)
    frozen = [tier['train.freeze'] for tier in tiers]
    assert frozen == ['denseblock3'] * 2 + ['denseblock1', 'none', 'none']
    assert chosen(20, blocks=7)['train.freeze'] == 'denseblock6'
    assert chosen(20, blocks=1)['train.freeze'] == 'denseblock1'


def test_what_is_set_stays(capfd):
    found = chosen(20, **{'train.epochs': 2, 'data.batch_size': 5})
    assert (found['train.epochs'], found['data.batch_size']) == (2, 5)
    assert found['train.head_warmup_epochs'] == 1  # below the number of epochs
    line = capfd.readouterr().out.splitlines()[0]
    assert line.startswith('for 20 training images: data.policy=none, ')
    assert 'epochs=2' not in line and '--config.NAME=VALUE' in line
    found = chosen(20, **{'train.freeze': 'backbone'})
    assert found['train.head_warmup_epochs'] == 0


def test_nothing_is_open_without_the_field():
    settings = settings_of(**{'train.by_count': False})
    assert by_count.choose(settings, 20, blocks=4) is settings


def test_page_has_the_table():
    page = (ROOT / 'docs' / 'pretrained.md').read_text(encoding='utf-8')
    assert by_count.format_markdown() in page


@pytest.mark.parametrize(
    ('words', 'recipe', 'start'),
    [
        ('photos --pretrained', 'finetune:densenet121,auto', 'densenet121'),
        (
            'photos --pretrained --config.model.variant=densenet169',
            'finetune:densenet169,auto',
            'densenet169',
        ),
        (
            'photos --config.init_from=a.pth --pretrained',
            'finetune:a.pth,auto',
            'a.pth',
        ),
        ('--config=cifar:quick --pretrained', 'cifar:quick', 'densenet121'),
        ('photos --nopretrained', 'densenet121', ''),
        ('photos --pretrained=false', 'densenet121', ''),
        ('photos', 'densenet121', ''),
        ('--config=finetune:keras:densenet121', None, 'keras:densenet121'),
        ('--config=finetune:densenet121.pth', None, 'densenet121.pth'),
    ],
)
def test_command_line(words, recipe, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photos').mkdir()
    found = command_line.parse(
        ['launch.py', 'train', *words.split()], commands.COMMANDS
    )
    assert recipe is None or found.recipe.text == recipe
    assert found.fields['init_from'] == start
    auto = bool(start) and not start.endswith('121.pth') and 'cifar' not in words
    assert found.fields['train']['by_count'] == auto
    assert (found.fields['train']['epochs'] == 0) == auto
    if 'photos' in words:
        assert found.fields['data']['source'] == 'folder:photos'


@pytest.mark.parametrize('command', ['crossval', 'lr_find', 'sweep'])
def test_other_commands_that_train(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photos').mkdir()
    words = ['launch.py', command, 'photos', '--pretrained']
    found = command_line.parse(words, commands.COMMANDS)
    assert found.recipe.text == 'finetune:densenet121,auto'


def test_pruning_needs_a_number_of_epochs():
    with pytest.raises(UserError, match='say how many .*--config.train.epochs'):
        sweep_plan.Plan(settings_of(), ['train.seed=0,1'], None, None, 'median')


@pytest.mark.slow
def test_trains_and_resumes(tmp_path, monkeypatch, capfd):
    """Run again after an image was added across a limit, the choice is the same."""
    photos = runs.write_images(tmp_path / 'photos', {'a': 12, 'b': 12}, size=(12, 12))
    weights = runs.make_weights(tmp_path / 'start.safetensors')
    main = helper.make_main(monkeypatch, capfd)
    monkeypatch.setattr(by_count, '_TIERS', [(24, by_count._TIERS[0][1]),
                                             (99, by_count._TIERS[3][1])])  # fmt: skip
    command = [
        *('train', photos, '--pretrained', f'--config.init_from={weights}'),
        *(f'--workdir={tmp_path / "run"}', '--config.train.report=False'),
        *('--config.data.image_size=8', '--config.train.tensorboard=False'),
        '--config.train.head_warmup_epochs=0',
    ]
    status, out, err = main(*command, '--config.train.epochs=1')
    assert (status, err) == (0, '')
    assert 'for 19 training images: data.batch_size=16, data.policy=none' in out
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert config['train']['freeze'] == 'denseblock2'
    assert config['optimizer']['layer_decay'] == 0.7
    monkeypatch.setattr(by_count, '_TIERS', [(19, by_count._TIERS[0][1]),
                                             (99, by_count._TIERS[1][1])])  # fmt: skip
    status, out, err = main(*command, '--config.train.epochs=2')
    assert (status, err) == (0, '') and 'epoch 2' in out
    assert 'for 19 training images: data.batch_size=16' in out
