"""The messages of the package, through `logging`.

Progress is logged at the level INFO, warnings at WARNING and fatal errors at ERROR, to
loggers below `flax_densenet`. A program that uses the package as a library sees
warnings and errors on standard error, as for any other package; `show_messages` prints
everything.
"""

import logging
import sys

from flax_densenet.system import terminal

ROOT = 'flax_densenet'


class _Printer(logging.Handler):
    """Prints each message as a line, errors to standard error.

    Attributes:
      to_errors: everything to standard error, because standard output has the rows.
    """

    to_errors = False

    def emit(self, record):
        # Not through `handleError`: a reader that went away ends the program.
        file = (
            sys.stderr
            if self.to_errors or record.levelno >= logging.ERROR
            else sys.stdout
        )
        terminal.say(record.getMessage(), file)


def show_messages(*, to_errors: bool = False):
    """Prints progress and warnings, as the commands do.

    Args:
      to_errors: to standard error instead of standard output.
    """
    logger = logging.getLogger(ROOT)
    if not any(isinstance(handler, _Printer) for handler in logger.handlers):
        logger.addHandler(_Printer())
    for handler in logger.handlers:
        if isinstance(handler, _Printer):
            handler.to_errors = to_errors
    logger.setLevel(logging.INFO)
    logger.propagate = False  # absl would print them once more
