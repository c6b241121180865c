"""The one exception for mistakes that a user can fix, and names fit for its line."""

import contextlib
import errno
import importlib.util
from collections.abc import Sequence

# A path or a value may be of any length; the remedy stands at the end.
_FIRST, _LAST = 1200, 600


class UserError(ValueError):
    """A mistake in a field, a file or a folder, said in one line with its remedy.

    `launch.py` prints the line and leaves with exit status 2; Python callers can
    catch it apart from defects of the program, which raise anything else.

    The line often repeats what a file of a stranger says. So it stays one line, what
    would steer a terminal is spelled out (`\\x1b`), and the middle of a very long one
    is left out.

    >>> print(UserError('the class a\\nb is not known'))
    the class a\\nb is not known
    """

    def __init__(self, message: str):
        super().__init__(_shorten(printable(message)))


class MissingExtraError(UserError):
    """A package of an extra (`pip install 'flax_densenet[EXTRA]'`) is not installed."""


@contextlib.contextmanager
def extra(name: str, what: str):
    """For the imports of an optional package: a missing one names its extra.

        with errors.extra('report', 'report.html'):
            import jinja2

    Args:
      name: the extra in `pyproject.toml`.
      what: what needs it: a file, a command or a field.

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
    """Whether all packages can be imported; imports none.

    >>> is_installed('numpy'), is_installed('numpy', 'no_such_package')
    (True, False)
    """
    try:
        return all(importlib.util.find_spec(name) is not None for name in packages)
    except (ImportError, ValueError):
        return False


def printable(text: str) -> str:
    r"""Text of a file or a folder as it can be shown and kept in one line of UTF-8.

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
    """What to do about an error of the machine; None for any other error."""
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
