"""Folders as they are found: links, rights, hidden things, names of any bytes."""

import io
import json
import os
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from flax_densenet import UserError, settings
from flax_densenet.cli import command_line
from flax_densenet.cli import main as cli
from flax_densenet.data import dataset, listing, sources
from flax_densenet.errors import printable
from flax_densenet.train import fit, prepare
from flax_densenet.weights import transfer
from helpers.paths import ROOT
from helpers.runs import tiny_config, train_with_pages, write_images


def load(folder, **fields):
    return dataset.load_source(f'folder:{folder}', **{'image_size': 8, **fields})


def names(source):
    parts = (source.train, source.test)
    return sorted(part.name(i) for part in parts for i in range(len(part)))


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / 'photos', {'ants': 5, 'bees': 5}, size=(8, 8))


def test_links_end_and_stay_in_their_class(folder, tmp_path):
    before = names(load(folder))
    (folder / 'ants' / 'up').symlink_to(folder)  # would make bees ants
    (folder / 'ants' / 'self').symlink_to(folder / 'ants')
    (folder / 'ants' / 'a').symlink_to(folder / 'ants' / 'b')
    (folder / 'ants' / 'b').symlink_to(folder / 'ants' / 'a')
    (folder / 'all').symlink_to(folder)  # no class
    (folder / 'none').symlink_to(folder / 'none')
    assert names(load(folder)) == before
    elsewhere = write_images(tmp_path / 'disk', {'wasps': 3, 'more': 2}, size=(8, 8))
    (folder / 'wasps').symlink_to(elsewhere / 'wasps')
    (folder / 'bees' / 'more').symlink_to(elsewhere / 'more')
    (folder / 'bees' / 'again').symlink_to(elsewhere / 'more')
    (elsewhere / 'wasps' / 'up').symlink_to(elsewhere)
    (elsewhere / 'wasps' / 'back').symlink_to(folder)
    source = load(folder)
    assert source.class_names == ('ants', 'bees', 'wasps')
    labels = np.concatenate([source.train.labels, source.test.labels])
    assert np.bincount(labels).tolist() == [5, 7, 3]


def test_links_to_files(folder):
    (folder / 'ants' / 'link.jpg').symlink_to(folder / 'ants' / '000.jpg')
    assert len(names(load(folder))) == 11
    (folder / 'ants' / 'lost.jpg').symlink_to(folder / 'nowhere')
    with pytest.raises(UserError, match='lost.jpg is not there: fix or remove it'):
        load(folder)
    source = load(folder, bad_images='skip')
    assert source.skipped == (f'{folder}/ants/lost.jpg is not there',)


def test_hidden_things_and_what_systems_leave(folder):
    before = names(load(folder))
    image = (folder / 'ants' / '000.jpg').read_bytes()
    for name in ('__MACOSX', '.ipynb_checkpoints', '@eaDir', '.git'):
        for place in (folder, folder / 'ants'):
            (place / name).mkdir()
            (place / name / 'x.jpg').write_bytes(image)
    for name in ('.DS_Store', 'Thumbs.db', 'desktop.ini', '._000.jpg', '.x.jpg'):
        (folder / 'ants' / name).write_bytes(image)
        (folder / name).write_bytes(image)
    assert names(load(folder)) == before


@pytest.mark.parametrize('place', ['', 'bees', 'bees/more'])
def test_a_folder_that_must_not_be_read(folder, place, monkeypatch):
    """Root may read all, hence the fake; the system's own word is passed on."""
    (folder / 'bees' / 'more').mkdir()
    closed, scan = str(folder / place).rstrip('/'), os.scandir

    def scandir(path):
        if path == closed:
            raise PermissionError(13, 'Permission denied', path)
        return scan(path)

    monkeypatch.setattr(listing.os, 'scandir', scandir)
    message = f'^{closed}: the folder cannot be read .Permission denied.; make it'
    with pytest.raises(UserError, match=message):
        load(folder, bad_images='skip')


def test_a_class_whose_images_are_all_bad(folder):
    for path in (folder / 'bees').iterdir():
        path.write_bytes(b'')
    with pytest.raises(UserError, match='no image of the folder bees can be read'):
        load(folder, bad_images='skip')


def test_a_class_that_is_not_tested(tmp_path):
    write_images(tmp_path / 'train', {'a': 2, 'b': 2, 'c': 2}, size=(8, 8))
    write_images(tmp_path / 'val', {'a': 1, 'c': 0}, size=(8, 8))
    source = load(tmp_path)
    assert (len(source.train), len(source.test)) == (6, 1)


# Spaces, quotes, a line end, an escape sequence, a comma, other scripts, combining
# marks, not UTF-8, and what could be taken for a flag or a pattern.
NAMES = (
    *(
        b'a b',
        b'"quoted" \'name\'',
        b'two\nlines',
        b'\x1b[31mred',
        b'a,b;c',
        b'-x *?[1]',
    ),
    *('größe'.encode(), '蚂蚁'.encode(), 'نملة'.encode(), 'e\u0301'.encode()),
    b'latin \xe9\xff',
)


@pytest.fixture
def strange_folder(tmp_path):
    """Classes and files of such names; one file of the last class is cut short."""
    root = tmp_path / 'photos'
    write_images(root, {'x': 3}, size=(8, 8))
    pixels = iter(np.random.default_rng(1).integers(0, 256, (99, 8, 8, 3), np.uint8))
    for name in NAMES:
        os.mkdir(os.fsencode(root) + b'/' + name)
        for number in range(2):
            path = os.fsencode(root) + b'/' + name + b'/%d ' % number + name + b'.jpg'
            Image.fromarray(next(pixels)).save(os.fsdecode(path))
    os.truncate(path, 300)
    return root


