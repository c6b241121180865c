"""Training, validation and test images of every kind of source, and their groups."""

import hashlib
import shutil
import tarfile

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset, identity, labeled_images, readers, splits
from flax_densenet.data.packed import manifest as manifest_lib
from helpers import packs
from helpers.runs import write_images


def load(source, **fields):
    return dataset.load_source(source, **{'image_size': 8, **fields})


def counts(source):
    return {name: len(part) for name, part in source.parts.items()}


def names(part):
    return {part.name(i) for i in range(len(part))}


@pytest.fixture
def three(tmp_path):
    for part, count in ('train', 5), ('val', 2), ('test', 3):
        write_images(
            tmp_path / 'set' / part, {'a': count, 'b': count}, size=(8, 8), seed=count
        )
    return tmp_path / 'set'


def test_a_pack_keeps_three_parts(three, tmp_path):
    made = packs.make(three, tmp_path / 'packed')
    assert '10 images to train on, 4 for validation and 6 to test on' in (
        manifest_lib.describe(made)
    )
    one, other = load(f'folder:{three}'), load(f'packed:{tmp_path}/packed')
    assert counts(one) == counts(other) == {'train': 10, 'val': 4, 'test': 6}
    for name, mine in one.parts.items():
        theirs = other.parts[name]
        assert {f'{three}/{text}' for text in names(theirs)} == names(mine)
        np.testing.assert_array_equal(mine[1]['image'], theirs[1]['image'])
    assert manifest_lib.load(str(tmp_path / 'packed')) == made
    text = (tmp_path / 'packed' / 'pack.json').read_text()
    assert '"version": 2' in text
    # Of two parts a pack is as it was.
    shutil.rmtree(three / 'val')
    packs.make(three, tmp_path / 'two')
    text = (tmp_path / 'two' / 'pack.json').read_text()
    assert '"version": 1' in text and '"val"' not in text


def test_a_part_that_is_split_off_for_validation(tmp_path):
    """The test part is the same with it; classes keep their shares."""
    write_images(tmp_path / 'x', {'a': 40, 'b': 20}, size=(8, 8))
    field = f'folder:{tmp_path}/x'
    two, three = load(field), load(field, val_fraction=0.25)
    assert two.val is None and two.selection is two.test
    assert counts(three) == {'train': 36, 'val': 12, 'test': 12}
    assert names(three.test) == names(two.test)
    assert names(three.train) | names(three.val) == names(two.train)
    assert np.bincount(three.val.labels).tolist() == [8, 4]
    again, other = (load(field, val_fraction=0.25, split_seed=s) for s in (0, 1))
    assert names(again.val) == names(three.val) != names(other.val)


def test_the_split_is_that_of_earlier_versions(tmp_path):
    """Else a run that goes on would be tested on training images."""
    found = load('digits').test.indices
    assert hashlib.sha256(found).hexdigest()[:16] == '4799f9744ac7d101'
    write_images(tmp_path / 'x', {'a': 40, 'b': 20}, size=(8, 8))
    found = ' '.join(sorted(n[-9:] for n in names(load(f'folder:{tmp_path}/x').test)))
    assert hashlib.sha256(found.encode()).hexdigest()[:16] == 'f458cab5a09ae8f2'


def test_a_given_test_part_stays(three):
    shutil.rmtree(three / 'test')
    source = load(f'folder:{three}', val_fraction=0.3)
    assert counts(source) == {'train': 7, 'val': 3, 'test': 4}
    assert all('/val/' in name for name in names(source.test))
    assert all('/train/' in name for name in names(source.val))


@pytest.mark.parametrize(
    ('fraction', 'message'),
    [
        (0.1, 'the source has a validation part of 4 images; set it to 0'),
        (1.0, 'must be 0 .none. or above, and below 1'),
        (-0.1, 'must be 0 .none. or above, and below 1'),
    ],
)
def test_wrong_fractions(fraction, message, three):
    with pytest.raises(UserError, match=f'data.val_fraction={fraction:g}.*{message}'):
        load(f'folder:{three}', val_fraction=fraction)


