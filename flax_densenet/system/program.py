"""How this program is called, for the commands that it shows."""

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
    if pathlib.Path(sys.argv[0]).name not in ('launch.py', 'flax-densenet'):
        return None
    return shlex.join([*words(), *sys.argv[1:]])
