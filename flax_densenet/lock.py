"""One training process for a workdir.

The lock is the kernel's on an open file: it ends with the process however that ends, so
that a crash leaves nothing to remove.
"""

import contextlib
import errno
import fcntl
import os
import socket

from flax_densenet.errors import UserError

FILE = '.lock'
# Of file systems that have no such locks (some of the network).
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


def check(workdir: str):
    """Raises where another process trains in `workdir`; leaves no trace there.

    Raises:
      UserError: it is locked.
    """
    with contextlib.suppress(OSError), open(os.path.join(workdir, FILE)) as file:
        _take(file, workdir)  # given back as the file is closed


@contextlib.contextmanager
def hold(workdir: str):
    """Holds the lock of a folder, which is made where absent.

    Raises:
      UserError: another process holds it, or the folder cannot be written.
    """
    try:
        os.makedirs(workdir, exist_ok=True)
        file = open(os.path.join(workdir, FILE), 'a+')  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f'--workdir={workdir} cannot be written ({error.strerror}); choose another'
        ) from error
    with file:
        _take(file, workdir)
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield


def _take(file, workdir):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        who = file.read(200) or 'another process'
        raise UserError(
            f'--workdir={workdir} is in use: {who} trains there; wait for it, end it, '
            'or use another --workdir'
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f'warning: no lock can be had on {workdir} ({error.strerror}): start no '
            'second training there',
            flush=True,
        )
