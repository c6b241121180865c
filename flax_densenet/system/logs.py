"""What the package has to say while it works, through `logging`.

Progress is logged at the level INFO and warnings at WARNING, to loggers below
`flax_densenet`. A program that uses the package as a library sees the warnings on
standard error, as of any other package; `show_messages` prints all of it.
"""

import logging

ROOT = 'flax_densenet'


class _Printer(logging.Handler):
    """Prints each message as a line of standard output, whatever that is then."""

    def emit(self, record):
        # Not through `handleError`: a reader that went away ends the program.
        print(record.getMessage(), flush=True)


def show_messages():
    """Prints progress and warnings to standard output, as the commands do."""
    logger = logging.getLogger(ROOT)
    if not any(isinstance(handler, _Printer) for handler in logger.handlers):
        logger.addHandler(_Printer())
    logger.setLevel(logging.INFO)
    logger.propagate = False  # absl would print them once more
