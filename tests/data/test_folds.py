"""Folds: each image is held out once, classes evenly, groups and copies together."""

import itertools
import shutil

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset, folds, readers
from helpers.runs import write_images
from helpers.sources import load


def listing_of(labels, *, groups=None, test=None):
    """A listing of images without names."""
    labels = np.asarray(labels)
    count = len(labels)
    classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    reader = readers.ArrayReader(np.zeros((count, 1, 1, 3), np.uint8), labels)
    train = np.setdiff1d(np.arange(count), () if test is None else test)
    names = [f'c{n}' for n in range(classes)]
    return readers.Listing(reader, names, train, test, groups=groups)


def find(listing, count, fold, *, seed=0):
    return folds.divide(listing, folds.Chosen(count, fold), seed, 'report')


def held_out(listing, count, **options):
    """The test parts of all folds."""
    parts = [find(listing, count, fold, **options) for fold in range(1, count + 1)]
    for part in parts:
        assert np.intersect1d(part.train, part.test).size == 0
        assert sorted([*part.train, *part.test]) == sorted(listing.train)
    return [part.test for part in parts]


def test_each_image_is_held_out_once_and_classes_evenly():
    labels = np.repeat([0, 1, 2], [50, 23, 7]).astype('i4')
    tests = held_out(listing_of(labels), 5)
    assert sorted(np.concatenate(tests)) == list(range(80))
    counts = np.stack([np.bincount(labels[test], minlength=3) for test in tests])
    assert (counts.max(0) - counts.min(0)).max() <= 1 and counts.min() >= 1
    other = held_out(listing_of(labels), 5, seed=1)
    assert any(set(a) != set(b) for a, b in zip(tests, other, strict=True))


def test_the_test_part_of_the_source_is_in_no_fold(capsys):
    labels = np.tile([0, 1], 20).astype('i4')
    own = np.arange(30, 40)
    tests = held_out(listing_of(labels, test=own), 3)
    assert sorted(np.concatenate(tests)) == list(range(30))
    assert '10 images of the test part are in no fold' in capsys.readouterr().out
    part = find(listing_of(labels, test=own), 3, 0)
    assert part.test.tolist() == own.tolist() and part.train.tolist() == [*range(30)]


def test_groups_stay_together(capsys):
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, 40, 200)) * 1000 + 7
    labels = rng.integers(0, 2, 200).astype('i4')
    tests = held_out(listing_of(labels, groups=groups), 4)
    for one, other in itertools.combinations(tests, 2):
        assert not set(groups[one]) & set(groups[other])
    assert sorted(np.concatenate(tests)) == list(range(200))
    shares = [labels[test].mean() for test in tests]
    assert max(shares) - min(shares) < 0.1 and min(map(len, tests)) > 40
    assert f'in complete groups (of {len(set(groups))})' in capsys.readouterr().out


@pytest.mark.parametrize('grouped', [False, True])
def test_several_labels_are_stratified_by_the_rarest(grouped, capsys):
    rng = np.random.default_rng(1)
    labels = (rng.random((300, 3)) < (0.5, 0.3, 0.05)).astype('f4')
    labels[5, 1] = np.nan
    groups = np.arange(300) // 2 if grouped else None
    tests = held_out(listing_of(labels, groups=groups), 5)
    rare = np.array([np.nansum(labels[test, 2]) for test in tests])
    assert rare.max() - rare.min() <= (2 if grouped else 1) and rare.sum() >= 10
    assert 'stratified by the rarest label of each image' in capsys.readouterr().out
    labels[:, 2] = 0
    labels[:2, 2] = 1
    find(listing_of(labels, groups=groups), 5, 1)
    assert '1 of 3 labels are missing from a fold (c2)' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('labels', 'groups', 'count', 'line'),
    [
        ([0, 1] * 4, None, 1, 'data.folds=1 must be at least 2'),
        ([0, 1] * 4, None, 9, 'there are 8 images, fewer than folds; use at most 8'),
        ([0] * 9 + [1] * 3, None, 4, 'the class c1 has 3 images, so it would be mi'),
        ([0] * 9 + [1], None, 4, 'the class c1 has 1 image, so .* leave the class'),
        ([0, 1] * 4, [0, 1, 2, 3] * 2, 5, 'there are 4 groups, fewer than folds'),
        ([0, 1] * 4, [3] * 8, 2, 'the data has only one group, which cannot be di'),
        ([0, 1] * 4, [0, 1, 2, 1] * 2, 3, 'class c1 is in 1 of 3 groups'),
    ],
)
def test_what_cannot_be_divided(labels, groups, count, line):
    groups = None if groups is None else np.array(groups)
    with pytest.raises(UserError, match=line):
        folds.choose(count, 1)
        find(listing_of(np.array(labels, 'i4'), groups=groups), count, 1)


