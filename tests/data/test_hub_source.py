"""Parquet files as the datasets library writes them, read by it and without it."""

import importlib.util
import io
import pickle
import re
import time

import numpy as np
import pytest
from PIL import Image

from flax_densenet.cli import arguments
from flax_densenet.data import arrow_reader, dataset, hub_source
from flax_densenet.errors import UserError
from helpers import lazy

if not importlib.util.find_spec('datasets'):
    pytest.skip('datasets is not installed', allow_module_level=True)
datasets = lazy.module('datasets')
huggingface_hub = pytest.importorskip('huggingface_hub')
constants = pytest.importorskip('huggingface_hub.constants')

NAMES = ['ants', 'bees']


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    importlib.import_module('datasets')  # before a test changes what it reads then
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def png(value):
    file = io.BytesIO()
    Image.new('RGB', (4, 4), (value, 0, 255 - value)).save(file, 'PNG')
    return file.getvalue()


def rows(count, first=0, label=lambda n: n % 2):
    return {
        'image': [{'bytes': png(first + n), 'path': f'{n}.png'} for n in range(count)],
        'label': [label(n) for n in range(count)],
    }


def write(path, columns, **features):
    """A parquet file with an image column and others."""
    features = features or {'label': datasets.ClassLabel(names=NAMES)}
    made = datasets.Dataset.from_dict(
        columns, features=datasets.Features({'image': datasets.Image(), **features})
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    made.to_parquet(str(path), batch_size=3)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / 'photos'
    write(root / 'data' / 'train-00000-of-00002.parquet', rows(7))
    write(root / 'data' / 'train-00001-of-00002.parquet', rows(4, first=7))
    write(root / 'data' / 'test-00000-of-00001.parquet', rows(5, first=100))
    return root


def pixels(part):
    """The red of each image, which tells which it is."""
    return [int(part[n]['image'][0, 0, 0]) for n in range(len(part))]


def check_all(source):
    assert source.class_names == ('ants', 'bees') and source.has_test
    assert pixels(source.train) == list(range(11))
    assert pixels(source.test) == list(range(100, 105))
    assert source.test.labels.tolist() == [0, 1, 0, 1, 0]
    assert source.train.reader.name(12) == 'test[1] (1.png)'


def test_folder_of_parquet_files(folder, capfd):
    source = dataset.load_source(f'parquet:{folder}', image_size=4)
    check_all(source)
    lines = capfd.readouterr().out
    assert 'trains on train, tests on test' in lines and 'copied to' in lines
    dataset.load_source(f'parquet:{folder}', image_size=4)
    assert 'copied to' not in capfd.readouterr().out
    write(folder / 'data' / 'train-00001-of-00002.parquet', rows(2, first=50))
    source = dataset.load_source(f'parquet:{folder}', image_size=4)
    assert pixels(source.train)[7:] == [50, 51]


def test_set_of_the_library(folder, monkeypatch, tmp_path):
    """As `datasets.load_dataset` gives it, from files in place of the Hub's."""
    load, asked = datasets.load_dataset, []

    def load_dataset(name, config):
        asked.append((name, config))
        return load(str(folder), cache_dir=str(tmp_path / 'library'))

    monkeypatch.setattr('datasets.load_dataset', load_dataset)
    source = dataset.load_source('hf:me/insects:small', image_size=4)
    check_all(source)
    assert asked == [('me/insects', 'small')]
    # Other processes open the files themselves.
    copy = pickle.loads(pickle.dumps(source.train.reader))
    assert copy[12] == source.train.reader[12] and copy.labels.shape == (16,)
    found = dataset.load_source('hf:me/insects::test', NAMES, image_size=4)
    assert len(found.train) + len(found.test) == 5
    with pytest.raises(UserError, match='it has the splits train, test'):
        dataset.load_source('hf:me/insects::val', image_size=4)


def test_several_labels(tmp_path):
    many = datasets.List(datasets.ClassLabel(names=['a', 'b', 'c']))
    labels = [[0], [], [0, 2], [1], [2, 1], [0]]
    columns = {'image': rows(6)['image'], 'tags': labels}
    write(tmp_path / 'train.parquet', columns, tags=many)
    source = dataset.load_source(
        f'parquet:{tmp_path}', image_size=4, test_fraction=0.34
    )
    assert source.multi_label and source.class_names == ('a', 'b', 'c')
    reader = source.train.reader
    assert reader.labels[:3].tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]


