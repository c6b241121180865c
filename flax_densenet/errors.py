"""The exception for mistakes that a user can fix, and helpers for its message."""

import contextlib
import errno
import importlib.util
from collections.abc import Sequence

# A path or a value may have any length; the remedy is at the end.
_FIRST, _LAST = 1200, 600


class UserError(ValueError):
    """A mistake in a field, a file or a folder, described in one line with its remedy.

    The commands print the line and exit with status 2. Python callers can catch it
    separately from bugs, which raise other exceptions.

    The message often quotes untrusted files. So it is always one line, control
    characters are escaped (`\\x1b`), and the middle of a very long one is left out.

    >>> print(UserError('the class a\\nb is not known'))
    the class a\\nb is not known
    """

    def __init__(self, message: str):
        super().__init__(_shorten(printable(message)))


class MissingExtraError(UserError):
    """A package of an extra (`pip install 'flax_densenet[EXTRA]'`) is not installed."""


@contextlib.contextmanager
def extra(name: str, what: str):
    """A context for importing an optional package; if it is missing, names the extra.

        with errors.extra('report', 'report.html'):
            import jinja2

    Args:
      name: the extra in `pyproject.toml`.
      what: the file, command or field that needs it.

    Raises:
      MissingExtraError: an import failed.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or str(error)).partition('.')[0]
        raise MissingExtraError(
            f"{what} needs {package}: pip install 'flax_densenet[{name}]'"
        ) from error


def is_installed(*packages: str) -> bool:
    """Whether all packages are installed; imports none of them.

    >>> is_installed('numpy'), is_installed('numpy', 'no_such_package')
    (True, False)
    """
    try:
        return all(importlib.util.find_spec(name) is not None for name in packages)
    except (ImportError, ValueError):
        return False


def printable(text: str) -> str:
    r"""The name of a file or a folder as one line of valid UTF-8.

    >>> print(printable('größe 1\n2\udcff'))
    größe 1\n2\xff
    """
    return ''.join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character):
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, by surrogateescape
        return f'\\x{code - 0xDC00:02x}'
    return ascii(character)[1:-1]


def _shorten(text):
    if len(text) <= _FIRST + _LAST + 5:
        return text
    return f'{text[:_FIRST]} ... {text[-_LAST:]}'


_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.EFBIG, errno.ESTALE, errno.ENOTDIR, errno.EMFILE),
)
_MEMORY = ('RESOURCE_EXHAUSTED', 'Out of memory', 'out of memory', 'OUT_OF_MEMORY')


def explain_system_error(error: Exception) -> str | None:
    """The message and remedy for an error of the machine; None for any other error."""
    text = ' '.join(str(error).split())
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in _MEMORY)
    ):
        return (
            f'out of memory ({text[:160] or "MemoryError"}): use a smaller '
            'data.batch_size or data.image_size, model.remat=block or '
            'model.dtype=bfloat16, then run the same command to resume'
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        return (
            f'{error.filename or "a file"}: {error.strerror}; fix that, then run '
            'the same command to resume from the last checkpoint'
        )
    return None


def list_first(names: Sequence[str], most: int = 8) -> str:
    """Names joined by commas; if there are many, the first ones and how many more."""
    more = f', and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
