"""Finds recipes by path or by name, from any working directory."""

import dataclasses
import difflib
import os
import pathlib
import sys
import types

from ml_collections import ConfigDict

from flax_densenet import configs
from flax_densenet.errors import UserError
from flax_densenet.system import paths


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A file with `get_config`.

    Attributes:
      text: as given: `cifar:quick`, `configs/cifar.py:quick`, `mine.py`.
      path: path of the file.
      argument: argument of `get_config`, or None.
    """

    text: str
    path: str
    argument: str | None

    @property
    def file_and_argument(self) -> str:
        """The form that ml_collections reads."""
        return self.path if self.argument is None else f'{self.path}:{self.argument}'


def load_base() -> ConfigDict:
    """All fields with their defaults."""
    # Its folder is that of the recipes, which is hidden from type checkers.
    from flax_densenet.configs import base  # type: ignore[attr-defined]

    return base.get_config()


def folder() -> pathlib.Path:
    """The folder of the recipes that come with the package."""
    return next(
        pathlib.Path(path)
        for path in configs.__path__
        if os.path.isfile(os.path.join(path, 'base.py'))
    )


def names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.stem for p in folder().glob('*.py') if p.stem != '__init__')


def find(text: str) -> Recipe:
    """Finds the recipe `PATH[:ARGUMENT]` or `NAME[:ARGUMENT]`.

    A path is looked up first in the working directory, then next to the package.

    Raises:
      UserError: there is no such recipe.
    """
    path, colon, argument = text.partition(':')
    if len(path) == 1 and argument[:1] in ('/', '\\'):  # a Windows drive
        below, colon, argument = argument.partition(':')
        path = f'{path}:{below}'
    elif argument.startswith('//'):
        paths.resolve(text, '--config=')  # a URL
    for candidate in _candidates(path):
        if os.path.isfile(candidate):
            return Recipe(text, candidate, argument if colon else None)
    close = difflib.get_close_matches(pathlib.Path(path).stem, names(), 1)
    hint = f'did you mean {close[0]}? The' if close else 'the'
    raise UserError(
        f'--config={path}: there is no such recipe; {hint} '
        f'recipes in {folder()} are {", ".join(names())}'
    )


def _candidates(path):
    yield path
    yield paths.expand(path)
    within = pathlib.PurePath(path)
    if within.is_absolute() or '..' in within.parts or '\0' in path:
        return
    if within.parts[:1] == ('configs',):  # name of the folder in the repository
        within = within.relative_to('configs')
    if path:
        yield str(folder() / within)
        yield str(folder() / f'{within}.py')


def provide_configs(recipe: Recipe | None):
    """Makes `from configs import base` work in a recipe, wherever it is.

    Recipes in a folder called configs can import each other as well.
    """
    places = [str(folder())]
    if recipe and (beside := pathlib.Path(recipe.path).resolve().parent).name == (
        'configs'
    ):
        places.append(str(beside))
    package = sys.modules.get('configs')
    if package is None or places[0] not in list(getattr(package, '__path__', ())):
        package = types.ModuleType('configs')
        package.__path__ = []
        sys.modules['configs'] = package
    for place in places:
        if place not in list(package.__path__):
            package.__path__.append(place)