def test_validation_and_hidden_labels(tmp_path, capfd):
    """The validation part is tested on; what has no labels is not used."""
    write(tmp_path / 'train.parquet', rows(4, label=lambda n: n % 2 if n else -1))
    write(tmp_path / 'validation.parquet', rows(2, first=50))
    write(tmp_path / 'test.parquet', rows(2, first=90, label=lambda n: -1))
    source = dataset.load_source(f'parquet:{tmp_path}', image_size=4)
    assert pixels(source.train) == [1, 2, 3] and pixels(source.test) == [50, 51]
    lines = capfd.readouterr().out
    assert '1 images without a label are left out' in lines
    assert 'tests on validation; not used: test' in lines


def test_three_parts_and_groups(tmp_path, capfd):
    """Validation chooses, test is for the end; a column of patients is found."""
    text = datasets.Value('string')
    for name, first, of in ('train', 0, 'abcd'), ('val', 50, 'ef'), ('test', 90, 'fg'):
        columns = rows(2 * len(of), first=first)
        columns['patient'] = [who for who in of for _ in range(2)]
        columns['site'] = ['x'] * len(columns['patient'])
        features = {'label': datasets.ClassLabel(names=NAMES)}
        write(
            tmp_path / f'{name}.parquet', columns, **features, patient=text, site=text
        )
    source = dataset.load_source(f'parquet:{tmp_path}', image_size=4)
    assert pixels(source.val) == [50, 51, 52, 53]
    assert pixels(source.test) == [90, 91, 92, 93] and len(source.train) == 8
    lines = capfd.readouterr().out
    assert 'trains on train, val chooses the best epoch, tests once on test' in lines
    assert 'grouped by the column patient, 1 of 7 groups are in more than one' in lines
    assert len(set(source.train.groups)) == 4 and len(set(source.val.groups)) == 2
    plain = dataset.load_source(f'parquet:{tmp_path}', image_size=4, groups='none')
    assert plain.train.groups is None
    for groups, message in (
        ('column:age', 'has the columns image, label, patient, site; name one'),
        ('column:site', 'all images are of one group'),
    ):
        with pytest.raises(UserError, match=message):
            dataset.load_source(f'parquet:{tmp_path}', image_size=4, groups=groups)


