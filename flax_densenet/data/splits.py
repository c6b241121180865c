"""Divides the images of a source into those to train on and those to test on."""

import hashlib

import numpy as np

from flax_densenet.data import duplicates as duplicates_lib
from flax_densenet.data import readers
from flax_densenet.errors import UserError


def find_splits(
    found: readers.Listing, test_fraction: float, split_seed: int, duplicates: str
) -> duplicates_lib.Parts:
    """Training and test part, the copies among them seen to.

    Args:
      found: what a source has; without a test part one is split off.
      test_fraction, split_seed, duplicates: as of `dataset.load_source`.

    Raises:
      UserError: a negative seed.
    """
    train, test = found.train, found.test
    if test is None:
        train, test = _split(found, test_fraction, split_seed)
    groups, every = [], np.concatenate([train, test])
    if duplicates != 'ignore':
        groups = found.reader.copies(every)
    if not groups:
        return duplicates_lib.Parts(train, test)
    return duplicates_lib.resolve(
        groups,
        found.reader.name,
        found.reader.labels,
        train,
        test,
        duplicates=duplicates,
        # A patient's images stay together, which the copies of one might undo.
        ours=found.test is None and found.groups is None,
    )


def _split(found, test_fraction, seed):
    """A seeded random split, even over the classes; groups stay together.

    Files are drawn by a hash of their names: where one goes or comes later, the others
    stay on their side, but for one or two at the edge.
    """
    if seed < 0:
        raise UserError(f'data.split_seed={seed} must be 0 or above')
    train_size = int(len(found.train) * (1 - test_fraction))
    test_size = len(found.train) - train_size
    if not train_size or not test_size:
        return found.train[:train_size], found.train[train_size:]
    if not found.reader.labels_in_memory:  # they would have to be read one by one
        order = np.random.default_rng(seed).permutation(found.train)
        return np.sort(order[:train_size]), np.sort(order[train_size:])
    if found.reader.labels.ndim == 2:
        groups = found.groups
        keys = found.reader.keys(found.train) if groups is None else groups[found.train]
        return _split_groups(found.train, keys, test_size, seed)
    if found.groups is not None:
        return _split_groups(found.train, found.groups[found.train], test_size, seed)
    keys = found.reader.keys(found.train)
    if keys is None:
        order = np.random.default_rng(seed).permutation(len(found.train))
    else:
        order = _shuffle(keys, seed)
    labels = found.reader.labels[found.train][order]
    # An image's place in its class, from 0 to 1: the first ones of all classes are the
    # test images, so each class gives its share, rounded.
    place, counts = np.empty(len(order)), np.bincount(labels)
    by_class = np.argsort(labels, kind='stable')
    first = np.cumsum(counts) - counts
    place[by_class] = np.arange(len(order)) - first[labels[by_class]] + 0.5
    order = order[np.argsort(place / counts[labels], kind='stable')]
    test, train = order[:test_size], order[test_size:]
    labels = found.reader.labels[found.train]
    # A class that only the test would have gives its first image there to training.
    classes, first = np.unique(labels[test], return_index=True)
    first = first[~np.isin(classes, labels[train])]
    train, test = np.append(train, test[first]), np.delete(test, first)
    return np.sort(found.train[train]), np.sort(found.train[test])


def _shuffle(keys, seed):
    """An order that depends on the seed and, of each two keys, on these alone."""
    salt = b'%d' % seed
    hashes = (hashlib.blake2b(key, digest_size=8, key=salt).digest() for key in keys)
    return np.argsort(np.frombuffer(b''.join(hashes), '>u8'), kind='stable')


def _split_groups(indices, groups, test_size, seed):
    """As many whole groups as come closest to `test_size` images, the rest."""
    names, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = _shuffle([str(name).encode() for name in names], seed)
    taken = np.abs(np.cumsum(counts[order]) - test_size).argmin() + 1
    is_test = np.isin(numbers, order[: min(taken, len(names) - 1)])
    return indices[~is_test], indices[is_test]
