"""Archives in place of folders, masks beside images, and lines on what is missing."""

import gzip
import shlex
import tarfile
import zipfile

import pytest

from flax_densenet import UserError
from flax_densenet.cli import arguments
from flax_densenet.data import dataset
from helpers.runs import write_images


@pytest.mark.parametrize(
    ('name', 'command'),
    [
        ('p.zip', 'unzip'),
        ('p.tar.gz', 'tar xzf'),
        ('my p.TGZ', 'tar xzf'),
        ('p.7z', '7z x'),
        ('p.tar', 'tar xf'),
    ],
)
def test_an_archive_is_to_be_unpacked(name, command, tmp_path):
    path = tmp_path / name
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('cat/a.png', '')
    told = f'is an archive; unpack it ({command} {shlex.quote(str(path))}) and name'
    with pytest.raises(UserError) as raised:
        dataset.load_source(f'folder:{path}')
    assert told in str(raised.value)
    if not name.endswith('.tar'):
        with pytest.raises(UserError) as raised:
            arguments.source(str(path))
        assert told in str(raised.value)
    with pytest.raises(UserError, match='there is no such folder'):
        dataset.load_source(f'folder:{tmp_path}/none.zip')


def test_compressed_tars_and_tables(tmp_path):
    write_images(tmp_path, {'x': 4}, size=(8, 8))
    path = tmp_path / 'p.tar.gz'
    with tarfile.open(path, 'w:gz') as file:
        file.add(tmp_path / 'x', 'x')
    with pytest.raises(UserError) as raised:
        dataset.load_source(f'tar:{path}')
    assert f'is compressed; decompress it (gunzip {path}) and name' in str(raised.value)
    path = tmp_path / 'q.csv.gz'
    path.write_bytes(gzip.compress(b'image,sick\n000.jpg,1\n'))
    with pytest.raises(UserError) as raised:
        dataset.load_source(f'folder:{tmp_path}/x', labels=str(path))
    assert f'is compressed; decompress it (gunzip {path}) and name' in str(raised.value)


def test_masks_beside_images_are_reported(tmp_path, capsys):
    counts = {'benign': 6, 'normal': 6}
    write_images(tmp_path / 'x', counts, size=(8, 8))
    dataset.load_source(f'folder:{tmp_path}/x', image_size=8)
    assert 'look like masks' not in capsys.readouterr().out
    for name in counts:
        for i in (1, 3, 5):
            old = tmp_path / f'x/{name}/{i:03}.jpg'
            old.rename(old.with_name(f'{i - 1:03}_mask{"_1" * (i == 3)}.jpg'))
    dataset.load_source(f'folder:{tmp_path}/x', image_size=8)
    out = capsys.readouterr().out
    assert 'warning: 6 images look like masks of others, such as ' in out
    assert '000_mask.jpg of 000.jpg, and are read as photos of their class; ' in out


def test_classes_without_test_images_are_named(tmp_path, capsys):
    write_images(tmp_path / 'x', {'a': 8, 'b': 8, 'c': 1}, size=(8, 8))
    dataset.load_source(f'folder:{tmp_path}/x', image_size=8)
    assert (
        'the test images that are split off have none of 1 of 3 classes (c), so nothing'
    ) in capsys.readouterr().out
    dataset.load_source(f'folder:{tmp_path}/x', image_size=8, test_fraction=0.5)
    write_images(tmp_path / 'y', {'a': 8, 'b': 8, 'c': 8}, size=(8, 8))
    capsys.readouterr()
    dataset.load_source(f'folder:{tmp_path}/y', image_size=8, val_fraction=0.2)
    assert 'split off have none' not in capsys.readouterr().out


def test_numbers_of_rows_are_not_those_of_images(tmp_path, capsys):
    write_images(tmp_path, {'x': 8}, size=(8, 8))
    rows = [f'{i:03}.jpg,{"cd"[i % 2]}' for i in range(10)]
    (tmp_path / 't.csv').write_text('\n'.join(['image,label', *rows]))
    dataset.load_source(
        f'folder:{tmp_path}/x',
        labels=f'{tmp_path}/t.csv',
        image_size=8,
        bad_images='skip',
    )
    out = capsys.readouterr().out
    assert 'of 8 images' in out
    assert 'the numbers above count all 10 rows; 2 of them have no image that' in out