def test_too_few_images_for_validation(tmp_path):
    write_images(tmp_path, {'a': 2, 'b': 2}, size=(8, 8))
    with pytest.raises(UserError, match='are too few to split off a validation part'):
        load(f'folder:{tmp_path}', test_fraction=0.4, val_fraction=0.01)
    with pytest.raises(UserError, match='none to train on; lower data.val_fraction'):
        load(f'folder:{tmp_path}', val_fraction=0.99)


def test_copies_in_three_parts(three, capsys):
    for part, name in ('train', 'copy'), ('val', 'again'), ('val', 'too'):
        shutil.copy(three / 'test/a/000.jpg', three / part / 'a' / f'{name}.jpg')
    shutil.copy(three / 'val/b/000.jpg', three / 'train/b/same.jpg')
    source = load(f'folder:{three}')
    out = capsys.readouterr().out
    assert '2 training images are in the validation as well' in out
    assert '1 training images are in the test as well' in out
    assert '2 validation images are in the test as well' in out
    assert [line.split('\t')[0] for line in source.duplicates] == [
        'training and validation and test',
        'training and validation',
    ]
    source = load(f'folder:{three}', duplicates='drop')
    assert counts(source) == {'train': 10, 'val': 4, 'test': 6}


def test_copies_go_to_one_of_the_parts_that_are_split_off(tmp_path):
    write_images(tmp_path / 'x', {'a': 20, 'b': 20}, size=(8, 8))
    for i in range(20):
        shutil.copy(tmp_path / f'x/a/{i:03}.jpg', tmp_path / f'x/a/copy{i}.jpg')
    source = load(f'folder:{tmp_path}/x', val_fraction=0.3)
    where = {
        name.rsplit('/', 1)[1]: part
        for part, examples in source.parts.items()
        for name in names(examples)
        if '/a/' in name
    }
    assert set(where.values()) == {'train', 'val', 'test'}
    assert all(where[f'{i:03}.jpg'] == where[f'copy{i}.jpg'] for i in range(20))


def listing(labels, groups, **parts):
    images = np.zeros((len(labels), 1, 1, 3), np.uint8)
    reader = readers.ArrayReader(images, np.array(labels, np.int32))
    every = np.arange(len(labels))
    return readers.Listing(
        reader, ['a', 'b'], every, None, groups=np.array(groups), **parts
    )


