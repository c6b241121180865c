"""Features of any number of images in one file, written as they come.

Both kinds of file say at their start how long they are. So rows and names wait in
temporary files beside the output, which need no memory, and are copied at the end.
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
    """Features float32 `[N, F]` and the N paths they are of.

    `np.load(path)` has them as `features` and `paths`. A safetensors file has
    `features` and, as `paths`, the names' bytes, each with a zero byte behind it;
    `read` makes strings of them.
    """

    def __init__(self, path: str):
        """Opens the temporary files.

        Raises:
          UserError: the name ends with none of `ENDINGS`.
          OSError: nothing can be written there.
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
        """Makes the file; it gets its name when it is complete.

        Args:
          size: F, for a file without rows.
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
        """Forgets what was written; harmless after `finish`."""
        self._rows.close()
        self._names.close()


def check_name(path: str):
    """Raises `UserError` where the ending is none of `ENDINGS`."""
    if not path.endswith(ENDINGS):
        raise UserError(
            f'--features={path}: the name of the file ends with {" or ".join(ENDINGS)}'
        )


def read(path: str) -> tuple[np.ndarray, list[str]]:
    """Features float32 `[N, F]` and their paths, of either kind of file."""
    check_name(path)
    if path.endswith('.npz'):
        with np.load(path) as found:
            return found['features'], found['paths'].tolist()
    from safetensors import numpy as safetensors

    found = safetensors.load_file(path)
    return found['features'], [
        os.fsdecode(name) for name in found['paths'].tobytes().split(b'\0')[:-1]
    ]


def _write_npz(path, shape, longest, rows, names):
    header = np.lib.format.write_array_header_1_0
    kind = dict(fortran_order=False)
    # Names are padded to the longest one, so they are compressed; numbers do not gain.
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
    """Length of the header, header, arrays: github.com/huggingface/safetensors."""
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
    text += b' ' * (-len(text) % 8)  # so that numbers lie at multiples of 8
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        shutil.copyfileobj(rows, file)
        shutil.copyfileobj(names, file)


def _split(file):
    """Names with a zero byte behind each, a block at a time."""
    rest = b''
    for block in iter(lambda: file.read(1 << 16), b''):
        *names, rest = (rest + block).split(b'\0')
        yield from names
