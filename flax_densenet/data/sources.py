"""The loaders of labeled images, one for each kind of `data.source`.

A loader lists the images (paths, arrays, records) and reads as little as possible;
`dataset.Examples` decodes them.
"""

import os
from collections.abc import Callable

import numpy as np

from flax_densenet.data import (
    folders,
    hub_source,
    label_options,
    labeled,
    listing,
    readers,
    tar,
    tfds_source,
)
from flax_densenet.data.packed import reader as packed_reader
from flax_densenet.errors import UserError
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


def _find_folder(
    name, *, bad_images, labels, table=None, known_classes=None, channels=3, **_
):
    root = paths_lib.resolve(name, 'data.source=folder:')
    field = f'data.source=folder:{name}'
    if not name or not os.path.isdir(root):
        raise UserError(
            f'{field}: there is no such folder; give one that holds a folder of images '
            'for each class'
        )
    table = table or label_options.Options()
    if labels:
        return labeled.find(
            field,
            root,
            labels,
            bad_images=bad_images,
            options=table,
            channels=channels,
        )
    return folders.find(
        name,
        bad_images=bad_images,
        groups=table.groups,
        known_classes=known_classes,
        channels=channels,
    )


def _find_tar(name, *, bad_images, known_classes=None, channels=3, **_):
    reader, names, first_test = tar.load(name, known_classes)
    bad = listing.check_files(reader, bad_images, name=reader.name, channels=channels)
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
    'hf': hub_source.find,
    'packed': _find_packed,
    'parquet': hub_source.find_parquet,
    'tar': _find_tar,
    'tfds': tfds_source.find,
}
