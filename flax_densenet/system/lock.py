"""Locks: one training process per workdir, one packing process per folder.

The lock is a kernel lock on an open file: it ends with the process in any case, so a
crash leaves nothing to clean up.
"""

import contextlib
import errno
import logging
import os
import socket

from flax_densenet.errors import UserError

_LOGGER = logging.getLogger(__name__)

FILE = '.lock'
# Errors of file systems without such locks (some network disks).
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


def check(workdir: str):
    """Raises if another process trains in `workdir`; leaves no trace there.

    Raises:
      UserError: it is locked.
    """
    with contextlib.suppress(OSError), open(os.path.join(workdir, FILE)) as file:
        _take(file, f'--workdir={workdir}', 'trains')  # given back as it is closed


@contextlib.contextmanager
def hold(workdir: str, *, flag: str = '--workdir', doing: str = 'trains'):
    """Holds the lock of a folder, which is created if missing.

    Args:
      flag: the flag that names the folder.
      doing: what a process does there, for messages.

    Raises:
      UserError: another process holds it, or the folder cannot be written.
    """
    try:
        os.makedirs(workdir, exist_ok=True)
        file = open(os.path.join(workdir, FILE), 'a+')  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f'{flag}={workdir} cannot be written ({error.strerror}); choose another'
        ) from error
    with file:
        _take(file, f'{flag}={workdir}', doing)
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield


def _lock(file):
    """Raises OSError if another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _take(file, folder, doing):
    try:
        _lock(file)
    except BlockingIOError as error:
        file.seek(0)
        who = file.read(200) or 'another process'
        raise UserError(
            f'{folder} is in use: {who} {doing} there; wait for it, end it, or use '
            f'another {folder.partition("=")[0]}'
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _LOGGER.warning(
            f'warning: cannot lock {folder} ({error.strerror}): do not '
            'start a second process there'
        )