def test_values_that_cannot_be(folder):
    for values in ({'folds': -1}, {'folds': 3, 'fold': 4}, {'fold': 1}):
        with pytest.raises(UserError, match=r'data\.fold'):
            load(folder, **values)


def names(source):
    return [source.test.name(i) for i in range(len(source.test))]


def test_added_images_leave_the_others(tmp_path):
    """Nearly all stay in their fold, wherever the folder is."""
    root = write_images(tmp_path / 'p', {'a': 60, 'b': 40}, size=(4, 4))
    before = [set(names(load(root, folds=4, fold=k))) for k in range(1, 5)]
    for number in range(3):
        shutil.copy(root / 'a' / '000.jpg', root / 'a' / f'new{number}.jpg')
    after = [
        set(names(load(root, folds=4, fold=k, duplicates='ignore')))
        for k in range(1, 5)
    ]
    stayed = sum(len(x & y) for x, y in zip(before, after, strict=True))
    assert stayed >= 90
    moved = root.rename(tmp_path / 'q')
    one = {name.replace('/q/', '/p/') for name in names(load(moved, folds=4, fold=2))}
    assert len(one & after[1]) > 20


def test_copies_of_an_image_are_in_one_fold(folder):
    for number in range(4):
        shutil.copy(folder / 'bees' / '001.jpg', folder / 'bees' / f'copy{number}.jpg')
    holding = []
    for fold in (1, 2, 3, 4):
        source = load(folder, folds=4, fold=fold)
        found = [n for n in names(source) if 'copy' in n or 'bees/001' in n]
        holding.append(len(found))
    assert sorted(holding) == [0, 0, 0, 5]


def test_a_source_of_folds(split_folder):
    """All folds together, with the source's own test part."""
    every = load(split_folder, folds=2)
    assert (len(every.train), len(every.test), every.has_test) == (11, 5, True)
    one, two = (load(split_folder, folds=2, fold=k) for k in (1, 2))
    assert not one.has_test and len(one.test) + len(two.test) == 11
    assert set(one.train.indices) == set(two.test.indices)


def test_an_evaluated_source_need_not_have_enough(folder):
    source = dataset.load_source(
        f'folder:{folder}', ['ants', 'bees', 'wasps'], folds=9, fold=1, image_size=8
    )
    assert len(source.test) >= 3
    source = dataset.load_source(
        f'folder:{folder}', ['ants', 'bees', 'wasps'], folds=31, fold=1, image_size=8
    )
    assert (len(source.train), len(source.test)) == (30, 0)


def test_validation_images_come_from_the_training_images_of_a_fold(folder):
    shutil.copy(folder / 'bees' / '001.jpg', folder / 'bees' / 'copy.jpg')
    tests = []
    for fold in (1, 2, 3):
        source = load(folder, folds=3, fold=fold, val_fraction=0.2)
        parts = [set(part.indices.tolist()) for part in source.parts.values()]
        assert [*source.parts] == ['train', 'val', 'test'] and len(parts[1]) in (4, 5)
        assert len(set.union(*parts)) == sum(map(len, parts)) == 31
        places = [
            name
            for name, part in source.parts.items()
            for n in range(len(part))
            if part.name(n).endswith(('bees/001.jpg', 'copy.jpg'))
        ]
        assert len(places) == 2 and len(set(places)) == 1
        tests.append(parts[2])
        alone = load(folder, folds=3, fold=fold).test.indices
        assert set(alone.tolist()) == parts[2]
    assert len(set.union(*tests)) == 31


def test_a_validation_part_of_the_source_chooses_in_all_folds(split_folder):
    write_images(split_folder / 'test', {'ants': 2, 'bees': 2}, seed=2)
    for fold in (1, 2):
        source = load(split_folder, folds=2, fold=fold)
        assert (len(source.val), len(source.train) + len(source.test)) == (5, 11)
    every = load(split_folder, folds=2)
    assert (len(every.train), len(every.val), len(every.test)) == (11, 5, 4)
    with pytest.raises(UserError, match='the source has a validation part of 5'):
        load(split_folder, folds=2, fold=1, val_fraction=0.1)