def test_printable():
    shown = [printable(os.fsdecode(name)) for name in NAMES]
    assert shown[2:4] == [r'two\nlines', r'\x1b[31mred']
    assert shown[-1] == r'latin \xe9\xff'
    assert shown[:2] + shown[4:-1] == [
        name.decode() for name in NAMES[:2] + NAMES[4:-1]
    ]


def test_class_names_of_any_bytes(strange_folder):
    made = transfer.resolve(settings.from_config(tiny_config()), None)
    source = load(strange_folder, bad_images='skip')
    expected = sorted(printable(os.fsdecode(name)) for name in (*NAMES, b'x'))
    assert sorted(source.class_names) == expected
    saved = json.dumps(prepare.make_metadata(made, source), ensure_ascii=False)
    assert sorted(json.loads(saved.encode())['class_names']) == expected


@pytest.mark.exhaustive
@pytest.mark.slow
def test_names_of_any_bytes(strange_folder, tmp_path, capsys):
    """From the folder through all of a run's files."""
    config = tiny_config(
        **{
            'data.source': f'folder:{strange_folder}',
            'data.batch_size': 4,
            'data.bad_images': 'skip',
            'data.test_fraction': 0.5,
            'train.epochs': 1,
            'train.report': True,
            'train.tensorboard': True,
        }
    )
    run = tmp_path / 'run'
    train_with_pages(config, run)
    skipped = (run / 'skipped_images.txt').read_bytes()
    assert skipped.count(b'\n') == 1
    path, _, reason = skipped.partition(b' cannot be decoded')
    assert os.path.getsize(path) == 300 and reason.startswith(b' (')
    assert 'skipped 1 bad images' in capsys.readouterr().out
    page = (run / 'report.html').read_text(encoding='utf-8')
    assert 'two\\nlines' in page and '蚂蚁' in page and r'\xe9' in page


def test_a_name_of_two_lines_in_the_list(folder, tmp_path):
    bad = folder / 'ants' / 'two\nlines.jpg'
    bad.write_bytes(b'')
    source = load(folder, bad_images='skip')
    fit._write_lines(tmp_path / 'list', source.skipped)
    [line] = (tmp_path / 'list').read_text().splitlines()
    assert line.startswith(f'{folder}/ants/two\\nlines.jpg is not an image')


def test_the_line_of_an_error_is_one_line(strange_folder, monkeypatch, capsys):
    def parse(*_):
        load(strange_folder)

    monkeypatch.setattr(command_line, 'parse', parse)
    assert cli.main(['launch.py']) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and r'latin \xe9\xff' in error


def test_output_of_any_name(monkeypatch):
    """What prints a raw name, in a terminal of UTF-8 or less, does not end the run."""
    for encoding in ('utf-8', 'ascii'):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, 'stdout', stream)
        monkeypatch.setattr(sys, 'stderr', io.StringIO())
        assert cli.main(['launch.py', 'nonsense']) == 2
        print('größe \udcff', file=stream)
        assert stream.flush() is None


WORKERS = """
import sys
from absl import flags
from flax_densenet.data import dataset, pipeline
if __name__ == '__main__':
    flags.FLAGS(sys.argv[:1])
    photos = 'folder:' + sys.argv[1]
    source = dataset.load_source(photos, image_size=8, bad_images='skip')
    found = []
    for workers in (0, 1):
        batches = pipeline.train_batches(
            source.train, batch_size=5, seed=0, bad_images='skip', balance='sampler',
            workers=workers)
        found.append([next(batches)['image'].tobytes() for _ in range(3)])
        batches.close()
    print(found[0] == found[1])
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_names_of_any_bytes_in_processes(strange_folder, tmp_path):
    """grain's worker processes get the paths, and give the batches of threads."""
    script = tmp_path / 'script.py'
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, script, strange_folder],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.stdout == 'True\n', done.stderr


@pytest.mark.slow
def test_many_files_are_checked_in_chunks(folder, monkeypatch):
    paths = [str(folder / 'ants' / '000.jpg')] * 1000
    paths[255] = str(folder / 'nowhere.jpg')  # the last of its chunk
    paths[999] = str(folder / 'nowhere else.jpg')
    found = listing.check_files(paths, 'skip')
    assert found == {255: 'is not there', 999: 'is not there'}
    with pytest.raises(UserError, match='nowhere.jpg is not there'):
        listing.check_files(paths, 'error')


@pytest.mark.exhaustive
@pytest.mark.slow
def test_many_files(tmp_path):
    """Listed and split in seconds, in little memory; links to one file."""
    write_images(tmp_path, {'0': 1, '1': 1}, size=(8, 8))
    for number in range(10_000):
        folder = tmp_path / str(number % 2)
        os.link(folder / '000.jpg', folder / f'{number}.jpg')
    start = time.process_time()
    files = sum(len(listing.image_files(str(tmp_path / c))) for c in '01')
    taken = time.process_time() - start
    start = time.process_time()
    walked = sum(len(files) for _, _, files in os.walk(tmp_path))
    reference = time.process_time() - start
    assert files == walked == 10_002
    assert taken < 20 * reference, (taken, reference)
    tracemalloc.start()
    found = sources.SOURCES['folder'](str(tmp_path), bad_images='error', labels='')
    assert tracemalloc.get_traced_memory()[0] < 250 * len(found.reader.paths)
    tracemalloc.stop()
