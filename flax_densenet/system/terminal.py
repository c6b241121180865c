"""Terminal output: whether there is a terminal, colors, and line width.

Colors are used on a terminal only, and not if `NO_COLOR` is set (no-color.org) or
`TERM` is `dumb`.
"""

import os
import re
import shutil
import sys
import unicodedata
from typing import Any, TextIO

# What marks lines with colors, columns or commands.
_WHOLE = re.compile(r'\x1b|\S {2,}\S|python launch\.py |flax-densenet ')
_CODES = {'bold': '1', 'green': '32', 'red': '31', 'dim': '2'}


def is_interactive() -> bool:
    """Whether standard output is a terminal."""
    try:
        return sys.stdout is not None and sys.stdout.isatty()
    except ValueError:  # it is closed
        return False


def paint(text: str, style: str) -> str:
    """A text in a color or weight, if standard output supports it.

    Args:
      style: of `bold`, `green`, `red`, `dim`.
    """
    dumb = os.environ.get('TERM') == 'dumb' or os.environ.get('NO_COLOR')
    if dumb or not is_interactive():
        return text
    return f'\x1b[{_CODES[style]}m{text}\x1b[0m'


def say(text: Any, file: TextIO | None = None):
    """Prints text; on a terminal, long lines are broken between words.

    Args:
      text: of one or several lines.
      file: standard output if it is not given.
    """
    file = sys.stdout if file is None else file
    try:
        interactive = file is not None and file.isatty()
    except ValueError:  # it is closed
        interactive = False
    if interactive:
        text = wrap(str(text), shutil.get_terminal_size().columns)
    print(text, file=file, flush=True)


def wrap(text: str, width: int) -> str:
    """Lines of at most `width` columns, as far as words allow.

    Continued lines are indented by two more. Lines in color, with columns, which have
    several spaces between words, or with a command, which is to be copied, are kept.

    >>> print(wrap('warning: what is wrong here', 20))
    warning: what is
      wrong here
    """
    return '\n'.join(_wrap_line(line, width) for line in text.split('\n'))


def _wrap_line(line, width):
    if _columns(line) <= width or _WHOLE.search(line):
        return line
    words = line.strip(' ').split(' ')
    indent = line[: len(line) - len(line.lstrip(' '))]
    rows = [indent + words[0]]
    for word in words[1:]:
        if _columns(rows[-1]) + 1 + _columns(word) <= width:
            rows[-1] += f' {word}'
        else:
            rows.append(f'{indent}  {word}')
    return '\n'.join(rows)


def _columns(text):
    """The width of a text; Chinese, Japanese, Korean and emoji take two columns."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in 'WF')
        for c in text
    )


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
