"""The loaders of labeled images, one for each kind of `data.source`.

A loader lists the images (paths, arrays, records) and reads as little as possible;
`labeled_images.Examples` decodes them.
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
    other_files,
    path_groups,
    readers,
    subgroup_columns,
    tar,
    tfds_source,
)
from flax_densenet.data.packed import manifest as packed_manifest
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
    if os.path.isfile(root) and (what := other_files.describe_archive(root)):
        raise UserError(f'{field} {what}')
    if not name or not os.path.isdir(root):
        raise UserError(
            f'{field}: there is no such folder; give one with a folder of images for '
            'each class'
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
        options=table,
        known_classes=known_classes,
        channels=channels,
    )


def _find_tar(name, *, bad_images, table=None, known_classes=None, channels=3, **_):
    groups = table.groups if table else 'auto'
    reader, names, ends = tar.load(name, known_classes, options=table)
    bad = listing.check_files(reader, bad_images, name=reader.name, channels=channels)
    good = np.array([i for i in range(len(reader)) if i not in bad], np.int64)
    train, *others = np.split(good, np.searchsorted(good, ends[:-1]))
    owners, grouped_by = reader.groups, reader.grouped_by
    if owners is None:
        owners, grouped_by = path_groups.find(
            reader.names, groups, f'data.source=tar:{name}'
        )
    return readers.Listing(
        reader,
        names,
        train,
        others[-1] if others else None,
        tuple(f'{reader.name(i)} {reason}' for i, reason in bad.items()),
        owners,
        others[0] if len(others) == 2 else None,
        grouped_by,
    )


def _find_packed(name, *, table=None, **_):
    groups = table.groups if table else 'auto'
    if groups.startswith('column:'):
        raise UserError(
            f'data.groups={groups}: a pack has no columns; it keeps the groups that '
            'pack is given: pack PHOTOS FOLDER --config.data.groups=' + groups
        )
    reader = packed_reader.load(name)
    manifest = reader.manifest
    parts = [part for part in packed_manifest.PARTS if manifest.count(part)]
    ends = np.cumsum([manifest.count(part) for part in parts])
    train, *others = np.split(np.arange(len(reader)), ends[:-1])
    owners, grouped_by = reader.groups, 'the data that was packed'
    if groups == 'none':
        owners, grouped_by = None, ''
    elif owners is None or groups != 'auto':
        below = [os.fsdecode(key) for key in reader.keys(np.arange(len(reader)))]
        owners, grouped_by = path_groups.find(
            below, groups, f'data.source=packed:{name}'
        )
    if table is not None:
        subgroup_columns.keep(reader, table.subgroups)
    return readers.Listing(
        reader,
        list(manifest.class_names),
        train,
        others[-1] if others else None,
        groups=owners,
        val=others[0] if len(others) == 2 else None,
        grouped_by=grouped_by,
    )


SOURCES: dict[str, Callable[..., readers.Listing]] = {
    'digits': _find_digits,
    'folder': _find_folder,
    'hf': hub_source.find,
    'packed': _find_packed,
    'parquet': hub_source.find_parquet,
    'tar': _find_tar,
    'tfds': tfds_source.find,
}


def parse(source: str, labels: str) -> tuple[str, str]:
    """The kind of a source and its name, of `KIND:NAME`.

    Raises: UserError: there is no such kind, or it does not accept `labels`.
    """
    kind, _, name = source.partition(':')
    if kind not in SOURCES:
        raise UserError(
            f'data.source={source} is not known; use digits, folder:PATH, '
            'packed:DIR, tar:PATH, parquet:FOLDER, hf:NAME[:CONFIG] or '
            'tfds:NAME[:CONFIG]'
        )
    if labels and kind != 'folder':
        raise UserError(f'data.labels={labels} needs data.source=folder:PATH')
    return kind, name


def load(
    kind: str,
    name: str,
    *,
    labels: str,
    table: label_options.Options,
    **options,
) -> readers.Listing:
    """Lists the images of a source, with the columns for subgroups.

    Args:
      labels, table: `data.labels` and the options for reading it.
      **options: options of the loaders.
    """
    listing = SOURCES[kind](name, labels=labels, table=table, **options)
    if not labels:
        subgroup_columns.add_of_paths(listing.reader, table.subgroups)
    return listing