def test_columns_that_divide_the_images(tmp_path, capfd):
    """They are kept as those of tables are; a split may lack one."""
    kinds = {
        'label': datasets.ClassLabel(names=NAMES),
        'sex': datasets.ClassLabel(names=['female', 'male']),
        'age': datasets.Value('float32'),
        'site': datasets.Value('string'),
        'report': datasets.Value('string'),
    }
    for name, first, count in ('train', 0, 24), ('test', 100, 8):
        columns = rows(count, first=first)
        columns['sex'] = [n % 2 for n in range(count)]
        columns['age'] = [None, *(20.5 + n for n in range(1, count))]
        columns['site'] = ['north', 'south'] * (count // 2)
        columns['report'] = [f'Jane Doe {n}' for n in range(count)]
        if name == 'test':
            del columns['site']
        features = {key: kinds[key] for key in columns.keys() & kinds.keys()}
        write(tmp_path / f'{name}.parquet', columns, **features)
    name, fields = f'parquet:{tmp_path}', {'image_size': 4, 'label_columns': ('label',)}
    source = dataset.load_source(name, **fields)
    assert 'metrics are also shown by age, sex, site' in capfd.readouterr().out
    found = source.test.subgroups
    assert found['sex'].tolist() == ['female', 'male'] * 4
    assert found['site'].tolist() == [''] * 8
    assert np.isnan(found['age'][0]) and found['age'][1] == 21.5
    assert source.train.subgroups['site'].tolist() == ['north', 'south'] * 12
    assert not dataset.load_source(name, **fields, subgroups='none').test.subgroups
    source = dataset.load_source(name, **fields, subgroups='sex')
    assert list(source.test.subgroups) == ['sex']
    pattern = r'path:(?P<tens>\d)\d?\.png'
    source = dataset.load_source(name, **fields, subgroups=pattern)
    assert set(source.train.subgroups['tens (path)']) <= set('0123456789')
    with pytest.raises(UserError, match=r'no column ward .* there are sex, age,'):
        dataset.load_source(name, subgroups='ward', **fields)


def test_files_of_other_programs(tmp_path, capfd):
    """Without the library's metadata: bytes, and values for classes."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(
        {'img': [png(n) for n in range(6)], 'label': ['x', 'y', 'x', 'y', 'x', 'y']}
    )
    parquet.write_table(table, tmp_path / 'data.parquet')
    source = dataset.load_source(f'parquet:{tmp_path}/data.parquet', image_size=4)
    assert source.class_names == ('x', 'y')
    assert 'its column label has no class names' in capfd.readouterr().out


def test_choice_of_the_label(tmp_path):
    kinds = {
        'fine': datasets.ClassLabel(names=['f0', 'f1', 'f2']),
        'coarse': datasets.ClassLabel(names=['c0', 'c1']),
    }
    columns = {'image': rows(6)['image'], 'fine': [0, 1, 2] * 2, 'coarse': [0, 1] * 3}
    write(tmp_path / 'train.parquet', columns, **kinds)
    source = f'parquet:{tmp_path}'
    with pytest.raises(UserError, match='2 columns of labels .*label_columns="'):
        dataset.load_source(source, image_size=4)
    found = dataset.load_source(source, image_size=4, label_columns=('coarse',))
    assert found.class_names == ('c0', 'c1')
    with pytest.raises(UserError, match='name one of them'):
        dataset.load_source(source, image_size=4, label_columns=('other',))


def test_images_elsewhere_are_not_read(tmp_path):
    """A path in a stranger's file leads nowhere outside of the data set."""
    secret = tmp_path / 'secret.png'
    secret.write_bytes(png(1))
    columns = rows(4)
    columns['image'][2] = {'bytes': None, 'path': str(secret)}
    write(tmp_path / 'photos' / 'train.parquet', columns)
    listing = hub_source.find_parquet(str(tmp_path / 'photos'))
    with pytest.raises(UserError, match='not below the folder of the data set'):
        listing.reader[2]
    reader = listing.reader
    files = arrow_reader.ArrowReader(
        *(reader.files, reader.splits, reader.columns, (str(tmp_path),))
    )
    assert files[2] == str(secret)


@pytest.mark.parametrize(
    ('columns', 'features', 'line'),
    [
        ({'label': [0, 1]}, {}, 'has no class labels|0 image columns'),
        (
            {'image': [None] * 2, 'other': [None] * 2, 'label': [0, 1]},
            {'other': 'image', 'label': 'class'},
            'has 2 image columns',
        ),
        (
            {'image': [None] * 2, 'score': [0.5, 1.0]},
            {'score': 'float'},
            'no class lab',
        ),
    ],
)
def test_unfit_columns(columns, features, line, tmp_path):
    kinds = {
        'image': datasets.Image(),
        'class': datasets.ClassLabel(names=NAMES),
        'float': datasets.Value('float32'),
    }
    features = {name: kinds[kind] for name, kind in features.items()}
    if 'image' not in columns:
        datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / 'a.parquet'))
    else:
        write(tmp_path / 'a.parquet', columns, **features)
    with pytest.raises(UserError, match=line):
        dataset.load_source(f'parquet:{tmp_path}', image_size=4)


def test_mistakes(tmp_path, monkeypatch):
    def fail(line, source):
        with pytest.raises(UserError, match=line) as caught:
            dataset.load_source(source)
        assert '\n' not in str(caught.value)

    fail('there are no parquet files', f'parquet:{tmp_path}')
    fail('give data.source=parquet:', f'hf:{tmp_path}')
    fail('give hf:OWNER/NAME', 'hf:a/b/c')
    (tmp_path / 'train.parquet').write_bytes(b'PAR1 and no more')
    fail('cannot be read together', f'parquet:{tmp_path}')
    errors = {
        'scripts': RuntimeError('Dataset scripts are no longer supported, but found a'),
        'absent': datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist"),
        'network': ConnectionError("Couldn't reach 'x' on the Hub"),
    }

    def load_dataset(name, config):
        raise errors[name]

    monkeypatch.setattr('datasets.load_dataset', load_dataset)
    fail('is defined by a program, which is not run', 'hf:scripts')
    fail('there is no such data set at https?:.* or it is private', 'hf:absent')
    fail("is not in the cache .*cannot be reached .*Couldn't reach", 'hf:network')


def test_arguments(folder):
    assert arguments.source(str(folder)) == f'parquet:{folder}'
    assert arguments.source('hf:me/insects') == 'hf:me/insects'


def lead_to(url, monkeypatch):
    """What `HF_ENDPOINT` does, which the libraries read when they are imported."""
    huggingface_hub.HfFileSystem.clear_instance_cache()
    template = url + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setenv('HF_ENDPOINT', url)
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(datasets.config, 'HF_ENDPOINT', url)


@pytest.fixture
def played(host, folder, monkeypatch, tmp_path):
    """The Hub on this machine with the folder's files, and the library's own client."""
    lead_to(host.url, monkeypatch)
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'sets')
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*.parquet')
    }
    host.put_repo('datasets/me/insects', files | {'README.md': b'# Insects'})
    return host


