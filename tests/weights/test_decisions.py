"""Decisions: files of a run's folder that may come from a stranger."""

import dataclasses
import json

import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.weights import (
    calibration,
    decision_entry,
    decisions,
    thresholds,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Means(decision_entry.Entry):
    """An entry with an array, as those of other kinds."""

    means: np.ndarray
    limit: float

    def check(self, classes):
        if self.means.shape[0] != classes:
            raise ValueError('means is of other classes')


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setitem(decisions.ENTRIES, 'means', Means.from_files)

    @dataclasses.dataclass(frozen=True, eq=False)
    class Decisions(decisions.Decisions):
        means: Means | None = None

    monkeypatch.setattr(decisions, 'Decisions', Decisions)
    return Decisions(
        step=7,
        model='ab',
        classes=2,
        data='digits',
        part='val',
        count=30,
        calibration=calibration.Calibration(('temperature',), (0.5,), (0.0,), ('a',)),
        thresholds=thresholds.Thresholds('youden', (None, 0.25)),
        means=Means(np.float32([[1, 2], [3, 4]]), 0.5),
    )


def test_files_give_back_what_was_saved(made, tmp_path):
    assert decisions.load(str(tmp_path), 2) is None
    decisions.save(str(tmp_path), made)
    found = decisions.load(str(tmp_path), 2)
    assert (found.step, found.part, found.count) == (7, 'val', 30)
    assert vars(found.calibration) == vars(made.calibration)
    assert vars(found.thresholds) == vars(made.thresholds)
    np.testing.assert_array_equal(found.means.means, made.means.means)
    assert found.means.limit == 0.5
    decisions.save(str(tmp_path), dataclasses.replace(made, means=None))
    assert not (tmp_path / decisions.ARRAYS_FILE).exists()
    assert decisions.load(str(tmp_path), 2).means is None


def test_arrays_of_another_file(made, tmp_path):
    """A program that was killed between the two leaves such files."""
    decisions.save(str(tmp_path), made)
    old = (tmp_path / decisions.FILE).read_bytes()
    other = Means(np.float32([[1, 2], [3, 5]]), 0.5)
    decisions.save(str(tmp_path), dataclasses.replace(made, means=other))
    (tmp_path / decisions.FILE).write_bytes(old)
    with pytest.raises(UserError, match=r'decisions\.safetensors belongs to another'):
        decisions.load(str(tmp_path), 2)
    (tmp_path / decisions.ARRAYS_FILE).unlink()
    with pytest.raises(UserError, match='is missing'):
        decisions.load(str(tmp_path), 2)


@pytest.mark.parametrize(
    ('place', 'value', 'line'),
    [
        ('version', 2, 'version: 2'),
        ('step', -1, 'step: -1'),
        ('model', 3, 'model: 3'),
        ('classes', 3, 'classes: 3, and the model has 2'),
        ('part', 'train', "part: 'train'"),
        ('calibration', [], 'calibration: it must be an object'),
        ('calibration.scale', [0.0], 'scale is out of range'),
        ('calibration.scale', [1.0, 1.0], 'differ in length'),
        ('calibration.scale', ['1'], "scale is '1'"),
        ('calibration.bias', [float('nan')], 'bias is nan'),
        ('calibration.methods', ['magic'], 'not a method'),
        ('calibration.notes', [1], 'notes is 1'),
        ('thresholds.values', [0.5], 'there are 1 values'),
        ('thresholds.values', [0.5, 1.5], 'not from 0 to 1'),
        ('thresholds.rule', None, 'rule is None'),
        ('thresholds.rule', 'sensitivity=x', "rule is 'sensitivity=x'"),
        ('thresholds.rule', 'cost=1', "rule is 'cost=1'"),
        ('means.limit', True, 'limit is True'),
    ],
)
def test_values_that_do_not_fit(made, tmp_path, place, value, line):
    decisions.save(str(tmp_path), made)
    path = tmp_path / decisions.FILE
    content = json.loads(path.read_text())
    del content['checksum']  # as a stranger's file may have a fitting one
    section, _, name = place.partition('.')
    if name:
        content[section][name] = value
    else:
        content[section] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match='delete it, or run calibrate') as raised:
        decisions.load(str(tmp_path), 2)
    assert line in str(raised.value)


def test_a_changed_number_is_not_used(made, tmp_path):
    """0.25 and 0.85 are both thresholds, so only the checksum tells."""
    decisions.save(str(tmp_path), made)
    path = tmp_path / decisions.FILE
    text = path.read_text()
    path.write_text(text.replace('0.25', '0.85'))
    with pytest.raises(UserError, match=r'damaged or was changed by hand.*calibrate'):
        decisions.load(str(tmp_path), 2)
    path.write_text(' '.join(text.split()))  # only written in another way
    assert decisions.load(str(tmp_path), 2).thresholds.values == (None, 0.25)


@pytest.mark.parametrize('name', ['version', 'step', 'data'])
def test_fields_that_are_missing(made, tmp_path, name):
    decisions.save(str(tmp_path), made)
    path = tmp_path / decisions.FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: content[k] for k in content.keys() - {name}}))
    with pytest.raises(UserError, match='damaged or was changed'):
        decisions.load(str(tmp_path), 2)
    del content['checksum']
    path.write_text(json.dumps({k: content[k] for k in content.keys() - {name}}))
    with pytest.raises(UserError, match=f'{name}: it is missing'):
        decisions.load(str(tmp_path), 2)


@pytest.mark.parametrize('text', ['', '[]', '{', '[' * 100_000, 'null', '\udcff'])
def test_files_that_are_no_decisions(tmp_path, text):
    path = tmp_path / decisions.FILE
    path.write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(UserError, match='run calibrate'):
        decisions.load(str(tmp_path), 2)


def test_calibration_is_folded_into_the_last_layer():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(4, 3)), rng.normal(size=3)
    hidden = {'kernel': rng.normal(size=(4, 4)), 'bias': rng.normal(size=4)}
    last = {'kernel': np.float32(kernel), 'bias': np.float32(bias)}
    platt = calibration.Calibration(
        ('platt', 'none', 'temperature'), (2.0, 1.0, 0.5), (-1.0, 0.0, 0.0)
    )
    features = rng.normal(size=(5, 4))
    for classifier in (last, {'layer1': hidden, 'layer2': last}):
        variables = {'params': {'classifier': classifier}}
        folded = platt.fold(variables)['params']['classifier']
        folded = folded.get('layer2', folded)
        made = features @ folded['kernel'] + folded['bias']
        expected = platt.apply(features @ last['kernel'] + last['bias'])
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)
        back = platt.unfold(platt.fold(variables))['params']['classifier']
        back = back.get('layer2', back)
        np.testing.assert_allclose(back['kernel'], last['kernel'], rtol=1e-6)
        np.testing.assert_allclose(back['bias'], last['bias'], rtol=1e-5, atol=1e-6)
        assert variables['params']['classifier'] is classifier
