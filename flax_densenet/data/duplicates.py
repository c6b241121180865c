"""Finds files with the same content, such as training images that are also test images.

Files are compared by size, then by a hash of both ends, then by a hash of everything,
so little is read from a set without copies.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Hashable

import numpy as np

from flax_densenet.data import soft_labels
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
    """The parts of a source after its copies were handled.

    Attributes:
      train, test: sorted int64 indices.
      val: the same; None if the source has only two parts.
      lines: a line for each group of copies: their parts, then their paths, separated
        by tabs.
      summary: one line about their effect on the run; empty if they do no harm.
    """

    train: np.ndarray
    test: np.ndarray
    val: np.ndarray | None = None
    lines: tuple[str, ...] = ()
    summary: str = ''

    @property
    def indices(self) -> dict[str, np.ndarray]:
        """The existing parts by name, the training part first."""
        found = {'train': self.train, 'val': self.val, 'test': self.test}
        return {name: part for name, part in found.items() if part is not None}


# Names of the parts in lines and messages, in the order of training. In each pair,
# images of the first part should not be in the second one as well.
_WORDS = {'train': 'training', 'val': 'validation', 'test': 'test'}
_PAIRS = ('train', 'val'), ('train', 'test'), ('val', 'test')


def resolve(
    groups: list[list[int]],
    name: Callable[[int], str],
    labels,
    parts: dict[str, np.ndarray],
    *,
    duplicates: str,
    ours: Collection[str],
) -> Parts:
    """Handles the copies among the images of the parts.

    Args:
      groups: the copies, from `find`.
      name: the name of the image at an index.
      labels: int `[N]` or float `[N, L]` of all images.
      parts: indices of `train`, `test` and, if there are three parts, `val`.
      duplicates: `drop` removes training images that are also in another part, and
        validation images that are also test images; `report` only reports them.
      ours: the parts that were drawn at random, image by image. Then the copies of an
        image move to the part of the first one, so none is in two of them.
    """
    notes, moved = [], 0
    if ours and groups:
        kept, moved = keep_together(groups, {part: parts[part] for part in ours})
        parts = parts | kept
    if moved:
        notes.append(f'{moved} copies of images went to the side of the first of them')
    inside = {part: np.zeros(len(labels), bool) for part in parts}
    for part, indices in parts.items():
        inside[part][indices] = True
    dropped: dict[str, np.ndarray] = {}
    for part, other in _PAIRS:
        if part not in parts or other not in parts:
            continue
        one, two = inside[part], inside[other]
        shared = [
            [index for index in group if one[index] or two[index]]
            for group in groups
            if one[group].any() and two[group].any()
        ]
        if shared:
            notes.append(_report_shared(shared, one, (part, other), name, duplicates))
            copies = np.array(sum(shared, []), np.int64)
            dropped[part] = np.union1d(dropped.get(part, copies), copies)
    labels = np.nan_to_num(soft_labels.known_labels(labels), nan=-1)
    unclear = [group for group in groups if len(np.unique(labels[group], axis=0)) > 1]
    if unclear:
        one, other = _two_of(unclear[0], labels)
        notes.append(
            f'{len(unclear)} images are in several classes at once ({name(one)} is '
            f'{name(other)})'
        )
    lines = [_line(group, inside, labels, name) for group in groups]
    if duplicates == 'drop':
        parts = parts | {
            part: np.setdiff1d(parts[part], copies) for part, copies in dropped.items()
        }
    return Parts(**parts, lines=tuple(lines), summary=printable('; '.join(notes)))


def keep_together(groups, parts):
    """Moves each group to the part of its first image; also returns their number."""
    place = {i: part for part, indices in parts.items() for i in indices.tolist()}
    moved = 0
    for group in groups:
        first, *rest = [index for index in group if index in place] or [None]
        for index in rest:
            moved += place[index] != place[first]
            place[index] = place[first]
    kept = {
        part: np.array(sorted(i for i, at in place.items() if at == part), np.int64)
        for part in parts
    }
    return kept, moved


def _report_shared(shared, inside, pair, name, duplicates):
    part, other = (_WORDS[one] for one in pair)
    count = sum(int(inside[group].sum()) for group in shared)
    one, copy = _two_of(shared[0], ~inside)
    then = f'data.duplicates=drop leaves them out of {part}'
    if duplicates == 'drop':
        then = f'they are left out of {part}'
    return (
        f'{count} {part} images are in the {other} as well ({name(one)} is '
        f'{name(copy)}): {then}'
    )


def _two_of(group, values):
    """Two members of a group with different values, the lower value first."""
    order = sorted(group, key=lambda index: np.atleast_1d(values[index]).tolist())
    return order[0], order[-1]


def _line(group, inside, labels, name):
    where = ' and '.join(
        word
        for part, word in _WORDS.items()
        if part in inside and inside[part][group].any()
    )
    if len(np.unique(labels[group], axis=0)) > 1:
        where += ', several classes'
    return '\t'.join([where, *(name(index) for index in group)])


def check(duplicates: str, kind: str):
    """Raises `UserError` for an invalid `data.duplicates`, or one invalid for a source.

    Args: kind: kind of the source: `folder`, ...
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
