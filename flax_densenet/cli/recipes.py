"""Finds recipes by path or by name, from any working directory."""

import dataclasses
import difflib
import importlib.machinery
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
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
    def shown(self) -> str:
        """As in messages: `--config=mine.py`, without the argument."""
        argument = '' if self.argument is None else f':{self.argument}'
        return f'--config={self.text.removesuffix(argument)}'


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


def load(recipe: Recipe) -> ConfigDict:
    """Runs a recipe and returns its settings; what it leaves out has its default.

    Raises:
      UserError: it is not a recipe, does not accept its argument, or raises an error,
        which is named with its line in the recipe.
    """
    provide_configs(recipe)
    if pathlib.PurePath(recipe.path).suffix not in ('', '.py'):
        raise _not_a_recipe(recipe)
    try:
        config = _get_config(recipe)
    except UserError:
        raise
    except Exception as error:  # any code can be in a recipe
        raise _explain(error, recipe) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f'{recipe.shown}: get_config() returns {type(config).__name__}, not a '
            'ConfigDict; end it with `return config`'
        )
    _complete(config, recipe)
    return config


def _complete(config, recipe):
    """Adds the fields of base.py that a recipe does not have, such as new ones."""
    defaults = load_base()
    with config.unlocked():
        for name in defaults:
            if name not in config:
                config[name] = defaults[name]
            elif isinstance(defaults[name], ConfigDict):
                section = config[name]
                if not isinstance(section, ConfigDict):
                    raise UserError(
                        f'{recipe.shown}: get_config() returns {name}={section!r}, '
                        'which must be a section of fields'
                    )
                for field in defaults[name]:
                    if field not in section:
                        section[field] = defaults[name].get_ref(field)


def _not_a_recipe(recipe):
    return UserError(f'{recipe.shown}: a recipe is a Python file with get_config()')


def _get_config(recipe):
    name = 'config_config'
    loader = importlib.machinery.SourceFileLoader(name, recipe.path)
    spec = importlib.util.spec_from_file_location(name, recipe.path, loader=loader)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    get_config = getattr(module, 'get_config', None)
    if not callable(get_config):
        raise _not_a_recipe(recipe)
    arguments = [] if recipe.argument is None else [recipe.argument]
    _check_arguments(get_config, arguments, recipe)
    return get_config(*arguments)


def _check_arguments(get_config, arguments, recipe):
    """Raises if the recipe takes no argument, or needs one."""
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        name = pathlib.PurePath(recipe.path).stem
        wrong = f'{name} takes no argument; use {recipe.shown}'
        if not arguments:
            wrong = f'{name} needs an argument: {recipe.shown}:ARGUMENT'
        raise UserError(f'--config={recipe.text}: {wrong}') from error


def _explain(error, recipe):
    """The line for an error that a recipe raised."""
    message = ' '.join(str(error).split())
    if type(error) is ValueError:  # the recipe rejected its argument
        return UserError(f'--config={recipe.text}: {message}')
    path = os.path.realpath(recipe.path)
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.realpath(frame.filename) == path
    ]
    if isinstance(error, SyntaxError):
        message = error.msg
        if os.path.realpath(error.filename or '') == path:
            lines = [error.lineno]
    place = f', line {lines[-1]}' if lines and lines[-1] else ''
    kind = type(error).__name__
    return UserError(
        f'{recipe.shown}{place}: {kind}' + (f': {message}' if message else '')
    )


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
