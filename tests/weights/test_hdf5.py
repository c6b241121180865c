"""HDF5 files that are broken, or that reach for other files."""

import zipfile

import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.weights import keras_files
from helpers.keras_networks import (
    ENDINGS,
    make_keras,
    save,
)

pytestmark = pytest.mark.usefixtures('keras_promotes_ranks')


def _external_link(h5py, file, elsewhere):
    file['conv/kernel:0'] = h5py.ExternalLink(str(elsewhere), 'secret')


def _soft_link(h5py, file, elsewhere):
    file['conv/kernel:0'] = h5py.SoftLink('/other')


def _external_storage(h5py, file, elsewhere):
    storage = [(str(elsewhere), 0, 400)]
    file.create_dataset('conv/kernel:0', (100,), 'f4', external=storage)


def _virtual(h5py, file, elsewhere):
    layout = h5py.VirtualLayout((100,), 'f4')
    layout[:] = h5py.VirtualSource(str(elsewhere), 'secret', (100,))
    file.create_virtual_dataset('conv/kernel:0', layout)


def _huge(h5py, file, elsewhere):
    file.create_dataset('conv/kernel:0', (2**20, 2**20), 'f4', chunks=(64, 64))


def _endless(h5py, file, elsewhere):
    file['a/b/c'] = file.create_group('a')


def _text(h5py, file, elsewhere):
    file['conv/kernel:0'] = ['kernel']


@pytest.mark.parametrize(
    ('attack', 'reason'),
    [
        (_external_link, 'conv/kernel:0 is a link'),
        (_soft_link, 'conv/kernel:0 is a link'),
        (_external_storage, 'conv/kernel:0 keeps its values in another file'),
        (_virtual, 'conv/kernel:0 keeps its values in another file'),
        (_huge, 'is too large for it'),
        (_endless, 'its groups never end'),
        (_text, 'holds no numbers'),
    ],
)
def test_nothing_outside_the_file_is_read(h5py, tmp_path, attack, reason):
    with h5py.File(tmp_path / 'elsewhere.h5', 'w') as file:
        file['secret'] = np.ones(100, np.float32)
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        attack(h5py, file, tmp_path / 'elsewhere.h5')
    with pytest.raises(UserError, match='a.h5 is not a valid Keras file') as error:
        keras_files.read(str(tmp_path / 'a.h5'))
    assert reason in str(error.value)
    assert '\n' not in str(error.value)


def test_broken_files(keras, tmp_path):
    network = make_keras(keras, (1, 1, 1, 1))
    for ending in ENDINGS:
        save(network, tmp_path / f'whole{ending}')
        content = (tmp_path / f'whole{ending}').read_bytes()
        path = tmp_path / f'cut{ending}'
        for length in (40, len(content) // 2, len(content) - 30):
            path.write_bytes(content[:length])
            with pytest.raises(UserError, match='is not a valid Keras file') as error:
                keras_files.read(str(path))
            assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='none.h5 is not a file'):
        keras_files.read(str(tmp_path / 'none.h5'))


def test_archive_of_zeros(h5py, tmp_path):
    path = str(tmp_path / 'a.keras')
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('config.json', '{}')
        file.writestr('model.weights.h5', bytes(2**24))
    with pytest.raises(UserError, match='16777216 bytes is too large'):
        keras_files.read(path)