def test_groups_stay_in_one_of_three_parts():
    found = splits.find_splits(
        listing([0, 1] * 60, np.arange(120) // 6),
        *(0.2, 0, 'ignore'),
        val_fraction=0.25,
    )
    groups = [set((part // 6).tolist()) for part in found.indices.values()]
    assert [len(part) for part in groups] == [12, 4, 4]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]


def test_a_class_of_one_group_is_trained_on():
    """Else the network has a class that it never saw."""
    labels = [0] * 18 + [1, 1]
    for seed in range(20):
        found = splits.find_splits(
            listing(labels, np.arange(20) // 2), 0.2, seed, 'ignore'
        )
        assert {18, 19} <= set(found.train.tolist()) and len(found.test)


def test_the_line_on_groups():
    groups = np.array([1, 1, 2, 2, 3])
    parts = {'train': np.array([0, 1]), 'test': np.array([2, 3, 4])}
    line = splits.describe_groups(groups, 'the column x', parts, str)
    assert line == (
        'grouped by the column x: 0 of 3 groups are on both sides; data.groups=none '
        'splits image by image'
    )
    parts = {'train': np.array([0]), 'val': np.array([1, 2]), 'test': np.array([3, 4])}
    line = splits.describe_groups(groups, 'the column x', parts, str)
    assert line == (
        'warning: grouped by the column x, 2 of 3 groups are in more than one part (0 '
        'and 1 are of one group), so the metrics are better than on new groups'
    )


def test_groups_of_a_folder_with_parts(tmp_path, capsys):
    for part, patients in ('train', range(4)), ('val', (4, 5)), ('test', (5, 6)):
        for name in 'ab':
            folders = {f'patient{i:05}': 2 for i in patients}
            write_images(tmp_path / part / name, folders, size=(8, 8))
    source = load(f'folder:{tmp_path}', duplicates='ignore')
    assert (
        "warning: grouped by 'patient00000' and the like in their paths, 1 of 7 groups "
        'are in more than one part'
    ) in capsys.readouterr().out
    assert len(set(source.train.groups)) == 4 == len(source.train.groups) / 4
    joined = labeled_images.join(*source.parts.values())
    assert len(set(joined.groups)) == 7 and len(joined.groups) == 32


def test_groups_of_a_pack(tmp_path, capsys):
    """Those that it keeps; else those that its names tell, unless it is not wanted."""
    folders = {f'patient{i:05}': 3 for i in range(5)}
    for name in 'ab':
        write_images(tmp_path / 'x' / name, folders, size=(8, 8))
    packs.make(tmp_path / 'x', tmp_path / 'packed')
    packed = load(f'packed:{tmp_path}/packed')
    assert 'grouped by the data that was packed: 0 of 5' in capsys.readouterr().out
    assert not set(packed.train.groups) & set(packed.test.groups)
    source = load(f'packed:{tmp_path}/packed', groups=r'path:patient(\d+)')
    assert "grouped by '00000' and" in capsys.readouterr().out
    assert len(set(source.train.groups)) == 4
    assert load(f'packed:{tmp_path}/packed', groups='none').train.groups is None
    with pytest.raises(UserError, match='a pack has no columns; it keeps the groups'):
        load(f'packed:{tmp_path}/packed', groups='column:x')


def test_a_checkpoint_knows_its_three_parts(three):
    """As does one of a version that knew of two: there val was called test."""
    source = load(f'folder:{three}')
    saved = {
        'data': {'source': source.name},
        'class_names': list(source.class_names),
        'identity': identity.describe(source),
        'images': identity.count(source),
    }
    assert identity.has_same_names(saved, source)
    assert identity.has_same_counts(saved['images'], source)
    assert identity.compare(saved, source) == identity.Relation(True)
    old = saved | {
        'identity': {k: v for k, v in saved['identity'].items() if k != 'test'},
        'images': {'train': 10, 'test': 4},
    }
    assert identity.has_same_names(old, source)
    assert identity.has_same_counts(old['images'], source)
    assert identity.compare(old, source) == identity.Relation(True)
    (three / 'test/a/000.jpg').rename(three / 'test/a/new.jpg')
    source = load(f'folder:{three}')
    assert identity.has_same_names(old, source)
    assert not identity.has_same_names(saved, source)
    (three / 'val/a/000.jpg').rename(three / 'val/a/new.jpg')
    assert not identity.has_same_names(old, load(f'folder:{three}'))


@pytest.mark.parametrize('kind', ['folder', 'table', 'tar', 'folders in a tar'])
def test_the_line_says_what_the_held_out_part_is_for(kind, three, tmp_path, capsys):
    shutil.rmtree(three / 'val')
    field, fields = f'folder:{three}', {}
    paths = sorted(three.rglob('*.jpg'))
    if kind == 'table':
        rows = [f'{p.relative_to(three)},{p.parts[-2]},{p.parts[-3]}' for p in paths]
        table = tmp_path / 'labels.csv'
        table.write_text('\n'.join(['image,class,split', *rows]))
        fields['labels'] = str(table)
    elif kind != 'folder':
        field = f'tar:{tmp_path}/tars'
        (tmp_path / 'tars').mkdir()
        for part in 'train', 'test':
            name = part if kind == 'tar' else 'all'
            with tarfile.open(tmp_path / 'tars' / f'{name}.tar', 'a') as tar:
                for path in paths:
                    if path.parts[-3] == part:
                        tar.add(path, f'{part}/{path.parts[-2]}_{path.name}')
                        label = path.with_suffix('.cls')
                        label.write_text(path.parts[-2])
                        tar.add(label, f'{part}/{label.parts[-2]}_{label.name}')
    said = []
    for more in {}, {'val_fraction': 0.3}, {'folds': 2}:
        load(field, **fields, **more)
        line = capsys.readouterr().out
        said.append(['best epoch' in line, 'measured once, at the end' in line])
    assert said == [[True, False], [False, True], [False, True]]
