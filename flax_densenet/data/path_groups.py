"""Finds the group of each image in its path, such as a folder of a patient."""

import os
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from flax_densenet.data import cells, group_names, label_options, notes
from flax_densenet.errors import UserError

_LEAST = 20  # images whose paths name an owner, if those of others do not
_DEPTHS = 6


def find(
    below: Sequence[str], groups: str, field: str
) -> tuple[np.ndarray | None, str]:
    """The group of each image, from its path.

    Images whose paths name no owner count as separate groups if at least 20 others, or
    half of all images, have one and some owner has several images.

    Args:
      below: the images' paths below the source's folder.
      groups: `data.groups`.
      field: name of the source in messages.

    Returns:
      int64 `[N]` or None, and the origin of the groups, for messages.

    Raises:
      UserError: a pattern that the user gave does not match every image.
    """
    pattern = label_options.check_groups(groups)
    if groups == 'none' or groups.startswith('column:'):
        return None, ''
    owners = cells.find_owners(below, pattern)
    known = [owner for owner in owners if owner is not None]
    counts = Counter(known)
    if len(known) == len(owners):
        is_used = 1 < len(counts) < len(known)
    elif pattern is not None:
        is_used = False
    else:
        is_used = 0 < len(counts) < len(known)
        if is_used and groups == 'auto' and len(known) < min(_LEAST, len(owners) / 2):
            notes.say(
                f'{field}: {len(known)} of {len(owners)} paths name an owner such as '
                f'{known[0]!r}, which are too few to group images by; '
                'data.groups=path does'
            )
            is_used = False
    if is_used:
        return _number(owners, known[0], field)
    if groups.startswith('path'):
        raise UserError(
            f'data.groups={groups}: some paths have no group, or all have the same '
            f'one, or each has its own; the first path is {below[0]}'
        )
    return None, ''


def _number(owners, first, field):
    """Groups and their origin; images without an owner are separate groups."""
    numbers, lines = group_names.number(
        [owner or '' for owner in owners],
        'the paths',
        f'owner such as {first!r} in their paths',
    )
    for line in lines:
        notes.say(f'{field}: {line}')
    return numbers, f'{first!r} and the like in their paths'


def describe_subfolders(below: Sequence[str], above: str) -> str:
    """How to keep subfolders of class folders together, as the end of a line.

    Subfolders of the same name in several classes are one group, as these may be
    images of one patient.

    Args:
      below: the images' paths below the source's folder.
      above: the folder of the class folders, in the same form.

    Returns:
      '' if no level of subfolders divides the images.
    """
    depth = 1 if above == os.curdir else 2 + above.count(os.sep)
    for level in range(depth, depth + _DEPTHS):
        pattern = '^' + '[^/]+/' * level + '([^/]+)'
        owners = cells.find_owners(below, re.compile(pattern))
        if None in owners:
            break
        if 1 < len(set(owners)) < len(owners):
            return (
                f", and are split one by one; data.groups='path:{pattern}' keeps those "
                'of a subfolder together'
            )
    return ''
