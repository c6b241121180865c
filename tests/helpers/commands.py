"""The command line, in this process."""

from flax_densenet.cli import main as cli


def make_main(monkeypatch, capfd):
    """`main.main` as a function: status, standard output and standard error."""
    # Its settings are of a whole process, and other tests run in this one.
    monkeypatch.setattr(cli, 'set_up', lambda invocation: None)

    def run(*arguments):
        capfd.readouterr()  # what was before
        status = cli.main(['launch.py', *map(str, arguments)])
        return status, *capfd.readouterr()

    return run
