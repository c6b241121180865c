"""Splits the images of a source into parts for training, validation and testing."""

import dataclasses
import hashlib

import numpy as np

from flax_densenet.data import duplicates as duplicates_lib
from flax_densenet.data import folds as folds_lib
from flax_densenet.data import readers
from flax_densenet.errors import UserError


def describe_groups(
    groups: np.ndarray, grouped_by: str, parts: dict[str, np.ndarray], name
) -> str:
    """A line on whether images of one group are in several parts.

    Args:
      groups: int64 `[N]`, the groups of all images.
      grouped_by: their origin, see `readers.Listing`.
      parts: indices by name, the training part first.
      name: function from an index to the image's name.
    """
    inside = {part: np.unique(groups[indices]) for part, indices in parts.items()}
    every, counts = np.unique(np.concatenate(list(inside.values())), return_counts=True)
    shared = every[counts > 1]
    where = 'on both sides' if len(parts) == 2 else 'in more than one part'
    line = f'{len(shared)} of {len(every)} groups are {where}'
    if not len(shared):
        return (
            f'grouped by {grouped_by}: {line}; data.groups=none splits image by image'
        )
    found = [i[groups[i] == shared[0]] for i in parts.values()]
    one, other = [name(int(images[0])) for images in found if len(images)][:2]
    return (
        f'warning: grouped by {grouped_by}, {line} ({one} and {other} are of one '
        'group), so the metrics are better than on new groups'
    )


def describe_missing(
    listing: readers.Listing, parts: dict[str, np.ndarray], most: int = 5
) -> str:
    """A line about classes of which a part that is split off has no images, or ''."""
    lines = []
    given = {'val': listing.val, 'test': listing.test}
    for part, indices in parts.items():
        if part == 'train' or given[part] is not None:
            continue
        if not listing.reader.labels_in_memory or listing.reader.labels.ndim != 1:
            continue
        there = np.unique(listing.reader.labels[listing.train])
        missing = np.setdiff1d(there, listing.reader.labels[indices])
        names = [listing.class_names[label] for label in missing[:most]]
        if names:
            lines.append(
                f'the {part} images that are split off have none of {len(missing)} of '
                f'{len(there)} classes ({", ".join(names)}'
                f'{", ..." if len(missing) > most else ""}), so nothing is measured '
                'for them'
            )
    return '; '.join(lines)


def find_splits(
    listing: readers.Listing,
    test_fraction: float,
    split_seed: int,
    duplicates: str,
    *,
    val_fraction: float = 0.0,
    folds: folds_lib.Chosen | None = None,
) -> duplicates_lib.Parts:
    """Finds the parts of a source, and handles the copies among them.

    Args:
      listing: listing of the source; without a test part, one is split off.
      test_fraction, split_seed, duplicates, val_fraction: see `dataset.load_source`.
      folds: one of them is the test part; replaces `test_fraction`.

    Raises:
      UserError: a negative seed, a fraction for a part that the source has, or folds
        that are not possible.
    """
    if folds is not None:
        found = folds_lib.divide(listing, folds, split_seed, duplicates)
        if not val_fraction or not folds.fold:
            return found
        _check_val(listing, val_fraction)
        return _split_val(listing, found, val_fraction, split_seed, duplicates)
    parts = {'train': listing.train, 'val': listing.val, 'test': listing.test}
    ours = set()
    if parts['test'] is None:
        parts |= _split(listing, parts['train'], 'test', test_fraction, split_seed)
        ours = {'train', 'test'}
    if val_fraction:
        _check_val(listing, val_fraction)
        parts |= _split(listing, parts['train'], 'val', val_fraction, split_seed)
        ours |= {'train', 'val'}
    known = {name: part for name, part in parts.items() if part is not None}
    groups = []
    if duplicates != 'ignore':
        groups = listing.reader.copies(np.concatenate(list(known.values())))
    if not groups:
        return duplicates_lib.Parts(known['train'], known['test'], known.get('val'))
    return duplicates_lib.resolve(
        groups,
        listing.reader.name,
        listing.reader.labels,
        known,
        duplicates=duplicates,
        # Moving copies could separate the images of a patient.
        ours=ours if listing.groups is None else (),
    )


