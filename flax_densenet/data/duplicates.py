"""Finds files with the same content, such as training images that are also test images.

Files are compared by size, then by a hash of both ends, then by a hash of everything,
so little is read from a set without copies.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Callable, Hashable

import numpy as np

from flax_densenet.errors import UserError, printable

DUPLICATES = ('report', 'drop', 'ignore')
FILE = 'duplicates.txt'
# Bytes of each end. Photographs differ there; uncompressed images may not.
_END = 4096
_CHUNK = 256


def find(paths: list[str], indices) -> list[list[int]]:
    """Finds groups of identical files. Files that cannot be read are in no group.

    Args:
      paths: of all files.
      indices: which of them to compare.

    Returns:
      Sorted groups of two or more sorted indices.
    """
    indices = [int(index) for index in indices]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        groups = [indices]
        for key in (_size, _ends, _whole):
            groups = _divide(groups, _of_paths(key, paths), pool)
    return sorted(groups)


def _of_paths(key, paths):
    return lambda index: key(paths[index])


def _divide(groups, key: Callable[[int], Hashable], pool) -> list[list[int]]:
    """Splits groups by the key of their members; keeps parts of two or more."""
    members = [index for group in groups for index in group]
    chunks = [members[i : i + _CHUNK] for i in range(0, len(members), _CHUNK)]
    keys = pool.map(lambda chunk: [key(index) for index in chunk], chunks)
    keys = [value for chunk in keys for value in chunk]
    parts: dict[Hashable, list[int]] = {}
    place = 0
    for number, group in enumerate(groups):
        for index in group:
            value = keys[place]
            place += 1
            if value is not None:
                parts.setdefault((number, value), []).append(index)
    return [part for part in parts.values() if len(part) > 1]


def _size(path):
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _ends(path):
    try:
        with open(path, 'rb') as file:
            ends = file.read(_END)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(size - _END, len(ends)))
            return hashlib.blake2b(ends + file.read(_END), digest_size=16).digest()
    except OSError:
        return None


def _whole(path):
    try:
        with open(path, 'rb') as file:
            # The ends of such a small file, which were compared, are all of it.
            if os.fstat(file.fileno()).st_size <= 2 * _END:
                return b''
            return hashlib.file_digest(file, 'blake2b').digest()
    except OSError:
        return None


@dataclasses.dataclass(frozen=True)
class Parts:
    """The two parts of a source after its copies were handled.

    Attributes:
      train, test: sorted int64 indices.
      lines: a line for each group of copies: which parts they are in, then their paths,
        separated by tabs.
      summary: one line about what they mean for the run; empty if they do no harm.
    """

    train: np.ndarray
    test: np.ndarray
    lines: tuple[str, ...] = ()
    summary: str = ''


def resolve(
    groups: list[list[int]],
    name: Callable[[int], str],
    labels,
    train,
    test,
    *,
    duplicates: str,
    ours: bool,
) -> Parts:
    """Handles the copies among the images of two parts.

    Args:
      groups: the copies, from `find`.
      name: the name of the image at an index.
      labels: int `[N]` or float `[N, L]` of all images.
      train, test: indices.
      duplicates: `drop` removes training images that are also test images; `report`
        only reports them.
      ours: the split was drawn at random, image by image. Then the copies of an image
        move to the part of the first one, so none is in both.
    """
    notes, moved = [], 0
    if ours and groups:
        train, test, moved = _keep_together(groups, train, test)
    if moved:
        notes.append(f'{moved} copies of images went to the side of the first of them')
    in_train = np.zeros(len(labels), bool)
    in_train[train] = True
    shared = [group for group in groups if len(set(in_train[group].tolist())) > 1]
    if shared:
        notes.append(_report_shared(shared, in_train, name, duplicates))
    labels = np.nan_to_num(labels, nan=-1)
    unclear = [group for group in groups if len(np.unique(labels[group], axis=0)) > 1]
    if unclear:
        one, other = _two_of(unclear[0], labels)
        notes.append(
            f'{len(unclear)} images are in several classes at once ({name(one)} is '
            f'{name(other)})'
        )
    lines = [_line(group, in_train, labels, name) for group in groups]
    if duplicates == 'drop':
        both = np.array(sum(shared, []), np.int64)
        train = np.setdiff1d(train, both)
    return Parts(train, test, tuple(lines), printable('; '.join(notes)))


def _keep_together(groups, train, test):
    """Moves each group to the part of its first image; returns how many moved, too."""
    place = dict.fromkeys(train.tolist(), 0) | dict.fromkeys(test.tolist(), 1)
    moved = 0
    for group in groups:
        for index in group[1:]:
            moved += place[index] != place[group[0]]
            place[index] = place[group[0]]
    parts = ([i for i, side in place.items() if side == part] for part in (0, 1))
    return *(np.array(sorted(part), np.int64) for part in parts), moved


def _report_shared(shared, in_train, name, duplicates):
    count = sum(int(in_train[group].sum()) for group in shared)
    one, other = _two_of(shared[0], ~in_train)
    then = 'data.duplicates=drop leaves them out of training'
    if duplicates == 'drop':
        then = 'they are left out of training'
    return (
        f'{count} training images are in the test as well ({name(one)} is '
        f'{name(other)}): {then}'
    )


def _two_of(group, values):
    """Two members of a group with different values, the lower value first."""
    order = sorted(group, key=lambda index: np.atleast_1d(values[index]).tolist())
    return order[0], order[-1]


def _line(group, in_train, labels, name):
    sides = set(in_train[group].tolist())
    where = ' and '.join(
        part for part, side in (('training', True), ('test', False)) if side in sides
    )
    if len(np.unique(labels[group], axis=0)) > 1:
        where += ', several classes'
    return '\t'.join([where, *(name(index) for index in group)])


def check(duplicates: str, kind: str):
    """Raises `UserError` for an invalid `data.duplicates`, or one invalid for a source.

    Args:
      kind: of the source: `folder`, ...
    """
    if duplicates not in DUPLICATES:
        raise UserError(
            f'data.duplicates={duplicates} is not known; use {", ".join(DUPLICATES)}'
        )
    if duplicates == 'drop' and kind not in ('folder', 'packed'):
        raise UserError(
            f'data.duplicates=drop compares files and needs data.source=folder:PATH '
            f'or packed:DIR, not {kind}; use data.duplicates=report'
        )
