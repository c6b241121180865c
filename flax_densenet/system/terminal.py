"""What a terminal shows: whether someone is looking, colors, lines of a width.

Colors are used on a terminal only, and not if `NO_COLOR` is set (no-color.org) or
`TERM` is `dumb`.
"""

import os
import sys

_CODES = {'bold': '1', 'green': '32', 'red': '31', 'dim': '2'}


def is_interactive() -> bool:
    """Whether standard output is a terminal."""
    try:
        return sys.stdout is not None and sys.stdout.isatty()
    except ValueError:  # it is closed
        return False


def paint(text: str, style: str) -> str:
    """A text in a color or weight, where standard output shows them.

    Args:
      style: of `bold`, `green`, `red`, `dim`.
    """
    dumb = os.environ.get('TERM') == 'dumb' or os.environ.get('NO_COLOR')
    if dumb or not is_interactive():
        return text
    return f'\x1b[{_CODES[style]}m{text}\x1b[0m'


def format_duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`.

    >>> format_duration(45), format_duration(725), format_duration(11100)
    ('45 s', '12 min', '3 h 05 min')
    """
    if seconds < 90:
        return f'{max(round(seconds), 0)} s'
    minutes = round(seconds / 60)
    if minutes < 90:
        return f'{minutes} min'
    return f'{minutes // 60} h {minutes % 60:02} min'
