"""The command line, in this process."""

from flax_densenet.cli import main as cli


def make_main(monkeypatch, capfd):
    """A function that runs `main.main`: status, standard output, standard error."""
    # Its settings apply to an entire process, but other tests run in this one.
    monkeypatch.setattr(cli, 'set_up', lambda invocation: None)

    def run(*arguments):
        capfd.readouterr()  # discards earlier output
        status = cli.main(['launch.py', *map(str, arguments)])
        return status, *capfd.readouterr()

    return run
