"""Folds of cross-validation: divides the images into test parts.

The folds come from scikit-learn, with images or groups ordered by a hash of their
names. So they are a function of the names, the labels and `data.split_seed`: a single
fold can be trained anywhere, and if images are added, nearly all others stay in their
fold. (With groups of very different sizes, more of them can move.)

With several labels per image, an image counts as its rarest label.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence

import numpy as np

from flax_densenet.data import duplicates as duplicates_lib
from flax_densenet.data import notes, readers
from flax_densenet.errors import UserError, list_first

# With more images, reading labels one by one takes too long.
_MOST_LABELS = 20_000


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The chosen fold.

    Attributes:
      folds: number of folds.
      fold: the fold to test on, from 1. With 0 the training part is all folds, and the
        test part is that of the source, or empty.
      for_training: False if a model is to be evaluated; then nothing is checked.
    """

    folds: int
    fold: int
    for_training: bool = True


def choose(folds: int, fold: int, *, for_training: bool = True) -> Chosen:
    """Makes a `Chosen`; raises `UserError` for invalid values."""
    if folds < 0 or folds == 1:
        raise UserError(f'data.folds={folds} must be at least 2, or 0 for no folds')
    if not 0 <= fold <= folds:
        allowed = f'a fold from 1 to data.folds={folds}' if folds else 'data.folds'
        raise UserError(f'data.fold={fold} needs {allowed}')
    return Chosen(folds, fold, for_training)


def divide(
    listing: readers.Listing, chosen: Chosen, split_seed: int, duplicates: str
) -> duplicates_lib.Parts:
    """The training and test part of one fold, and the validation part of the source.

    A test part of the source is not in any fold.

    Args:
      split_seed, duplicates: see `dataset.load_source`.

    Raises:
      UserError: there are too few images or groups for so many folds.
    """
    folds, fold, for_training = chosen.folds, chosen.fold, chosen.for_training
    if split_seed < 0:
        raise UserError(f'data.split_seed={split_seed} must be 0 or above')
    own_test = np.zeros(0, np.int64) if listing.test is None else listing.test
    parts = duplicates_lib.Parts(listing.train, own_test, listing.val)
    copies = []
    if duplicates != 'ignore':
        every = np.concatenate(list(parts.indices.values()))
        copies = listing.reader.copies(every)
    if copies:
        parts = _resolve(listing, copies, parts.indices, duplicates)
    pool = parts.train
    if fold == 0:
        return parts
    labels = _read_labels(listing, pool)
    of_image = {int(index): place for place, index in enumerate(pool)}
    copies = [[index for index in group if index in of_image] for group in copies]
    copies = [group for group in copies if len(group) > 1]
    units = _Units(
        labels,
        keys=_keys(listing, pool),
        groups=None if listing.groups is None else listing.groups[pool],
        copies=[[of_image[index] for index in group] for group in copies],
    )
    if for_training:
        _check_counts(folds, units, listing.class_names)
    elif len(np.unique(units.owners)) < folds:
        return dataclasses.replace(parts, test=pool[:0])
    numbers = units.assign(folds, split_seed)
    if for_training:
        _check_classes(folds, numbers, labels, listing.class_names)
    held_out = numbers == fold - 1
    train, test = pool[~held_out], pool[held_out]
    if for_training:
        _say(listing, units, folds, fold, len(test), len(own_test))
    if not copies or listing.groups is None:  # they are in one fold
        return dataclasses.replace(parts, train=train, test=test)
    found = parts.indices | {'train': train, 'test': test}
    return _resolve(listing, copies, found, duplicates)


def _resolve(listing, copies, parts, duplicates):
    """The parts, with copies in several of them handled as in `data.duplicates`."""
    return duplicates_lib.resolve(
        copies,
        listing.reader.name,
        listing.reader.labels,
        parts,
        duplicates=duplicates,
        ours=(),
    )


def _keys(listing, pool):
    """Keys for the order: names, or positions in the data set."""
    keys = listing.reader.keys(pool)
    return [str(index).encode() for index in pool] if keys is None else keys


def _read_labels(listing, pool):
    """The labels of the images, or None if reading them takes too long."""
    if listing.reader.labels_in_memory or len(pool) <= _MOST_LABELS:
        return np.asarray(listing.reader.labels[pool])
    return None


