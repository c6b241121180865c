"""The one exception for mistakes that a user can mend."""

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
        super().__init__(_shorten(one_line(message)))


def one_line(text: str) -> str:
    """Text of a file or a folder, such that it can be shown on a terminal.

    >>> one_line('two\nlines, \x1b[1m, Ä')
    'two\\nlines, \\x1b[1m, Ä'
    """
    return ''.join(
        c if c.isprintable() else c.encode('unicode_escape').decode() for c in text
    )


def _shorten(text):
    if len(text) <= _FIRST + _LAST + 5:
        return text
    return f'{text[:_FIRST]} ... {text[-_LAST:]}'
