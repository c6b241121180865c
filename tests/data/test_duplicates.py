"""Copies of images: found by their content, kept out of the test, told of."""

import os
import shutil

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset, duplicates
from flax_densenet.train import fit
from helpers.runs import write_images


def load(folder, **fields):
    return dataset.load_source(f'folder:{folder}', **{'image_size': 8, **fields})


def names(part):
    return {os.path.relpath(part.name(i), part.name(i)[:1]) for i in range(len(part))}


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / 'photos', {'ants': 10, 'bees': 10}, size=(8, 8))


@pytest.fixture
def parts(tmp_path):
    """With a copy of two test images in training, one of them of another class."""
    root = tmp_path / 'parts'
    write_images(root / 'train', {'ants': 4, 'bees': 4}, size=(8, 8))
    write_images(root / 'val', {'ants': 3, 'bees': 3}, size=(8, 8), seed=1)
    shutil.copy(root / 'val/ants/001.jpg', root / 'train/ants/copy.jpg')
    shutil.copy(root / 'val/bees/002.jpg', root / 'train/ants/wrong.jpg')
    shutil.copy(root / 'train/bees/000.jpg', root / 'train/bees/again.jpg')
    return root


def write(folder, contents):
    paths = []
    for number, content in enumerate(contents):
        paths.append(str(folder / str(number)))
        if content is not None:
            (folder / str(number)).write_bytes(content)
    return paths


def test_what_is_the_same(tmp_path):
    big = bytearray(os.urandom(30_000))
    middle, start, end = bytes(big), bytearray(big), bytearray(big)
    big[15_000] ^= 1
    start[10] ^= 1
    end[-10] ^= 1
    contents = [middle, bytes(big), bytes(start), bytes(end), middle, b'', b'', None]
    contents += [b'a', b'b', b'a', middle + b' ', middle]
    paths = write(tmp_path, contents)
    every = range(len(paths))
    assert duplicates.find(paths, every) == [[0, 4, 12], [5, 6], [8, 10]]
    assert duplicates.find(paths, [1, 2, 4, 12]) == [[4, 12]]


