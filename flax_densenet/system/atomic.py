"""Files that are complete at every moment: written to a temporary name, then renamed.

A program that is killed and a disk that fills up leave the file that was there.
"""

import contextlib
import os


@contextlib.contextmanager
def replacing(path: str, mode: str = 'w', **options):
    """`open(path, mode)` that replaces `path` once everything is written.

    If the block raises, `path` is unchanged.

    Raises:
      OSError: as for writing to `path`.
    """
    folder, name = os.path.split(os.path.abspath(path))
    # In the same folder, since a file cannot be moved at once to another disk; with the
    # process's number, as training and evaluation may write the same file.
    part = os.path.join(folder, f'.{name}.{os.getpid()}.part')
    try:
        with open(part, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # moved, or never made
            os.unlink(part)


def sync_folder(folder: str):
    """Makes sure that the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
