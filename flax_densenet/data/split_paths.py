"""Finds the parts of a table's images in their paths: `train/000.png`."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from flax_densenet.data import parts as parts_lib
from flax_densenet.data import split_column


def find(
    names: Sequence[str], below: Sequence[str], options
) -> tuple[np.ndarray | None, str]:
    """The part of each image, from the first folder in which the paths differ.

    Args:
      names: the images' names in the table.
      below: the paths of their files below the folder, in the same order; the name for
        a missing one.
      options: `label_options.Options`.

    Returns:
      int64 `[N]`, see `split_column.number_roles`, or None; and a line, which is empty
      if no folder looks like a part.
    """
    line = ''
    for paths in (names, below):
        folders = [path.replace('\\', '/').split('/')[:-1] for path in paths]
        roles, found = _find_roles(_without_shared(folders), options)
        if roles is not None:
            return split_column.number_roles(roles), found
        line = line or found
    return None, line


def _without_shared(folders):
    """Paths as lists of folders, without `.` and the folders that all have."""
    folders = [[name for name in path if name not in ('', '.')] for path in folders]
    shared = 0
    for same in zip(*folders, strict=False):
        if len(set(same)) > 1:
            break
        shared += 1
    return [path[shared:] for path in folders]


def _find_roles(folders, options):
    """The roles of all paths or None, and the line."""
    depth = max(map(len, folders), default=0)
    for place in range(min(depth, 3)):
        at = [path[place] if len(path) > place else '' for path in folders]
        role_of = {name: parts_lib.role(name) for name in set(at)}
        used = set(role_of.values()) & set(parts_lib.USED)
        if not {parts_lib.TRAIN} < used:
            continue
        roles = [role_of[name] for name in at]
        named = [
            name
            for part in parts_lib.USED
            for name in sorted(role_of)
            if role_of[name] == part
        ]
        what = ', '.join(named[:5])
        if place == 0 and None not in roles:
            pieces = split_column.describe_counts(Counter(roles), options)
            return roles, (
                f'the folders {what} in the paths of its images are taken as the '
                f'split: {"; ".join(pieces)}; data.split=none takes none'
            )
        odd = [name for name in at if role_of[name] is None]
        why = 'they are not the first folders'
        if odd:
            why = f'{odd[0]} is not a part' if odd[0] else 'some are outside of them'
        return None, (
            f'the folders {what} in the paths of its images look like parts, but '
            f'{why}, so they are not used{split_column.at_random(options)}; to use '
            'them, add a column split of train, val and test'
        )
    return None, ''
