"""The loaders of labeled images, one for each kind of `data.source`.

A loader lists the images (paths, arrays, records) and reads as little as possible;
`dataset.Examples` decodes them.
"""

import os
from collections.abc import Callable

import numpy as np

from flax_densenet.data import folders, label_table, listing, readers, tar, tfds_source
from flax_densenet.data.packed import reader as packed_reader
from flax_densenet.errors import UserError, printable
from flax_densenet.system import paths as paths_lib


def _find_digits(name, **_):
    from sklearn import datasets  # 1 s, and only here

    if name:
        raise UserError(f'data.source=digits:{name}: digits takes no name; use digits')
    digits = datasets.load_digits()
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)
    reader = readers.ArrayReader(
        np.repeat(gray[..., None], 3, -1), digits.target.astype('i4')
    )
    return readers.Listing(
        reader, [str(n) for n in range(10)], np.arange(len(gray)), None
    )


def _find_folder(name, *, bad_images, labels, **_):
    root = paths_lib.resolve(name, 'data.source=folder:')
    field = f'data.source=folder:{name}'
    if not name or not os.path.isdir(root):
        raise UserError(
            f'{field}: there is no such folder; give one that holds a folder of images '
            'for each class'
        )
    if labels:
        return _find_labeled(field, root, labels, bad_images)
    return folders.find(name, bad_images=bad_images)


def _find_labeled(field, root, table, bad_images):
    """The images of a folder that a table of labels names, by path or by name."""
    found = label_table.read(table)
    by_name, twice = {}, set()
    for path in listing.image_files(root):
        by_name[os.path.relpath(path, root)] = path
        name = os.path.basename(path)
        if by_name.setdefault(name, path) != path:
            twice.add(name)
    paths = [by_name.get(os.path.normpath(name)) for name in found.images]
    absent = [n for n, path in zip(found.images, paths, strict=True) if path is None]
    if absent and bad_images != 'skip':
        raise UserError(
            f'data.labels={table}: {len(absent)} of its {len(paths)} images are not in '
            f'{root}, the first is {absent[0]}; add them, or set data.bad_images=skip'
        )
    unclear = next((name for name in found.images if name in twice), None)
    if unclear:
        raise UserError(
            f'{field}: {unclear} is in several folders; name it in {table} by its path '
            f'below {root}'
        )
    there = [index for index, path in enumerate(paths) if path is not None]
    paths = [paths[index] for index in there]
    bad = listing.check_files(paths, bad_images)
    good = np.array([i for i in range(len(paths)) if i not in bad], np.int64)
    skipped = [f'{name} is not there' for name in absent]
    skipped += [f'{paths[i]} {reason}' for i, reason in bad.items()]
    print(
        f'data.labels={table}: {len(found.names)} labels '
        f'({printable(", ".join(found.names[:20]))}) of {len(good)} images'
        + (
            f'; not used: {printable(", ".join(found.ignored))}'
            if found.ignored
            else ''
        ),
        flush=True,
    )
    train, test = good, None
    if found.parts is not None:
        part = found.parts[there][good]
        train, test = good[part == 0], good[part == 1]
    return readers.Listing(
        readers.FileReader(paths, found.values[there], root),
        list(found.names),
        train,
        test,
        tuple(skipped),
        None if found.groups is None else found.groups[there],
    )


def _find_tar(name, *, bad_images, **_):
    reader, names, first_test = tar.load(name)
    bad = listing.check_files(reader, bad_images, name=reader.name)
    good = np.array([i for i in range(len(reader)) if i not in bad], np.int64)
    rest = None if first_test is None else good[good >= first_test]
    return readers.Listing(
        reader,
        names,
        good if rest is None else good[good < first_test],
        rest,
        tuple(f'{reader.name(i)} {reason}' for i, reason in bad.items()),
    )


def _find_packed(name, **_):
    reader = packed_reader.load(name)
    count, rest = reader.manifest.count('train'), None
    if reader.manifest.has_test:
        rest = np.arange(count, len(reader))
    names = list(reader.manifest.class_names)
    return readers.Listing(reader, names, np.arange(count), rest, groups=reader.groups)


SOURCES: dict[str, Callable[..., readers.Listing]] = {
    'digits': _find_digits,
    'folder': _find_folder,
    'packed': _find_packed,
    'tar': _find_tar,
    'tfds': tfds_source.find,
}
