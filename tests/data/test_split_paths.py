"""Parts in the paths of a table's images, and names that end like those of files."""

import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset
from helpers.runs import write_images


def load(tmp_path, names, heading='image,sick', cells=(), root='x', **options):
    rows = [f'{n},{i // 2 % 2}' for i, n in enumerate(names)]
    rows = [','.join([row, cells[i]]) if cells else row for i, row in enumerate(rows)]
    (tmp_path / 't.csv').write_text('\n'.join([heading, *rows]))
    return dataset.load_source(
        f'folder:{tmp_path}/{root}',
        labels=f'{tmp_path}/t.csv',
        image_size=8,
        **options,
    )


def sizes(source):
    return {name: len(part) for name, part in source.parts.items()}


@pytest.fixture
def parted(tmp_path):
    """Eight images in train and four each in valid and test."""
    counts = {'train': 8, 'valid': 4, 'test': 4}
    write_images(tmp_path / 'x', counts, size=(8, 8))
    return [f'{part}/{i:03}.jpg' for part in counts for i in range(counts[part])]


@pytest.mark.parametrize('before', ['', 'CheXpert/', './', 'C:\\data\\'])
def test_folders_of_parts_are_the_split(before, parted, tmp_path, capsys):
    source = load(tmp_path, [before + name for name in parted])
    assert sizes(source) == {'train': 8, 'val': 4, 'test': 4}
    assert {source.test.name(i).split('/')[-2] for i in range(4)} == {'test'}
    assert (
        'the folders train, valid, test in the paths of its images are taken as the '
        'split: 8 images to train on; 4 of val, which chooses the best epoch; 4 of '
        'test, which is measured once, at the end; data.split=none takes none'
    ) in capsys.readouterr().out


def test_folders_of_parts_can_be_passed_over(parted, tmp_path, capsys):
    source = load(tmp_path, parted, split='none')
    assert sizes(source)['train'] == 12 and source.val is None
    assert 'are taken as the split' not in capsys.readouterr().out


def test_a_column_of_parts_comes_first(parted, tmp_path, capsys):
    cells = ['train' if i % 2 else 'val' for i in range(len(parted))]
    assert sizes(load(tmp_path, parted, 'image,sick,split', cells))['train'] == 8
    cells = [('train', 'test', 'excluded')[i % 3] for i in range(len(parted))]
    capsys.readouterr()
    assert sizes(load(tmp_path, parted, 'image,sick,role', cells))['test'] == 4
    out = capsys.readouterr().out
    assert 'the column role looks like a split' in out
    assert 'at random' not in out  # as the folders are the parts


def test_files_tell_the_parts_of_names_without_folders(tmp_path):
    write_images(tmp_path / 'x' / 'train', {'a': 6}, size=(8, 8))
    write_images(tmp_path / 'x' / 'test', {'b': 3}, size=(8, 8))
    for i, path in enumerate(sorted((tmp_path / 'x/test/b').iterdir())):
        path.rename(path.with_name(f't{i}.jpg'))
    names = [f'{i:03}.jpg' for i in range(6)] + [f't{i}.jpg' for i in range(3)]
    assert sizes(load(tmp_path, names)) == {'train': 6, 'test': 3}


def test_parts_that_are_not_used_are_left_out(tmp_path, capsys):
    write_images(tmp_path / 'x', {'train': 6, 'val': 3, 'predict': 2}, size=(8, 8))
    names = [f'train/{i:03}.jpg' for i in range(6)]
    names += [f'val/{i:03}.jpg' for i in range(3)]
    names += [f'predict/{i:03}.jpg' for i in range(2)]
    assert sizes(load(tmp_path, names)) == {'train': 6, 'test': 3}
    out = capsys.readouterr().out
    assert '2 of other parts, left out' in out and '(sick) of 9 images' in out


