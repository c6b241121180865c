"""Writes the features of any number of images to a file, row by row.

Both formats store the number of rows at the start of the file. Rows and names are
therefore written to temporary files next to the output, and copied at the end.
"""

import errno
import json
import os
import shutil
import tempfile
import zipfile

import numpy as np

from flax_densenet.errors import UserError

ENDINGS = ('.npz', '.safetensors')


class Writer:
    """Writes features float32 `[N, F]` and the N paths of their images.

    `np.load(path)` returns them as `features` and `paths`. A safetensors file has
    `features`, and `paths` as bytes, with a zero byte after each path; `read` returns
    them as strings.
    """

    def __init__(self, path: str):
        """Opens the temporary files.

        Raises:
          UserError: the name does not end in one of `ENDINGS`.
          OSError: the file cannot be written.
        """
        check_name(path)
        if os.path.exists(path) and not os.path.isfile(path):
            raise IsADirectoryError(errno.EISDIR, 'it is a folder')
        self.path = os.path.realpath(path)
        folder = os.path.dirname(self.path)
        self.count, self.longest = 0, 1
        self._rows = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  see `close`
        self._names = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def write(self, path: str, features: np.ndarray):
        """Adds one row `[F]`."""
        self._rows.write(np.asarray(features, '<f4').tobytes())
        self._names.write(os.fsencode(path) + b'\0')
        self.longest = max(self.longest, len(path))
        self.count += 1

    def finish(self, size: int):
        """Writes the file, which gets its final name when it is complete.

        Args:
          size: the number of features F, needed for a file without rows.
        """
        self._rows.seek(0)
        self._names.seek(0)
        part = f'{self.path}.part'
        write = _write_npz if self.path.endswith('.npz') else _write_safetensors
        try:
            write(part, (self.count, size), self.longest, self._rows, self._names)
            os.replace(part, self.path)
        finally:
            if os.path.exists(part):
                os.unlink(part)
        self.close()

    def close(self):
        """Discards the temporary files; harmless after `finish`."""
        self._rows.close()
        self._names.close()


def check_name(path: str):
    """Raises `UserError` if the name does not end in one of `ENDINGS`."""
    if not path.endswith(ENDINGS):
        raise UserError(
            f'--features={path}: the name of the file ends with {" or ".join(ENDINGS)}'
        )


def read(path: str) -> tuple[np.ndarray, list[str]]:
    """Reads features float32 `[N, F]` and their paths from either kind of file."""
    check_name(path)
    if path.endswith('.npz'):
        with np.load(path) as arrays:
            return arrays['features'], arrays['paths'].tolist()
    from safetensors import numpy as safetensors

    arrays = safetensors.load_file(path)
    return arrays['features'], [
        os.fsdecode(name) for name in arrays['paths'].tobytes().split(b'\0')[:-1]
    ]


def _write_npz(path, shape, longest, rows, names):
    header = np.lib.format.write_array_header_1_0
    kind = dict(fortran_order=False)
    # Names are padded to the longest one, so they are compressed; numbers gain nothing.
    with zipfile.ZipFile(path, 'w', compresslevel=1) as file:
        with file.open('features.npy', 'w', force_zip64=True) as entry:
            header(entry, kind | {'descr': '<f4', 'shape': shape})
            shutil.copyfileobj(rows, entry)
        packed = zipfile.ZipInfo('paths.npy')
        packed.compress_type = zipfile.ZIP_DEFLATED
        with file.open(packed, 'w', force_zip64=True) as entry:
            header(entry, kind | {'descr': f'<U{longest}', 'shape': shape[:1]})
            for name in _split(names):
                letters = os.fsdecode(name).encode('utf-32-le', 'surrogatepass')
                entry.write(letters.ljust(4 * longest, b'\0'))


def _write_safetensors(path, shape, longest, rows, names):
    """Length of the header, header, arrays; see github.com/huggingface/safetensors."""
    middle = 4 * shape[0] * shape[1]
    end = middle + os.fstat(names.fileno()).st_size
    header = {
        'features': {'dtype': 'F32', 'shape': shape, 'data_offsets': [0, middle]},
        'paths': {
            'dtype': 'U8',
            'shape': [end - middle],
            'data_offsets': [middle, end],
        },
    }
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # so that numbers are aligned to 8 bytes
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        shutil.copyfileobj(rows, file)
        shutil.copyfileobj(names, file)


def _split(file):
    """Reads zero-terminated names, a block at a time."""
    rest = b''
    for block in iter(lambda: file.read(1 << 16), b''):
        *names, rest = (rest + block).split(b'\0')
        yield from names
