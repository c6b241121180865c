"""How this program is called, for the commands that it shows."""

import pathlib


def words() -> list[str]:
    """`python launch.py` in a checkout, else the installed command."""
    checkout = pathlib.Path(__file__).resolve().parents[2]
    if (checkout / 'launch.py').is_file():
        return ['python', 'launch.py']
    return ['flax-densenet']
