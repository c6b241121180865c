"""The command line, in this process."""

import sys

from absl.testing import flagsaver


def make_main(monkeypatch, capfd):
    """`launch.main` as a function: status, standard output and standard error."""
    import launch

    # Its settings are of a whole process, and other tests run in this one.
    monkeypatch.setattr(launch, '_set_up_jax', lambda: None)

    def run(*arguments):
        monkeypatch.setattr('sys.argv', sys.argv)  # the program changes it
        capfd.readouterr()  # what was before
        with flagsaver.flagsaver():
            status = launch.main(['launch.py', *map(str, arguments)])
        return status, *capfd.readouterr()

    return run
