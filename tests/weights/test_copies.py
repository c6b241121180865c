"""Several networks in one file of torch, and the lists of names next to them."""

import logging

import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.weights import torch_content, weight_file
from helpers.weight_files import assert_same, state_dict, tiny, write_safetensors

ARRAYS = state_dict()
ZEROS = {name: np.zeros_like(array) for name, array in ARRAYS.items()}


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, 'flax_densenet')
    return lambda: [record.getMessage() for record in caplog.records]


def find(content):
    """The arrays that are chosen; `find` empties the dicts, so these are copies."""
    copied = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    return torch_content.find('x.pth', copied).arrays


def holds(arrays, wanted):
    return all(np.array_equal(arrays[name], wanted[name]) for name in ARRAYS)


@pytest.mark.parametrize(
    ('plain', 'average'),
    [
        ('params', 'params_ema'),
        ('model', 'ema_model'),
        ('state_dict', 'swa_state_dict'),
        ('model', 'model_ema'),
        ('current_model_state', 'state_dict'),
    ],
)
def test_the_moving_average_under_any_key(plain, average, lines):
    optimizer = {'state': {n: {'step': n} for n in range(3)}}
    content = {plain: ZEROS, average: ARRAYS, 'optimizer': optimizer}
    assert holds(find(content), ARRAYS)
    (line,) = lines()
    assert f'the moving average {average} is used' in line and plain in line


def test_an_average_deep_in_the_file(lines):
    content = {'state_dict': ZEROS, 'callbacks': {'EMA': {'weights': dict(ARRAYS)}}}
    assert holds(find(content), ARRAYS)
    assert 'as state_dict and callbacks.EMA.weights' in lines()[0]


@pytest.mark.parametrize(
    'keys', [('model', 'teacher'), ('model', 'net'), ('state_dict', 'best_state_dict')]
)
def test_copies_that_differ_are_refused(keys):
    one, other = keys
    with pytest.raises(UserError, match=f'2 networks, as .*{one} and .*{other}'):
        find({one: ARRAYS, other: ZEROS})


def test_equal_copies(lines):
    assert holds(find({'model': ARRAYS, 'net': ARRAYS}), ARRAYS)
    assert lines() == ['x.pth holds the same network as model and net; one is used']


def test_other_networks_are_no_copies(lines):
    """The usual key is enough where the other network has other layers."""
    other = {k: v[:, :1] if v.ndim == 4 else v for k, v in ARRAYS.items()}
    assert holds(find({'state_dict': ARRAYS, 'discriminator': other}), ARRAYS)
    assert not lines()


def test_an_average_without_names(lines):
    """As torch_ema saves it."""
    ema = {'decay': 0.99, 'shadow_params': [np.ones(3, np.float32)], 'collected': None}
    assert holds(find({'model': ARRAYS, 'ema': ema}), ARRAYS)
    (line,) = lines()
    assert 'the moving average ema have no names, so model is used' in line


@pytest.mark.parametrize(
    'names',
    [
        {'class_to_idx': {name: n + 1 for n, name in enumerate('abcde')}},
        {'class_names': ['a', 'b', 'c', 'd', 'a']},
        {'classes': ['a', 1, 'c', 'd', 'e']},
    ],
)
def test_names_that_cannot_be_used(names):
    content = torch_content.find('x.pth', {'state_dict': dict(ARRAYS), **names})
    assert content.class_names == ()
    assert f'its {next(iter(names))} cannot be used' in content.note


def test_names_as_an_array():
    content = {'state_dict': dict(ARRAYS), 'classes': np.array(list('abcde'))}
    assert torch_content.find('x.pth', content).class_names == (tuple('abcde'),)


def test_names_of_another_number_of_classes(tmp_path):
    path = write_safetensors(tmp_path / 'x', ARRAYS, {'class_names': '["a", "b", "c"]'})
    found = weight_file.load(path)
    assert found.class_names is None
    assert 'it names 3 classes (a, b, c), but has 5 outputs' in found.notes[0]


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('features.conv0.weight', np.nan, r'features.conv0.weight has 1 of \d+ values'),
        ('features.norm0.running_var', np.inf, 'features.norm0.running_var has 1 of'),
        ('features.norm0.running_var', -1, 'running_var has a negative variance, -1'),
        ('features.norm5.weight', -np.inf, 'norm5.weight has 1 of'),
        ('classifier.bias', np.nan, 'classifier.bias has 1 of 5 values that are not'),
    ],
)
def test_numbers_that_no_network_has(name, value, message, tmp_path):
    """ReLU hides most of them: outputs would be finite, and wrong."""
    array = ARRAYS[name].copy()
    array.flat[0] = value
    path = write_safetensors(tmp_path / 'x', ARRAYS | {name: array})
    with pytest.raises(UserError, match=message):
        weight_file.load(path)


def test_numbers_beyond_float16(tmp_path):
    half = {name: array.astype(np.float16) for name, array in ARRAYS.items()}
    path = write_safetensors(tmp_path / 'half', half)
    assert weight_file.load(path).num_classes == 5
    half['features.norm0.running_var'] = np.full(8, np.inf, np.float16)  # 70,000
    with pytest.raises(UserError, match='8 of 8 values.*above 65504'):
        weight_file.load(write_safetensors(tmp_path / 'x', half))


@pytest.mark.parametrize('outer', ['', 'model.'])
def test_layers_in_front_of_the_network(outer, tmp_path):
    arrays = {f'{outer}1.{name}': array for name, array in ARRAYS.items()}
    front = {f'{outer}0.weight': np.ones((3, 1, 1, 1), np.float32)}
    path = write_safetensors(tmp_path / 'x', arrays | front)
    with pytest.raises(UserError, match=rf'{outer}0.weight belong to a layer in front'):
        weight_file.load(path)


def test_normalization_in_front_of_the_network(tmp_path, lines):
    """As the robustness library names it."""
    arrays = {f'model.{name}': array for name, array in ARRAYS.items()}
    for name, value in (('new_mean', 0.4), ('new_std', 0.3)):
        arrays[f'normalizer.{name}'] = np.full((3, 1, 1), value, np.float32)
    found = weight_file.load(write_safetensors(tmp_path / 'x', arrays))
    assert found.preprocessing['mean'] == (0.4,) * 3
    assert found.preprocessing['std'] == (0.3,) * 3
    assert_same(found.variables, tiny()[1])
