"""The name of this program, for the commands that it shows."""

import pathlib
import shlex
import sys


def words() -> list[str]:
    """`python launch.py` in a checkout, else the installed command."""
    checkout = pathlib.Path(__file__).resolve().parents[2]
    if (checkout / 'launch.py').is_file():
        return ['python', 'launch.py']
    return ['flax-densenet']


def command() -> str | None:
    """The command line of this process; None in other programs than this one."""
    program = pathlib.Path(sys.argv[0])
    as_module = program.parts[-2:] == ('flax_densenet', '__main__.py')
    if program.name not in ('launch.py', 'flax-densenet') and not as_module:
        return None
    return shlex.join([*words(), *sys.argv[1:]])
