"""Reads HDF5 files that may be hostile.

Such a file can refer to other files (external links, external storage, virtual
datasets), contain endless loops of groups, and declare arrays far larger than itself.
Weights need none of this, so all of it is refused before a value is read.
"""

from typing import Any

import numpy as np

from flax_densenet import errors

SIGNATURE = b'\x89HDF\r\n\x1a\n'
# In bytes. DenseNet-264 with its optimizer state takes 0.4 GB.
LARGEST = 2**33
# Weights hardly compress. An array of nothing but fill values stores 0 bytes.
EXPANSION = 100
_SMALL = 2**20
_DEEPEST, _MOST = 24, 100_000


def open_file(file: Any):
    """Opens a path or a binary file object as an `h5py.File` for reading.

    Raises:
      UserError: h5py is not installed.
    """
    with errors.extra('keras', 'a Keras file'):
        import h5py
    return h5py.File(file, 'r')


def walk(root) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lists all datasets and groups below a group by their paths; reads no values.

    Raises:
      ValueError: there is a link, or there are more groups than in any weight file.
    """
    import h5py

    datasets, groups, waiting = {}, {'': root}, ['']
    while waiting:
        place = waiting.pop()
        for name in groups[place]:
            path = f'{place}/{name}' if place else name
            link = groups[place].get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f'{path} is a link; only a plain file is read')
            child = groups[place][name]
            if isinstance(child, h5py.Dataset):
                datasets[path] = child
            elif isinstance(child, h5py.Group):
                groups[path] = child
                waiting.append(path)
            else:
                raise ValueError(f'{path} is neither a group nor an array')
            if path.count('/') > _DEEPEST or len(datasets) + len(groups) > _MOST:
                raise ValueError(f'its groups never end, {path[:60]}...')
    return datasets, groups


def load(datasets: dict[str, Any]) -> dict[str, np.ndarray]:
    """Reads arrays; floating-point numbers of any width become float32.

    Raises:
      ValueError: values are in another file, are not numbers, or are far too many for
        the file. No values are read then.
    """
    total = 0
    for path, dataset in datasets.items():
        if dataset.is_virtual or dataset.external:
            raise ValueError(f'{path} keeps its values in another file')
        if dataset.shape is None or not (_is_bfloat16(dataset) or _is_number(dataset)):
            raise ValueError(f'{path} holds no numbers')
        size = dataset.size * dataset.dtype.itemsize
        total += size
        stored = dataset.id.get_storage_size()
        if total > LARGEST or size > max(_SMALL, EXPANSION * stored):
            raise ValueError(f'{path} of shape {dataset.shape} is too large for it')
    return {path: _array(dataset) for path, dataset in datasets.items()}


def _is_number(dataset):
    return dataset.dtype.kind in 'fiub'


def _is_bfloat16(dataset):
    # HDF5 has no such type; h5py writes and reads two opaque bytes.
    return dataset.dtype == np.dtype('V2')


def _array(dataset):
    values = dataset[()]
    if _is_bfloat16(dataset):
        # The upper half of a float32.
        bits = np.frombuffer(values.tobytes(), np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(dataset.shape)
    return np.asarray(values, np.float32 if dataset.dtype.kind == 'f' else None)
