"""Safetensors files of several parts, and in 16 bits."""

import json

import ml_dtypes
import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.weights import weight_file
from helpers.weight_files import assert_same, flat, state_dict, tiny, write_safetensors

ARRAYS = state_dict()
NAMES = [f'model-0000{n}-of-00003.safetensors' for n in (1, 2, 3)]


@pytest.fixture
def index(tmp_path):
    """Three files with an index."""
    places = {name: NAMES[n % 3] for n, name in enumerate(ARRAYS)}
    for file in NAMES:
        arrays = {name: ARRAYS[name] for name, place in places.items() if place == file}
        write_safetensors(tmp_path / file, arrays)
    path = tmp_path / 'model.safetensors.index.json'
    path.write_text(json.dumps({'metadata': {}, 'weight_map': places}))
    return path


def test_the_index_or_any_part_gives_all(index, tmp_path):
    for name in (index.name, NAMES[1]):
        found = weight_file.load(str(tmp_path / name))
        assert_same(found.variables, tiny()[1])


def test_a_folder_with_an_index(index, tmp_path):
    config = {'architecture': 'densenet121', 'num_classes': 5}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=r'growth_rate=32, .* weights next to it'):
        weight_file.load(str(tmp_path))


def test_parts_that_do_not_fit(index, tmp_path):
    content = json.loads(index.read_text())

    def load(**changed):
        places = content['weight_map'] | changed
        index.write_text(json.dumps({'weight_map': places}))
        return weight_file.load(str(index))

    with pytest.raises(UserError, match=r'disagree about nothing.weight'):
        load(**{'nothing.weight': NAMES[0]})
    for place in ('../secret', '/etc/passwd', '', 'a\0', 7, '..\\x'):
        with pytest.raises(UserError, match='no name of a file'):
            load(**{'features.conv0.weight': place})
    index.write_text('{}')
    with pytest.raises(UserError, match='has no weight_map'):
        weight_file.load(str(index))
    index.unlink()
    with pytest.raises(UserError, match=r'is one of 3 files, .* no model.saf'):
        weight_file.load(str(tmp_path / NAMES[0]))
    index.write_text(json.dumps(content))
    (tmp_path / NAMES[2]).unlink()
    with pytest.raises(UserError, match=f'names {NAMES[2]}, which is not there'):
        weight_file.load(str(index))


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions(dtype, tmp_path):
    arrays = {
        name: array.astype(dtype) if array.dtype == np.float32 else array
        for name, array in ARRAYS.items()
    }
    found = weight_file.load(write_safetensors(tmp_path / 'x', arrays))
    expected = {k: v.astype(dtype).astype('f4') for k, v in flat(tiny()[1]).items()}
    for name, array in flat(found.variables).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name])
