"""Recipes with mistakes: one line that names the line of the recipe."""

import pytest

import flax_densenet
from flax_densenet.cli import command_line, commands
from flax_densenet.errors import UserError

START = (
    'from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n'
)


def refused(path):
    """The line for a recipe, the same on the command line and from Python."""
    with pytest.raises(UserError) as caught:
        command_line.parse(['launch.py', f'--config={path}'], commands.COMMANDS)
    with pytest.raises(UserError) as from_python:
        flax_densenet.get_config(path)
    assert str(caught.value) == str(from_python.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ('name', 'text', 'line'),
    [
        ('x.yaml', 'train:\n  epochs: 3\n', ': a recipe is a Python file with get_c'),
        ('x.py', 'epochs = 3\n', ': a recipe is a Python file with get_config()'),
        ('x.py', 'import no_such_package\n', ', line 1: ModuleNotFoundError: No modu'),
        ('x.py', 'def get_config()\n', ", line 1: SyntaxError: expected ':'"),
        ('x.py', 'def get_config():\n    1 / 0\n', ', line 2: ZeroDivisionError: div'),
        ('x.py', START, ': get_config() returns NoneType, not a ConfigDict; end it'),
        (
            'x.py',
            "def get_config():\n    open('/none')\n",
            ', line 2: FileNotFoundError',
        ),
        # The line of the recipe, not of the library that raises the error.
        (
            'x.py',
            START + '    config.train.epochs = "x"\n    return config\n',
            ', line 6: TypeError: ',
        ),
        (
            'x.py',
            'def get_config(epochs):\n    return epochs\n',
            ': x needs an argument: ',
        ),
    ],
)
def test_recipes_with_mistakes(name, text, line, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    assert refused(path).startswith(f'--config={path}{line}'), refused(path)


def test_a_recipe_without_arguments():
    assert refused('densenet121:x') == (
        '--config=densenet121:x: densenet121 takes no argument; use '
        '--config=densenet121'
    )


def test_a_recipe_that_lacks_fields(tmp_path):
    """They have their defaults, and their types."""
    path = tmp_path / 'x.py'
    start = 'from ml_collections import ConfigDict\n\n\ndef get_config():\n    return '
    path.write_text(start + "ConfigDict({'train': {'epochs': 3}}).lock()\n")
    arguments = ['launch.py', f'--config={path}', '--config.data.crop_fraction=0.5']
    config = command_line.parse(arguments, commands.COMMANDS).config
    assert (config.train.epochs, config.data.crop_fraction) == (3, 0.5)
    usual = flax_densenet.get_config('base')
    usual.train.epochs = 3
    assert flax_densenet.get_config(path).to_dict() == usual.to_dict()
    path.write_text(start + "ConfigDict({'train': 3})\n")
    assert refused(path).endswith('returns train=3, which must be a section of fields')
