"""Positional arguments as flags: `photos/` is `--config.data.source=folder:photos/`."""

import os
import pathlib
import re

from flax_densenet.data import other_files
from flax_densenet.errors import UserError
from flax_densenet.system import paths

_KINDS = ('digits', 'folder', 'hf', 'packed', 'parquet', 'tar', 'tfds')


def place_data(positionals: list[str]) -> list[tuple[str, str]]:
    """`[PHOTOS]` of train, lr_find and sweep, with the default recipe."""
    check_count(positionals, 'PHOTOS')
    return [('config', 'densenet121'), ('config.data.source', source(positionals[0]))]


def place_model(positionals: list[str]) -> list[tuple[str, str]]:
    """`MODEL`: the folder of a run, a file of weights, or a Hub folder."""
    check_count(positionals, 'MODEL')
    return [('workdir', positionals[0])]


def place_model_and_data(positionals: list[str]) -> list[tuple[str, str]]:
    """`MODEL [PHOTOS]`."""
    check_count(positionals, 'MODEL', 'PHOTOS')
    model, *photos = positionals
    placed = place_measured(model)
    return placed + [('config.data.source', source(name)) for name in photos]


def place_measured(model: str) -> list[tuple[str, str]]:
    """A model whose outputs go next to a run, or else into a new folder."""
    from flax_densenet.weights import published

    if published.is_name(model):
        folder = re.sub(r'\W+', '-', model.partition('#')[0]) + '-eval'
    elif os.path.isfile(paths.expand(model)):
        folder = f'{pathlib.PurePath(model).stem}-eval'
    else:
        return [('workdir', model)]
    return [('config.init_from', model), ('workdir', os.path.join('ckpt', folder))]


def check_count(positionals: list[str], *names: str):
    """Raises if there are more arguments than names."""
    if len(positionals) > len(names):
        raise UserError(
            f'{positionals[len(names)]}: too many arguments; the arguments are '
            f'{" ".join(names)}, and flags start with --'
        )


def source(name: str) -> str:
    """A folder of images, a packed folder, tar files or a source, as `data.source`.

    Raises:
      UserError: there is no such folder or file.
    """
    path = paths.expand(name)
    if ':' in name and name.partition(':')[0] in _KINDS:
        return name
    if os.path.isdir(path):
        packed = os.path.isfile(os.path.join(path, 'pack.json'))
        if packed:
            return f'packed:{path}'
        tables = any(_glob(path, p) for p in ('*.parquet', '*/*.parquet'))
        return f'{"parquet" if tables else "folder"}:{path}'
    if path.endswith('.parquet'):
        return f'parquet:{path}'
    if path.endswith('.tar'):
        return f'tar:{path}'
    if name.partition(':')[0] in _KINDS:
        return name
    paths.resolve(name, '')  # raises for a wrong address or variable
    if os.path.isfile(path) and (what := other_files.describe_archive(path)):
        raise UserError(f'{name} {what}')
    raise UserError(
        f'{name}: there is no such folder; name a folder of images (PHOTOS/CLASS/*), '
        'a packed folder, tar or parquet files, or a source such as hf:cifar10'
    )


def _glob(folder, pattern):
    return next(iter(pathlib.Path(folder).glob(pattern)), None)
