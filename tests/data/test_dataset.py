"""Sources, splits, and batches that are a function of the step."""

import os

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset, labeled_images, pipeline
from helpers.paths import shared
from helpers.runs import write_images
from helpers.sources import load, rows, take


def test_digits():
    source = dataset.load_source('digits')
    assert (len(source.train), len(source.test)) == (1437, 360)
    assert source.train[0]['image'].shape == (32, 32, 3)
    counts = np.bincount(source.test.labels)
    assert counts.min() >= 34 and counts.max() <= 37  # even over the classes


def test_split_of_a_folder(folder):
    source = load(folder)
    assert source.class_names == ('ants', 'bees', 'wasps')
    assert (len(source.train), len(source.test)) == (24, 6)
    assert np.bincount(source.test.labels).tolist() == [2, 3, 1]
    parts = [
        {part.name(i) for i in range(len(part))} for part in (source.train, source.test)
    ]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 30
    for i in range(len(source.test)):
        example = source.test[i]
        class_name = os.path.basename(os.path.dirname(source.test.name(i)))
        assert source.class_names[example['label']] == class_name
        # Each class has a color of its own (write_images).
        assert example['image'].mean((0, 1)).argmax() == example['label']
    same, other = load(folder), load(folder, split_seed=1)
    assert same.test.indices.tolist() == source.test.indices.tolist()
    assert other.test.indices.tolist() != source.test.indices.tolist()


def sides(source, root):
    """Files below the root -> whether they are tested."""
    parts = (source.train, False), (source.test, True)
    return {
        os.path.relpath(part.name(i), root): tested
        for part, tested in parts
        for i in range(len(part))
    }


def test_a_split_outlasts_its_files(tmp_path):
    """What goes, comes or moves does not send the test images into training."""
    root = write_images(tmp_path / 'p', {'a': 40, 'b': 60, 'c': 23}, size=(4, 4))
    before = sides(load(root), root)
    os.rename(root, tmp_path / 'q')
    for way_to_write_it in ('q', 'q/', './q'):
        assert sides(load(f'{tmp_path}/{way_to_write_it}'), tmp_path / 'q') == before
    for name in ('a/000.jpg', 'b/030.jpg', 'c/022.jpg'):
        (tmp_path / 'q' / name).unlink()
    after = sides(load(tmp_path / 'q'), tmp_path / 'q')
    assert len(after) == 120 and sum(after.values()) == 24
    assert sum(after[name] != before[name] for name in after) <= 3


def test_split_with_one_image_of_a_class(tmp_path):
    source = load(write_images(tmp_path / 'p', {'a': 9, 'b': 1}))
    assert (len(source.train), len(source.test)) == (8, 2)


def test_folder_with_parts(split_folder):
    source = load(split_folder)
    assert (len(source.train), len(source.test)) == (11, 5)
    assert source.has_test
    names = [source.test.name(i) for i in range(5)]
    assert all('/val/' in name for name in names)


def test_what_is_in_the_folders(folder):
    (folder / 'ants' / '.DS_Store').write_bytes(b'x')
    (folder / 'ants' / 'notes.txt').write_text('x')
    (folder / '.git').mkdir()
    (folder / '__MACOSX').mkdir()
    deeper = folder / 'bees' / 'more'
    deeper.mkdir()
    (folder / 'bees' / '000.jpg').rename(deeper / 'a b.JPG')
    (deeper / 'loop').symlink_to(folder / 'bees')
    source = load(folder)
    assert source.class_names == ('ants', 'bees', 'wasps')
    assert len(source.train) + len(source.test) == 30


@pytest.mark.parametrize(
    ('prepare', 'message'),
    [
        (lambda p: None, 'there is no such folder'),
        (lambda p: p.mkdir(), 'no class folders'),
        (lambda p: write_images(p, {'a': 3}), r'only one class \(a\)'),
        (lambda p: write_images(p, {'a': 3, 'b': 0}), 'the folder b holds no images'),
        (lambda p: write_images(p, {'a': 1, 'b': 0}), 'the folder b holds no images'),
        (
            lambda p: (
                write_images(p / 'train', {'a': 1, 'b': 1}),
                write_images(p / 'val', {'a': 1, 'c': 1}),
            ),
            'class c is in val but not in train',
        ),
        (
            lambda p: (
                write_images(p / 'train', {'a': 1, 'b': 1}),
                write_images(p / 'test', {'a': 0}),
            ),
            'the folder test holds no images',
        ),
    ],
)
def test_bad_folders(prepare, message, tmp_path):
    prepare(tmp_path / 'photos')
    with pytest.raises(UserError, match=message):
        load(tmp_path / 'photos')


@pytest.mark.parametrize(
    ('source', 'fields', 'message'),
    [
        ('cifar', {}, 'use digits, folder:PATH, packed:DIR, tar:PATH, parquet'),
        ('digits:big', {}, 'digits takes no name'),
        ('folder:', {}, 'there is no such folder'),
        ('tfds:no_such_set', {}, 'TFDS has no such set'),
        ('digits', {'resize': 'pad'}, 'data.resize=pad is not known'),
        ('digits', {'bad_images': 'x'}, 'data.bad_images=x is not known'),
        ('digits', {'cache': 'disk'}, 'data.cache=disk is not known'),
        ('digits', {'image_size': -1}, 'data.image_size=-1'),
        ('digits', {'test_fraction': 1.0}, 'data.test_fraction=1.0'),
        (
            'digits',
            {'cache': 'memory', 'image_size': 512, 'cache_limit_gib': 1.0},
            '1797 images of 512x512 take 1.32 GiB',
        ),
    ],
)
def test_bad_fields(source, fields, message):
    with pytest.raises(UserError, match=message):
        dataset.load_source(source, **fields)


def test_bad_images(folder):
    whole = (folder / 'bees' / '003.jpg').read_bytes()
    (folder / 'bees' / '003.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / 'ants' / '004.jpg').write_text('not an image')
    with pytest.raises(UserError, match='ants/004.jpg is not an image.*skip'):
        load(folder)
    source = load(folder, bad_images='skip')
    assert len(source.train) + len(source.test) == 28
    assert [line.split('/')[-1][:7] for line in source.skipped] == [
        '004.jpg',
        '003.jpg',
    ]
    assert len(rows(take(pipeline.eval_batches(source.train, batch_size=4), 99)))


def test_a_bad_image_met_later_is_named(folder):
    source = load(folder)
    path = source.train.name(7)
    os.truncate(path, 200)
    with pytest.raises(UserError, match=f'{path} cannot be decoded.*bad_images=skip'):
        take(pipeline.train_batches(source.train, batch_size=8, seed=0), 9)


def test_relabeled_and_joined(folder):
    source = load(folder)
    renamed = labeled_images.Relabeled(source.train, [5, 7, 9], 10)
    assert set(renamed.labels) == {5, 7, 9}
    assert [renamed[i]['label'] for i in range(24)] == renamed.labels.tolist()
    everything = labeled_images.join(source.train, source.test)
    assert sorted(everything.indices) == list(range(30))


def test_hymenoptera():
    source = dataset.load_source(f'folder:{shared("data/hymenoptera")}', image_size=32)
    assert (len(source.train), len(source.test)) == (245, 153)
    assert source.class_names == ('ants', 'bees')
    batches = take(pipeline.eval_batches(source.train, batch_size=50), 99)
    assert sum(batch['mask'].sum() for batch in batches) == 245
