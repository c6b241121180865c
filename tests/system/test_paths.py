"""Paths as people write them lead to one place, everywhere."""

import csv
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from flax_densenet.cli import arguments, main, recipes
from flax_densenet.data import dataset, label_table, tfds_source
from flax_densenet.errors import UserError
from flax_densenet.inference import input_files
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.report import compare
from flax_densenet.system import paths
from flax_densenet.weights import heads, weight_file


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with photos; the working folder is another."""
    home, here = tmp_path / 'home', tmp_path / 'here'
    here.mkdir()
    for name in ('a', 'b'):
        folder = home / 'photos' / name
        folder.mkdir(parents=True)
        for i in range(3):
            pixels = np.full((8, 8, 3), 20 * i + len(name), np.uint8)
            Image.fromarray(pixels).save(folder / f'{i}.png')
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setenv('PHOTOS', str(home / 'photos'))
    monkeypatch.setenv('TILDE', '~')
    monkeypatch.delenv('NOWHERE', raising=False)
    monkeypatch.chdir(here)
    return home


SPELLINGS = (
    '~/photos',
    '$HOME/photos',
    '${HOME}/photos',
    '$PHOTOS',
    '$PHOTOS/',
    '$TILDE/photos',
    '~/photos/../photos',
    '../home/photos',
    'file://{home}/photos',
    'file://localhost{home}/photos',
    'FILE:{home}/photos',
)


@pytest.mark.parametrize('text', SPELLINGS)
def test_one_place(home, text):
    text = text.replace('{home}', str(home))
    found = paths.resolve(text, '--out=')
    assert os.path.realpath(found) == str(home / 'photos')
    source = dataset.load_source(f'folder:{text}', image_size=8)
    assert source.class_names == ('a', 'b')
    assert len(list(input_files.find([text]))) == 6
    assert len(list(input_files.find([text + '/*/0.png']))) == 2
    real = f'folder:{home}/photos'
    assert paths.real_source(f'folder:{text}') == real
    assert paths.real_source(paths.resolve_source(f'folder:{text}')) == real


def test_what_is_not_there_yet(home):
    assert paths.resolve('~/new/run', '--workdir=') == str(home / 'new/run')
    assert paths.resolve('new/$HOME', '--workdir=') == f'new/{home}'
    assert paths.resolve('', '--workdir=') == ''
    assert paths.resolve(pathlib.Path('~'), '--workdir=') == str(home)


@pytest.mark.parametrize('name', ['$NOWHERE', '~', '~me', 'a$HOME', 'gs:'])
def test_what_exists_is_taken_by_its_name(home, name):
    pathlib.Path(name).mkdir()
    assert paths.resolve(name, '--out=') == name


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('gs://b/run', '--out=gs://b/run: gs:// is not supported; use a local path'),
        ('s3://b/run', 's3:// is not supported; use a local path, or mount'),
        ('S3://b/run', 's3:// is not supported'),
        ('gs:/b/run', 'gs:// is not supported'),
        ('abfs://b/run', 'abfs:// is not supported'),
        ('hdfs://b/run', 'hdfs:// is not supported'),
        ('http://a.example/x.png', 'http:// is not supported; download it first'),
        ('https://a.example/x', 'https:// is not supported; download it first'),
        ('file://other.example/x', 'only files of this machine are read'),
        ('~nobody-of-this-name/x', 'no home folder is known for ~nobody-of-this-name'),
        ('$NOWHERE/x', 'the environment has no variable NOWHERE; set it or'),
        ('a/${NOWHERE}', 'the environment has no variable NOWHERE'),
    ],
)
def test_refused(home, text, message):
    with pytest.raises(UserError) as refusal:
        paths.resolve(text, '--out=')
    assert message in str(refusal.value)


def test_flags_of_the_commands(home):
    """Runs to compare, names of classes, recipes and folders as arguments."""
    for name in 'one', 'two':
        (home / name).mkdir()
        (home / name / 'metrics.jsonl').write_text('')
    (home / 'names.txt').write_text('cat\ndog\n')
    (home / 'mine.py').write_text('def get_config():\n    pass\n')
    for start in '~', '$HOME', f'file://{home}':
        assert compare.find_runs(f'{start}/one') == [str(home / 'one')]
        assert compare.find_runs(f'{start}/one,{start}/two') == [
            str(home / name) for name in ('one', 'two')
        ]
        assert compare.find_runs(f'{start}/*o*e') == [str(home / 'one')]
        assert heads.read_names(f'{start}/names.txt') == ('cat', 'dog')
        assert arguments.source(f'{start}/photos') == f'folder:{home}/photos'
    for start in '~', '$HOME':
        found = recipes.find(f'{start}/mine.py:a:b')
        assert (found.path, found.argument) == (str(home / 'mine.py'), 'a:b')


ADDRESSES = ('gs://b/x', 's3://b/x', 'https://a.example/x')


@pytest.mark.parametrize('address', ADDRESSES)
def test_addresses_are_one_line_everywhere(home, address):
    """Whatever takes a path says so, and makes no folder called gs:."""
    for refused in (
        lambda: dataset.load_source(f'folder:{address}', image_size=8),
        lambda: dataset.load_source(f'tar:{address}', image_size=8),
        lambda: dataset.load_source(f'packed:{address}', image_size=8),
        lambda: label_table.read(address),
        lambda: input_files.check([address]),
        lambda: input_files.check([address + '/*.png']),
        lambda: arguments.source(address),
        lambda: compare.find_runs(address),
        lambda: heads.read_names(f'{address}.txt'),
        lambda: recipes.find(f'{address}.py:quick'),
        lambda: tfds_source.find('mnist', tfds_dir=address, tfds_train=''),
    ):
        with pytest.raises(UserError, match='is not supported; '):
            refused()
    # Weights are loaded from https with a checksum (see `published`).
    for load in weight_file.load, predictor_lib.load_trained:
        with pytest.raises(UserError, match=r'is not supported; |#sha256='):
            load(address)
    assert os.listdir() == []


@pytest.mark.parametrize('address', ['gs://b/x', '~nobody-of-this-name/x', '$NOWHERE'])
@pytest.mark.parametrize(
    'command',
    [
        *('train {} --workdir=run', 'train photos --workdir={}', 'lr_find {}'),
        *('train photos --config.data.labels={}', 'lr_find photos --workdir={}'),
        *('train tfds:x --config.data.tfds_dir={}', 'sweep photos --workdir={}'),
        *('train folder:{}', 'train tar:{}', 'train packed:{}', 'train parquet:{}'),
        *('eval {}', 'eval run {}', 'report {}', 'report run --out={}'),
        *('report run --figures={}', 'report run run --out={}', 'predict {} photos'),
        *('predict run photos --out={}', 'predict run photos --explain={}'),
        *('predict run photos --features={}', 'export {} x.onnx', 'export run {}'),
        *('serve {}', 'push {} me/x --yes', 'pack {} packed', 'pack photos {}'),
    ],
)
def test_flags_that_lead_nowhere_end_before_anything_else(
    home, command, address, monkeypatch, capsys
):
    """Before JAX starts or a file is read; `run` need not exist."""
    monkeypatch.setattr(main, 'set_up', lambda invocation: pytest.fail('too late'))
    (home.parent / 'here' / 'photos').mkdir()
    words = [word.replace('{}', address) for word in command.split()]
    assert main.main(['launch.py', *words]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith('error: ') and address in told and '\n' not in told
    assert any(
        reason in told
        for reason in ('gs:// is not supp', 'no home folder', 'has no variable NOWH')
    )
    assert os.listdir() == ['photos']


def test_table_in_the_home_folder(home):
    with open(home / 'labels.csv', 'w', newline='') as file:
        rows = [[f'{c}/{i}.png', i % 2] for c in 'ab' for i in range(3)]
        csv.writer(file).writerows([['image', 'sick'], *rows])
    for text in ('~/labels.csv', '$HOME/labels.csv', f'file://{home}/labels.csv'):
        assert len(label_table.read(text).images) == 6


def test_names_in_lists_and_patterns_stay(home):
    """A pattern may hold a dollar; what stands in files of names is no shell's."""
    pathlib.Path('$x').mkdir()
    Image.new('RGB', (4, 4)).save('$x/a$NOWHERE.png')
    assert list(input_files.find(['$x/*$NOWHERE.png'])) == ['$x/a$NOWHERE.png']
