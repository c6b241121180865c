"""Reads safetensors files: single files, or several files with an index.

model-00001-of-00002.safetensors
model-00002-of-00002.safetensors
model.safetensors.index.json      {"weight_map": {NAME OF ARRAY: FILE}}
"""

import json
import os
import re

import numpy as np

from flax_densenet.errors import UserError, list_first, printable

INDEX = '.safetensors.index.json'
_SHARD = re.compile(r'(.+)-(\d{5})-of-(\d{5})\.safetensors')
_LARGEST = 2**26  # bytes of an index


def is_index(path: str) -> bool:
    """Whether the name of a file is that of an index."""
    return path.endswith(INDEX)


def read(path: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the arrays of a file, or of all files in an index.

    Args:
      path: a file, an index, or one of several files with an index next to them.

    Raises:
      UserError: a file is corrupt or missing, or the index and the files disagree.
    """
    if is_index(path):
        return _read_all(path)
    if (match := _SHARD.fullmatch(os.path.basename(path))) and int(match[3]) > 1:
        index = os.path.join(os.path.dirname(path), f'{match[1]}{INDEX}')
        if not os.path.exists(index):
            raise UserError(
                f'{path} is one of {int(match[3])} files, and there is no '
                f'{os.path.basename(index)} next to it; use all files with their index'
            )
        return _read_all(index)
    return _read_one(path)


def _read_one(path):
    import safetensors

    try:
        with safetensors.safe_open(path, 'numpy') as file:
            metadata = file.metadata() or {}
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (
        *(safetensors.SafetensorError, OSError, TypeError, ValueError, MemoryError),
        *(LookupError, AttributeError, OverflowError),
    ) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'{path} is not a valid safetensors file ({reason})') from error


def _read_all(index):
    places = _read_index(index)
    folder, metadata, arrays = os.path.dirname(index), {}, {}
    for name in sorted(set(places.values())):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f'{index} names {name}, which is not there; copy it again')
        more, found = _read_one(path)
        wanted = {array for array, place in places.items() if place == name}
        if different := sorted(found.keys() ^ wanted):
            raise UserError(
                f'{index} and {name} disagree about '
                f'{printable(list_first(different))}; copy all of them again'
            )
        metadata |= more
        arrays |= found
    return metadata, arrays


def _read_index(path):
    """`{name of array: name of file}`."""
    try:
        if os.path.getsize(path) > _LARGEST:
            raise ValueError('it is too large')
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise UserError(f'{path}: there is no such file') from error
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{path} cannot be read ({reason})') from error
    places = content.get('weight_map') if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f'{path} has no weight_map; it is not an index of safetensors')
    for place in places.values():
        # Only files in the same folder.
        if not isinstance(place, str) or place in ('', '.', '..') or _is_path(place):
            raise UserError(f'{path}: weight_map has {place!r:.60}, no name of a file')
    return places


def _is_path(name):
    return '\0' in name or os.path.basename(name) != name or '\\' in name