def test_little_is_read_where_sizes_or_ends_differ(tmp_path, monkeypatch):
    """Of 300 files: those of one size at both ends, those of equal ends in whole."""
    contents = [bytes([i % 250]) * (20_000 + i // 3) for i in range(300)]
    contents += [b'x' * 50_000, b'x' * 25_000 + b'y' + b'x' * 24_999]
    paths, opened = write(tmp_path, contents), []
    for name in ('_ends', '_whole'):
        function = getattr(duplicates, name)
        monkeypatch.setattr(
            duplicates,
            name,
            lambda path, n=name, f=function: opened.append((n, path)) or f(path),
        )
    assert duplicates.find(paths, range(302)) == []
    assert sorted({n for n, _ in opened}) == ['_ends', '_whole']
    assert [path for n, path in opened if n == '_whole'] == paths[300:]
    opened.clear()
    assert duplicates.find(paths, range(0, 300, 3)) == [] and not opened


def test_a_test_image_in_training_is_told(parts, capsys):
    source = load(parts)
    assert (len(source.train), len(source.test)) == (11, 6)
    _, line = capsys.readouterr().out.splitlines()  # the first tells of the parts
    assert line == (
        f'2 training images are in the test as well ({parts}/train/ants/copy.jpg is '
        f'{parts}/val/ants/001.jpg): data.duplicates=drop leaves them out of training; '
        f'1 images are in several classes at once ({parts}/train/ants/wrong.jpg is '
        f'{parts}/val/bees/002.jpg)'
    )
    where = [entry.split('\t')[0] for entry in source.duplicates]
    assert where == [
        'training and test',
        'training and test, several classes',
        'training',
    ]
    assert source.duplicates[2].split('\t')[1:] == [
        f'{parts}/train/bees/000.jpg',
        f'{parts}/train/bees/again.jpg',
    ]


def test_drop_leaves_the_training_copies_out(parts, capsys):
    source = load(parts, duplicates='drop')
    assert (len(source.train), len(source.test)) == (9, 6)
    names = [source.train.name(i) for i in range(9)]
    assert not [n for n in names if n.endswith(('copy.jpg', 'wrong.jpg'))]
    assert 'they are left out of training' in capsys.readouterr().out


def test_ignore_does_not_look(parts, capsys, monkeypatch):
    monkeypatch.setattr(duplicates, 'find', None)
    source = load(parts, duplicates='ignore')
    assert (len(source.train), source.duplicates) == (11, ())
    assert len(capsys.readouterr().out.splitlines()) == 1  # of the parts


def test_a_split_of_ours_keeps_copies_together(folder, capsys):
    plain = load(folder)
    assert capsys.readouterr().out == ''
    sides = {}
    for number in range(10):
        shutil.copy(folder / f'ants/{number:03}.jpg', folder / f'ants/copy{number}.jpg')
    apart = load(folder, duplicates='ignore')
    for source in (apart, load(folder)):
        side = {}
        for name, part in (('train', source.train), ('test', source.test)):
            side |= {
                part.name(i).rsplit('/')[-1]: name
                for i in range(len(part))
                if '/ants/' in part.name(i)
            }
        together = [side[f'{n:03}.jpg'] == side[f'copy{n}.jpg'] for n in range(10)]
        sides[source] = together
    assert [all(together) for together in sides.values()] == [False, True]
    moved = list(sides.values())[0].count(False)
    assert f'{moved} copies of images went to the side' in capsys.readouterr().out
    assert len(source.train) + len(source.test) == 30 and len(plain.test) == 4
    bees = [
        {part.name(i) for i in range(len(part)) if '/bees/' in part.name(i)}
        for part in (apart.test, source.test)
    ]
    assert bees[0] == bees[1]  # what has no copy stays where it was


def test_all_are_copies(tmp_path):
    write_images(tmp_path, {'a': 1, 'b': 1}, size=(8, 8))
    for number in range(5):
        shutil.copy(tmp_path / 'a/000.jpg', tmp_path / f'a/{number}.jpg')
        shutil.copy(tmp_path / 'a/000.jpg', tmp_path / f'b/{number}.jpg')
    (tmp_path / 'b/000.jpg').unlink()
    with pytest.raises(UserError, match=r'too few \(copies of an image count as one\)'):
        load(tmp_path)


@pytest.mark.parametrize(
    ('source', 'value', 'message'),
    [
        ('digits', 'find', 'data.duplicates=find is not known; use report, drop'),
        ('digits', 'drop', 'data.duplicates=drop compares files and needs data.source'),
    ],
)
def test_bad_fields(source, value, message):
    with pytest.raises(UserError, match=message):
        dataset.load_source(source, duplicates=value)


def test_patients_stay_together(tmp_path, capsys):
    """A copy in another patient's images is told of and does not move."""
    write_images(tmp_path, {'x': 20}, size=(8, 8))
    table = tmp_path / 'labels.csv'
    lines = [f'{n:03}.jpg,{n // 4},{n % 2}' for n in range(20)]
    table.write_text('\n'.join(['image,patient,ill', *lines]))
    plain = load(tmp_path, labels=str(table))
    one = plain.train.name(0), plain.test.name(0)
    shutil.copy(*one)
    found = load(tmp_path, labels=str(table))
    assert found.test.indices.tolist() == plain.test.indices.tolist()
    assert '1 training images are in the test as well' in capsys.readouterr().out
    dropped = load(tmp_path, labels=str(table), duplicates='drop')
    assert len(dropped.train) == len(plain.train) - 1


def test_they_are_listed(tmp_path, capsys):
    path = tmp_path / 'duplicates.txt'
    fit._write_lines(path, ('training\ta\tb', 'test\tc\nd\te\udcff'))
    assert path.read_bytes() == b'training\ta\tb\ntest\tc\\nd\te\xff\n'


@pytest.mark.parametrize('count', [10, 3])
def test_one_image_of_each_class(count, tmp_path):
    folder = write_images(tmp_path, {str(n): 1 for n in range(count)}, size=(8, 8))
    with pytest.raises(UserError, match='0 to test on are too few; add images, or a f'):
        load(folder)


def test_a_class_of_one_image_trains(tmp_path):
    classes = {'a': 1, 'b': 1, 'c': 1, 'd': 2}
    folder = write_images(tmp_path, classes, size=(8, 8))
    for seed in range(8):
        source = load(folder, split_seed=seed, test_fraction=0.6)
        assert np.bincount(source.train.labels, minlength=4).tolist() == [1, 1, 1, 1]
        assert source.test.labels.tolist() == [3]
