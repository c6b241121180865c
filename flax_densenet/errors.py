"""The one exception for mistakes that a user can mend, and names fit for its line."""

import re

# Controls (a terminal would obey them), line ends, bytes that are not UTF-8.
_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')


class UserError(ValueError):
    """A mistake in a field, a file or a folder, said in one line with its remedy.

    `launch.py` prints the line and leaves with exit status 2; Python callers can
    catch it apart from defects of the program, which raise anything else.
    """


def printable(name: str) -> str:
    r"""A name of a file or folder as it can be shown and kept in one line of UTF-8.

    >>> print(printable('größe 1\n2\udcff'))
    größe 1\n2\xff
    """
    return _UNPRINTABLE.sub(_escape, name)


def _escape(match):
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, by surrogateescape
        return f'\\x{code - 0xDC00:02x}'
    return ascii(match[0])[1:-1]