def _check_val(listing, val_fraction):
    if listing.val is not None:
        raise UserError(
            f'data.val_fraction={val_fraction:g}: the source has a validation part of '
            f'{len(listing.val)} images; set it to 0'
        )


def _split_val(listing, found, fraction, seed, duplicates):
    """The parts of a fold, with a validation part split off the training part."""
    parts = found.indices | _split(listing, found.train, 'val', fraction, seed)
    if duplicates != 'ignore' and listing.groups is None:
        copies = listing.reader.copies(found.train)
        pair = {name: parts[name] for name in ('train', 'val')}
        parts |= duplicates_lib.keep_together(copies, pair)[0]
    return dataclasses.replace(found, train=parts['train'], val=parts['val'])


def _split(listing, indices, name, fraction, seed):
    """`{'train': ..., name: ...}` after splitting off a part of some images."""
    train, held_out = _split_off(listing, indices, fraction, seed)
    return {'train': train, name: held_out}


def _split_off(listing, indices, fraction, seed):
    """A seeded random split, stratified by class; groups stay together.

    Files are ordered by a hash of their names: if one is added or removed later, the
    others stay in their part, except for one or two at the boundary.
    """
    if seed < 0:
        raise UserError(f'data.split_seed={seed} must be 0 or above')
    train_size = int(len(indices) * (1 - fraction))
    test_size = len(indices) - train_size
    if not train_size or not test_size:
        return indices[:train_size], indices[train_size:]
    if not listing.reader.labels_in_memory and listing.groups is not None:
        return _split_groups(indices, listing.groups[indices], test_size, seed)
    if not listing.reader.labels_in_memory:  # they would have to be read one by one
        order = np.random.default_rng(seed).permutation(indices)
        return np.sort(order[:train_size]), np.sort(order[train_size:])
    if listing.reader.labels.ndim == 2:
        keys = listing.groups
        keys = listing.reader.keys(indices) if keys is None else keys[indices]
        return _split_groups(indices, keys, test_size, seed)
    if listing.groups is not None:
        found = _split_groups(indices, listing.groups[indices], test_size, seed)
        return _keep_classes(*found, listing)
    keys = listing.reader.keys(indices)
    if keys is None:
        order = np.random.default_rng(seed).permutation(len(indices))
    else:
        order = _shuffle(keys, seed)
    labels = listing.reader.labels[indices][order]
    # The position of an image in its class, from 0 to 1. The first images of all
    # classes are the test images, so each class contributes its share, rounded.
    place, counts = np.empty(len(order)), np.bincount(labels)
    by_class = np.argsort(labels, kind='stable')
    first = np.cumsum(counts) - counts
    place[by_class] = np.arange(len(order)) - first[labels[by_class]] + 0.5
    order = order[np.argsort(place / counts[labels], kind='stable')]
    test, train = order[:test_size], order[test_size:]
    labels = listing.reader.labels[indices]
    # If all images of a class are in the test part, its first image moves to training.
    classes, first = np.unique(labels[test], return_index=True)
    first = first[~np.isin(classes, labels[train])]
    train, test = np.append(train, test[first]), np.delete(test, first)
    return np.sort(indices[train]), np.sort(indices[test])


def _keep_classes(train, test, listing):
    """Moves one group back for each class without another training image."""
    labels, groups = listing.reader.labels, listing.groups
    for name in np.setdiff1d(labels[test], labels[train]):
        if name not in labels[train]:
            first = groups[test[labels[test] == name][0]]
            moved = groups[test] == first
            train, test = np.sort(np.append(train, test[moved])), test[~moved]
    return train, test


def _shuffle(keys, seed):
    """A random order; the order of two keys depends only on the seed and these keys."""
    salt = b'%d' % seed
    hashes = (hashlib.blake2b(key, digest_size=8, key=salt).digest() for key in keys)
    return np.argsort(np.frombuffer(b''.join(hashes), '>u8'), kind='stable')


def _split_groups(indices, groups, test_size, seed):
    """Splits off the number of groups that is closest to `test_size` images."""
    names, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = _shuffle([str(name).encode() for name in names], seed)
    taken = np.abs(np.cumsum(counts[order]) - test_size).argmin() + 1
    is_test = np.isin(numbers, order[: min(taken, len(names) - 1)])
    return indices[~is_test], indices[is_test]