class _Units:
    """Units that stay together: groups, copies of an image, or single images.

    Attributes:
      owners: int64 `[N]`, the unit of each image.
      strata: int64 `[N]`, the class that each image counts as.
    """

    def __init__(self, labels, *, keys, groups, copies):
        self.labels, self.has_groups = labels, groups is not None
        if groups is None:
            self.owners = np.arange(len(keys))
            for group in copies:
                self.owners[group] = group[0]
            self._names = {place: keys[place] for place in set(self.owners.tolist())}
        else:
            names, self.owners = np.unique(groups, return_inverse=True)
            self._names = {n: str(name).encode() for n, name in enumerate(names)}
        if labels is None:
            self.strata = np.zeros(len(keys), np.int64)
        elif labels.ndim == 2:
            self.strata = _find_rarest(labels)
        else:
            self.strata = labels.astype(np.int64)

    def assign(self, folds: int, seed: int) -> np.ndarray:
        """int64 `[N]`: the fold in which each image is held out, from 0."""
        from sklearn import model_selection  # 1 s

        salt = b'%d' % seed
        ordered = sorted(
            self._names,
            key=lambda n: hashlib.blake2b(
                self._names[n], digest_size=8, key=salt
            ).digest(),
        )
        place = np.zeros(max(ordered) + 1, np.int64)
        place[ordered] = np.arange(len(ordered))
        rank = place[self.owners]
        chosen = np.zeros(len(rank), np.int64)
        with warnings.catch_warnings():
            # Its warning about rare classes; the lines here are more specific.
            warnings.simplefilter('ignore', UserWarning)
            if self.has_groups:
                order = np.argsort(rank, kind='stable')
                splitter = model_selection.StratifiedGroupKFold(folds)
            else:  # one image represents all its copies
                order = np.array(ordered)
                splitter = model_selection.StratifiedKFold(folds)
            strata = self.strata[order]
            if np.bincount(strata).max() < folds:  # which both refuse
                strata = np.zeros_like(strata)
            parts = splitter.split(order, strata, rank[order])
            for number, (_, held_out) in enumerate(parts):
                chosen[order[held_out]] = number
        return chosen if self.has_groups else chosen[self.owners]


def _find_rarest(labels):
    """int64 `[N]`: the rarest label of each image, from 1; 0 for none."""
    positive = labels == 1
    counts = positive.sum(0)
    order = np.argsort(counts, kind='stable')
    first = positive[:, order].argmax(1)
    return np.where(positive.any(1), order[first] + 1, 0)


def _check_counts(folds: int, units: _Units, names: Sequence[str]):
    """Raises for more folds than groups, or than images of the rarest class."""
    what = 'groups' if units.has_groups else 'images'
    count = len(np.unique(units.owners))
    if count < 2:
        one = 'one group' if units.has_groups else 'one image, or copies of one'
        raise UserError(
            f'data.folds={folds}: the data has only {one}, which cannot be divided; '
            'add images'
        )
    if count < folds:
        raise UserError(
            f'data.folds={folds}: there are {count} {what}, fewer than folds; use '
            f'at most {count} folds'
        )
    if units.labels is None or units.labels.ndim == 2:
        return
    pairs = np.unique(np.stack([units.labels, units.owners]), axis=1)
    by_class = np.bincount(pairs[0], minlength=len(names))
    rarest = int(by_class.argmin())
    if by_class[rarest] >= folds:
        return
    has = f'has {by_class[rarest]} image{"" if by_class[rarest] == 1 else "s"}'
    if units.has_groups:
        has = f'is in {by_class[rarest]} of {count} groups'
    remedy = f'use --folds={by_class[rarest]} or add images'
    if by_class[rarest] < 2:
        remedy = 'add images, or leave the class out'
    raise UserError(
        f'data.folds={folds}: the class {names[rarest]} {has}, so it would be missing '
        f'from some folds; {remedy}'
    )


def _check_classes(folds, chosen, labels, names):
    """Reports classes and labels that are missing from a fold.

    Raises:
      UserError: a class has no training images left.
    """
    if labels is None:
        return
    present = labels == 1
    if labels.ndim == 1:
        present = labels[:, None] == np.arange(len(names))
    counts = np.stack([present[chosen == number].sum(0) for number in range(folds)])
    rest = counts.sum(0) - counts
    if labels.ndim == 1 and not rest.all():
        number, place = np.argwhere(rest == 0)[0]
        raise UserError(
            f'data.folds={folds}: all images of the class {names[place]} are in fold '
            f'{number + 1}, so none is left to train on; use another data.split_seed '
            'or fewer folds'
        )
    missing = np.flatnonzero((counts == 0).any(0))
    if len(missing):
        what = 'labels' if labels.ndim == 2 else 'classes'
        notes.say(
            f'data.folds={folds}: {len(missing)} of {len(names)} {what} are missing '
            f'from a fold ({list_first([names[i] for i in missing])}), so its own '
            'metrics lack them; the metrics of all folds together include them'
        )


def _say(listing, units, folds, fold, count, own_test):
    """The line that describes a fold."""
    total = len(units.owners)
    how = 'class'
    if units.labels is None:
        how = ''
    elif units.labels.ndim == 2:
        how = 'the rarest label of each image'
    line = f'data.folds={folds}: fold {fold} holds out {count} of {total} images'
    if units.has_groups:
        line += f', in complete groups (of {len(units._names)})'
    line += (
        f', stratified by {how}' if how else ', at random: labels are read one by one'
    )
    if listing.test is not None:
        line += f'; the {own_test} images of the test part are in no fold and are '
        line += 'not used for any choice'
    notes.say(line)
