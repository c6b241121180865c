"""Splits the images of a source into a training part and a test part."""

import hashlib

import numpy as np

from flax_densenet.data import duplicates as duplicates_lib
from flax_densenet.data import readers
from flax_densenet.errors import UserError


def find_splits(
    listing: readers.Listing, test_fraction: float, split_seed: int, duplicates: str
) -> duplicates_lib.Parts:
    """Finds the training and test part, and handles the copies among them.

    Args:
      listing: of the source; without a test part, one is split off.
      test_fraction, split_seed, duplicates: see `dataset.load_source`.

    Raises:
      UserError: a negative seed.
    """
    train, test = listing.train, listing.test
    if test is None:
        train, test = _split(listing, test_fraction, split_seed)
    groups, every = [], np.concatenate([train, test])
    if duplicates != 'ignore':
        groups = listing.reader.copies(every)
    if not groups:
        return duplicates_lib.Parts(train, test)
    return duplicates_lib.resolve(
        groups,
        listing.reader.name,
        listing.reader.labels,
        train,
        test,
        duplicates=duplicates,
        # Moving copies could separate the images of a patient.
        ours=listing.test is None and listing.groups is None,
    )


def _split(listing, test_fraction, seed):
    """A seeded random split, stratified by class; groups stay together.

    Files are ordered by a hash of their names: if one is added or removed later, the
    others stay in their part, except for one or two at the boundary.
    """
    if seed < 0:
        raise UserError(f'data.split_seed={seed} must be 0 or above')
    train_size = int(len(listing.train) * (1 - test_fraction))
    test_size = len(listing.train) - train_size
    if not train_size or not test_size:
        return listing.train[:train_size], listing.train[train_size:]
    if not listing.reader.labels_in_memory:  # they would have to be read one by one
        order = np.random.default_rng(seed).permutation(listing.train)
        return np.sort(order[:train_size]), np.sort(order[train_size:])
    if listing.reader.labels.ndim == 2:
        keys = listing.groups
        if keys is None:
            keys = listing.reader.keys(listing.train)
        else:
            keys = keys[listing.train]
        return _split_groups(listing.train, keys, test_size, seed)
    if listing.groups is not None:
        groups = listing.groups[listing.train]
        return _split_groups(listing.train, groups, test_size, seed)
    keys = listing.reader.keys(listing.train)
    if keys is None:
        order = np.random.default_rng(seed).permutation(len(listing.train))
    else:
        order = _shuffle(keys, seed)
    labels = listing.reader.labels[listing.train][order]
    # The place of an image in its class, from 0 to 1. The first ones of all classes are
    # the test images, so each class contributes its share, rounded.
    place, counts = np.empty(len(order)), np.bincount(labels)
    by_class = np.argsort(labels, kind='stable')
    first = np.cumsum(counts) - counts
    place[by_class] = np.arange(len(order)) - first[labels[by_class]] + 0.5
    order = order[np.argsort(place / counts[labels], kind='stable')]
    test, train = order[:test_size], order[test_size:]
    labels = listing.reader.labels[listing.train]
    # If all images of a class are in the test, its first image moves to training.
    classes, first = np.unique(labels[test], return_index=True)
    first = first[~np.isin(classes, labels[train])]
    train, test = np.append(train, test[first]), np.delete(test, first)
    return np.sort(listing.train[train]), np.sort(listing.train[test])


def _shuffle(keys, seed):
    """A random order; that of two keys depends only on the seed and on them."""
    salt = b'%d' % seed
    hashes = (hashlib.blake2b(key, digest_size=8, key=salt).digest() for key in keys)
    return np.argsort(np.frombuffer(b''.join(hashes), '>u8'), kind='stable')


def _split_groups(indices, groups, test_size, seed):
    """Splits off the number of groups that comes closest to `test_size` images."""
    names, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = _shuffle([str(name).encode() for name in names], seed)
    taken = np.abs(np.cumsum(counts[order]) - test_size).argmin() + 1
    is_test = np.isin(numbers, order[: min(taken, len(names) - 1)])
    return indices[~is_test], indices[is_test]