def forbid(monkeypatch, is_forbidden=True):
    """The same for `HF_HUB_OFFLINE=1`."""
    monkeypatch.setenv('HF_HUB_OFFLINE', str(int(is_forbidden)))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', is_forbidden)
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', is_forbidden)


def test_set_of_the_hub(played, monkeypatch, capfd):
    """Downloaded once by the library, then there without a network."""
    check_all(dataset.load_source('hf:me/insects', image_size=4))
    asked = played.count('GET', '/datasets/me/insects/resolve')
    assert asked == 4  # three files and the card
    out, err = capfd.readouterr()
    assert [line for line in out.splitlines() if 'trains on' not in line] == []
    assert not err and not datasets.are_progress_bars_disabled()
    check_all(dataset.load_source('hf:me/insects', image_size=4))
    assert played.count('GET', '/datasets/me/insects/resolve') == asked
    played.requests.clear()
    capfd.readouterr()
    forbid(monkeypatch)
    check_all(dataset.load_source('hf:me/insects', image_size=4))
    assert not played.requests
    told, _, rest = capfd.readouterr().out.partition('\n')
    assert re.search(r'me/insects: using the cached copy of \w.*, in .*/sets/', told)
    assert 'trains on' in rest and rest.count('\n') == 1
    forbid(monkeypatch, False)
    for line, source in (
        (r'has the splits train, test', 'hf:me/insects::val'),
        ('small: give one of hf:me/insects:default$', 'hf:me/insects:small'),
    ):
        with pytest.raises(UserError, match=line):
            dataset.load_source(source, image_size=4)


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        ('GatedRepo', 'is gated: accept its terms at .*/datasets/me/x, and log in'),
        ('RepoNotFound', 'no such data set at http.*, or it is private: log in with'),
        ('Unauthorized', r'/datasets/me/x refuses it \(401\); log in with'),
    ],
)
def test_refusals_of_the_hub(error, line, played):
    files, _ = played.hub['datasets/me/insects']
    played.put_repo('datasets/me/x', files, error=error)
    with pytest.raises(UserError, match=line) as refusal:
        dataset.load_source('hf:me/x', image_size=4)
    assert '\n' not in str(refusal.value)


def test_configurations_of_the_hub(played):
    """Named in the card: one has to be chosen, and has its own files."""
    files, _ = played.hub['datasets/me/insects']
    part = 'data/{}-00000-of-00001.parquet'
    card = '---\nconfigs:\n'
    for name in 'train', 'test':
        card += f'- config_name: {name}-set\n  data_files: {part.format(name)}\n'
    both = {'README.md': f'{card}---\n'.encode(), part.format('train'): b''}
    both[part.format('train')] = files['data/train-00001-of-00002.parquet']
    both[part.format('test')] = files[part.format('test')]
    played.put_repo('datasets/me/two', both)
    with pytest.raises(UserError, match='of hf:me/two:train-set, hf:me/two:test-set$'):
        dataset.load_source('hf:me/two', image_size=4)
    source = dataset.load_source('hf:me/two:test-set', image_size=4, test_fraction=0.4)
    assert sorted(pixels(source.train) + pixels(source.test)) == list(range(100, 105))


def test_programs_of_the_hub_are_not_run(played, tmp_path):
    ran = tmp_path / 'ran'
    program = f'import pathlib\npathlib.Path({str(ran)!r}).touch()\n'
    played.put_repo('datasets/me/program', {'program.py': program.encode()})
    with pytest.raises(UserError, match='which is not run; .*refs/convert/parquet'):
        dataset.load_source('hf:me/program', image_size=4)
    assert not ran.exists()


def test_damaged_files_of_the_hub(played):
    played.put_repo('datasets/me/x', {'data/train-0.parquet': b'PAR1 and no more'})
    with pytest.raises(UserError, match='hf:me/x: .*[Pp]arquet'):
        dataset.load_source('hf:me/x', image_size=4)


def test_no_network(played, monkeypatch, capfd):
    place = r'is not in the cache .*/sets, and .*hf download --repo-type=dataset me/new'
    forbid(monkeypatch)
    with pytest.raises(UserError, match=f'{place}.*give data.source=parquet:FOLDER'):
        dataset.load_source('hf:me/new', image_size=4)
    forbid(monkeypatch, False)
    nowhere = 'http://127.0.0.1:9'
    lead_to(nowhere, monkeypatch)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    with pytest.raises(UserError, match=place):
        dataset.load_source('hf:me/new', image_size=4)
    out, err = capfd.readouterr()
    told = f'data.source=hf:me/new: {nowhere} cannot be reached'
    assert out.count(told) == 1 and out.count('\n') == 1 and not err
