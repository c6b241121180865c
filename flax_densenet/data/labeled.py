"""Finds the images of a folder that a table of labels names, in any spelling."""

import dataclasses
import os
from collections import Counter

import numpy as np

from flax_densenet.data import (
    label_options,
    label_table,
    listing,
    notes,
    path_groups,
    readers,
    split_column,
    split_paths,
    subgroup_columns,
)
from flax_densenet.errors import UserError, printable
from flax_densenet.system import paths as paths_lib

_TWICE = ''  # replaces a path: several files have the name


def find(
    field: str,
    root: str,
    table: str,
    *,
    bad_images: str,
    options: label_options.Options,
    channels: int = 3,
) -> readers.Listing:
    """Lists the images of `data.labels=TABLE` below a folder.

    Args:
      Args: field: name of the source in messages.
      channels: channels of the images, see `images.Preparation`.

    Raises:
      UserError: the table cannot be read or names missing images.
    """
    passed = notes.Passed(read=paths_lib.resolve(table, 'data.labels='))
    names = _Names(root, listing.image_files(root, passed))
    passed.nested = 0  # a table names its images in any folder
    found = label_table.read(table, options, names.has)
    label = f'data.labels={table}'
    found, kept, paths, how = _match(found, names, options)
    wanted = [found.images[i] for i in kept]
    absent = _check_paths(field, root, table, wanted, paths, bad_images, passed)
    there = [index for index, path in enumerate(paths) if path is not None]
    kept, paths = kept[there], [paths[index] for index in there]
    bad = listing.check_files(paths, bad_images, channels=channels)
    good = np.array([i for i in range(len(paths)) if i not in bad], np.int64)
    skipped = [f'{name} is missing' for name in absent]
    skipped += [f'{paths[i]} {reason}' for i, reason in bad.items()]
    columns, line = subgroup_columns.find(
        {name: [cells_of[i] for i in kept] for name, cells_of in found.others.items()},
        options.subgroups,
        names.below(paths),
    )
    lost = len(wanted) - len(good)
    if lost and len(found.notes):
        how = [
            *how,
            f'the numbers above count all {len(found.images)} rows; {lost} of them '
            'have no image that can be read and are skipped',
        ]
    _say(label, found, how, len(good), columns, line)
    aside = len(found.images) - len(wanted)
    passed.unnamed = max(0, len(names) - len(set(paths)) - aside)
    if passed.line():
        notes.say(f'{field}: {passed.line()}')
    train, others = good, []
    if found.parts is not None:
        part = found.parts[kept][good]
        train = good[part == 0]
        others = [good[part == n] for n in (1, 2) if (part == n).any()]
        if others and options.for_training and found.values.ndim == 1:
            _say_missing_classes(label, found, found.values[kept], train, others)
    groups, grouped_by = found.groups, found.grouped_by
    if groups is None:
        groups, grouped_by = path_groups.find(names.below(paths), options.groups, field)
    else:
        groups = groups[kept]
    reader = readers.FileReader(paths, found.values[kept], root)
    reader.subgroups = columns
    return readers.Listing(
        reader,
        list(found.names),
        train,
        others[-1] if others else None,
        tuple(skipped),
        groups,
        others[0] if len(others) == 2 else None,
        grouped_by,
    )


def _match(found, names, options):
    """The labels with parts, the rows that are used, their files, and lines."""
    kept = np.arange(len(found.images))
    if found.parts is not None:
        kept = np.flatnonzero(found.parts < split_column.UNUSED)
    wanted = [found.images[i] for i in kept]
    paths, how = names.find(wanted)
    if found.parts is not None or options.split != 'auto':
        return found, kept, paths, how
    below = [
        names.below([path])[0] if path else name
        for path, name in zip(paths, wanted, strict=True)
    ]
    parts, line = split_paths.find(wanted, below, options)
    if line:
        how = [*how, line]
    if parts is not None:
        # No part is split off, as the lines about other columns say.
        end = split_column.at_random(options)
        lines = tuple(line.replace(end, '') for line in found.notes)
        found = dataclasses.replace(found, parts=parts, notes=lines)
        kept = np.flatnonzero(parts < split_column.UNUSED)
        paths = [paths[i] for i in kept]
    return found, kept, paths, how


def _check_paths(field, root, table, wanted, paths, bad_images, passed):
    """The names of missing images.

    Raises:
      UserError: images are missing and are not skipped, or a name is ambiguous.
    """
    label = f'data.labels={table}'
    absent = [n for n, path in zip(wanted, paths, strict=True) if path is None]
    if absent and bad_images != 'skip':
        raise UserError(
            f'{label}: {len(absent)} of its {len(paths)} images are not in '
            f'{root}, the first is {absent[0]}; add them, or set data.bad_images=skip'
            + (f' ({passed.line()})' if passed.line() else '')
        )
    unclear = next((n for n, p in zip(wanted, paths, strict=True) if p == _TWICE), None)
    if unclear is not None:
        raise UserError(
            f'{field}: {unclear} is in several folders; name it in {table} by its path '
            f'below {root}'
        )
    _check_one_row_each(label, wanted, paths)
    return absent


def _say(label, found, how, count, columns, choice):
    """The lines about the content of the table and about guesses."""
    classes = found.values.ndim == 1
    ignored = [name for name in found.ignored if name not in columns]
    notes.say(
        f'{label}: {len(found.names)} {"classes" if classes else "labels"} '
        f'({printable(", ".join(found.names[:20]))}) of {count} images'
        + (f'; not used: {printable(", ".join(ignored))}' if ignored else '')
    )
    for line in (*found.notes, *how, *([printable(choice)] if choice else [])):
        notes.say(f'{label}: {line}')