@pytest.mark.parametrize(
    ('third', 'why'),
    [('more/', 'more is not a part'), ('', 'some are outside of them')],
)
def test_folders_that_are_partly_parts(third, why, tmp_path, capsys):
    folders = ['train', 'test', third or 'z']
    write_images(tmp_path / 'x', dict.fromkeys(folders, 4), size=(8, 8))
    if not third:
        for i in range(4):
            (tmp_path / f'x/z/{i:03}.jpg').rename(tmp_path / f'x/z{i}.jpg')
    last = [f'{third}{i:03}.jpg' if third else f'z{i}.jpg' for i in range(4)]
    names = [f'{f}/{i:03}.jpg' for f in folders[:2] for i in range(4)] + last
    assert not load(tmp_path, names).has_test
    assert (
        f'the folders train, test in the paths of its images look like parts, but {why}'
        ', so they are not used, and a part is split off at random; to use them, add'
    ) in capsys.readouterr().out


def test_classes_of_parts(tmp_path, capsys):
    for name in ('cat', 'dog'):
        write_images(tmp_path / 'x' / name, {'train': 4, 'test': 2}, size=(8, 8))
    names = [f'{c}/train/{i:03}.jpg' for c in ('cat', 'dog') for i in range(4)]
    names += [f'{c}/test/{i:03}.jpg' for c in ('cat', 'dog') for i in range(2)]
    load(tmp_path, names, duplicates='ignore')
    assert 'look like parts, but they are not the first' in capsys.readouterr().out


def test_folders_of_other_names_say_nothing(tmp_path, capsys):
    write_images(tmp_path / 'x', {'train': 4, 'bus': 4}, size=(8, 8))
    load(tmp_path, [f'{f}/{i:03}.jpg' for f in ('train', 'bus') for i in range(4)])
    out = capsys.readouterr().out
    assert 'look like' not in out and 'taken as the split' not in out


def test_a_path_below_the_folder_names_one_file(tmp_path):
    write_images(tmp_path, {'x': 6, 'x/thumbs': 6}, size=(8, 8))
    source = load(tmp_path, [f'{i:03}.jpg' for i in range(6)], duplicates='ignore')
    names = [part.name(i) for part in source.parts.values() for i in range(len(part))]
    assert len(names) == 6 and not any('thumbs' in name for name in names)
    # Below two folders, the name alone still has two meanings.
    write_images(tmp_path / 'y', {'a': 2, 'b': 2}, size=(8, 8))
    with pytest.raises(UserError, match='000.jpg is in several folders; name it'):
        load(tmp_path, ['000.jpg', '001.jpg'], root='y')


def test_paths_of_another_computer_by_their_ends(tmp_path, capsys):
    write_images(tmp_path, {'x': 6}, size=(8, 8))
    names = [f'C:\\Users\\me\\{"ab"[i % 2]}\\{i:03}.jpg' for i in range(6)]
    assert sum(sizes(load(tmp_path, names)).values()) == 6
    assert 'each by the longest end of its path' in capsys.readouterr().out
    # Two rows for one file are not guessed.
    names[1] = 'C:\\Users\\me\\b\\000.jpg'
    with pytest.raises(UserError, match='2 of its 6 images are not in'):
        load(tmp_path, names)
    # Nor is a name of two files, if no folder tells them apart.
    write_images(tmp_path / 'x', {'more': 6}, size=(8, 8))
    names[1] = 'C:\\Users\\me\\b\\001.jpg'
    with pytest.raises(UserError, match='images are not in|is in several folders'):
        load(tmp_path, names)


def test_an_image_that_is_missing_is_not_taken_from_another_folder(tmp_path):
    write_images(tmp_path / 'x', {'a': 3, 'b': 4}, size=(8, 8))
    names = ['r/a/000.jpg', 'r/a/001.jpg', 'r/a/003.jpg', 'r/b/000.jpg']
    with pytest.raises(UserError, match='1 of its 4 images are .* is r/a/003.jpg'):
        load(tmp_path, names)


def test_an_empty_cell_of_an_image(tmp_path):
    write_images(tmp_path, {'x': 6}, size=(8, 8))
    with pytest.raises(UserError, match='line 4: the image cell is empty; name the'):
        load(tmp_path, ['000.jpg', '001.jpg', '', '003.jpg', ''])
