"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake in a field, a file or a folder, said in one line with its remedy.

    `launch.py` prints the line and leaves with exit status 2; Python callers can
    catch it apart from defects of the program, which raise anything else.
    """