def _check_one_row_each(label, names, paths):
    """Raises if two rows name one file in two ways."""
    first = {}
    for name, path in zip(names, paths, strict=True):
        if path is not None and first.setdefault(path, name) != name:
            raise UserError(
                f'{label}: {first[path]} and {name} are the same file, {path}; remove '
                'one of the rows'
            )


def _say_missing_classes(label, found, values, train, others):
    """A warning for classes without training images."""
    missing = np.setdiff1d(values[np.concatenate(others)], values[train])
    if len(missing):
        names = ', '.join(found.names[i] for i in missing[:5])
        notes.say(
            f'{label}: warning: {len(missing)} classes have no image to train on, so '
            f'they cannot be learned: {names}'
        )


class _Names:
    """The files below a folder, by the names that a table may use."""

    def __init__(self, root, paths):
        self._root, self._paths = root, paths
        self._by_name = {os.path.relpath(path, root): path for path in paths}
        exact = set(self._by_name)  # a path below the folder names one file only
        for path in paths:
            name = os.path.basename(path)
            if name not in exact and self._by_name.setdefault(name, path) != path:
                self._by_name[name] = _TWICE
        self._tails = {}

    def __len__(self):
        return len(self._paths)

    def below(self, paths):
        """The paths below the folder."""
        return [os.path.relpath(path, self._root) for path in paths]

    def has(self, name) -> bool:
        """Whether a name matches a file, exactly or nearly."""
        if not name:
            return False
        if os.path.normpath(name) in self._by_name:
            return True
        tail = _plain(name)[-1:]
        return any(self._tail(tail, *kind) is not None for kind in _KINDS[:3])

    def find(self, names):
        """The path of each name, or None, and a description of the matching."""
        paths = [self._by_name.get(os.path.normpath(name)) for name in names]
        if any(path is not None for path in paths) or not names:
            return self._find_rest(names, paths)
        split = [_plain(name) for name in names]
        shared = os.path.commonprefix(split)
        shared = min(len(shared), min(map(len, split)) - 1)
        best = paths, []
        for kind in _KINDS:
            for drop in range(shared + 1):
                found = [self._tail(name[drop:], *kind) for name in split]
                count = sum(path is not None for path in found)
                if count > sum(path is not None for path in best[0]):
                    best = found, [self._how(names, found, split[0][:drop], kind)]
                if count == len(names):
                    return best
        if any(best[0]):  # the folders are right, so that the others are missing
            return best
        return self._find_by_ends(names, split, best)

    def _find_by_ends(self, names, split, best):
        """Looks for each name by the longest end of its path, closest kinds first."""
        for kind in _KINDS:
            found = [self._by_end(name, kind) for name in split]
            counts = Counter(path for path in found if path)
            found = [path if counts[path] == 1 else None for path in found]
            if len(names) - found.count(None) > len(names) - best[0].count(None):
                line = self._how(names, found, [], kind)
                best = found, [f'{line}; each by the longest end of its path']
        return best

    def _by_end(self, name, kind):
        ends = (self._tail(name[drop:], *kind) for drop in range(len(name)))
        return next((path for path in ends if path), None)

    def _find_rest(self, names, paths):
        """Looks for single names without extension or case, which people mix up."""
        left = [i for i, path in enumerate(paths) if path is None]
        taken, found = {path for path in paths if path}, []
        for kind in _KINDS[1:3] if left else ():
            for i in left:
                path = self._tail(_plain(names[i]), *kind)
                if paths[i] is None and path and path not in taken:
                    paths[i] = path
                    taken.add(path)
                    found.append(i)
        if not found:
            return paths, []
        first = min(found)
        return paths, [
            f'{len(found)} of its names differ from the files: {names[first]} is '
            f'matched to {paths[first]}'
        ]

    def _how(self, names, found, dropped, kind):
        index = next(i for i, path in enumerate(found) if path is not None)
        pieces = [text for text, is_on in zip(_SAID, kind, strict=True) if is_on]
        if dropped:
            pieces.insert(0, f'{"/".join(dropped)}/ at their beginning is left out')
        return (
            f'its names differ from the files: {names[index]} is matched to '
            f'{found[index] or "several files"}'
            + (f' ({", ".join(pieces)})' if pieces else '')
        )

    def _tail(self, name, *kind):
        """The file with a path that ends with these folders and this name."""
        if kind not in self._tails:
            self._tails[kind] = tails = {}
            for path in self._paths:
                whole = _plain(os.path.relpath(path, self._root))
                for place in range(len(whole)):
                    end = _key(whole[place:], *kind)
                    if end is not None and tails.setdefault(end, path) != path:
                        tails[end] = _TWICE
        key = _key(name, *kind)
        return None if key is None else self._tails[kind].get(key)


_SAID = ('extensions are left out', 'case is left out', 'leading zeros too')
# Without extension, in any case, as a number: from the closest match on.
_KINDS = (
    (False, False, False),
    (True, False, False),
    (True, True, False),
    (True, True, True),
)


def _plain(name):
    """The parts of a path, also of Windows paths, without a drive."""
    parts = name.replace('\\', '/').split('/')
    return [part for part in parts if part not in ('', '.')] or ['']


def _key(parts, no_ending, no_case, as_number):
    name = '/'.join(parts)
    if no_ending and listing.is_image_name(name):
        name = os.path.splitext(name)[0]
    if no_case:
        name = name.lower()
    if as_number:
        folder, _, base = name.rpartition('/')
        if base.rstrip('0').endswith('.'):  # 12.0, as pandas writes it
            base = base.rstrip('0')[:-1]
        if not base.isascii() or not base.isdecimal():
            return None
        name = f'{folder}/{int(base)}'
    return name
