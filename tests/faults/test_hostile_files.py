"""Files of strangers that ask for memory, time or stack without end; one line each.

What damage at random would hardly make; some of it the fuzzer did find.
"""

import io
import json
import os
import pathlib
import pickle
import shutil
import time
import zipfile

import numpy as np
import pytest

from configs import base
from faults import fuzz_seeds
from flax_densenet import UserError, create_model, settings
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import run_folder
from flax_densenet.data import dataset
from flax_densenet.export import formats
from flax_densenet.models import initialization
from flax_densenet.train import checks
from flax_densenet.weights import (
    keras_files,
    torch_pickle,
    trained,
    transfer,
    weight_file,
)
from flax_densenet.weights import metadata as metadata_lib
from helpers.marks import slow_after

MAGIC = b''.join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))


def read_pickle(tmp_path, body, *, zipped):
    path = tmp_path / 'x.pth'
    if zipped:
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('x/data.pkl', body)
    else:
        path.write_bytes(MAGIC + body + pickle.dumps([], 2))
    start = time.process_time()
    with pytest.raises(UserError) as raised:
        torch_pickle.read(str(path))
    assert time.process_time() - start < 3
    return str(raised.value)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(
    ('body', 'reason'),
    [
        # 16 GB for the table of a memo, 8 bytes a place.
        (b'\x80\x02Nr\xff\xff\xff\x7f.', 'table of objects'),
        (b'\x80\x02Np2147483647\n.', 'table of objects'),
        # Hashed as a key it would overflow the stack, and end the process.
        (b'\x80\x02})' + b'\x85' * 200_000 + b'Ns.', 'containers deep'),
        (b'\x80\x02' + b'(' * 9000 + b't' * 9000 + b'.', 'containers deep'),
    ],
)
def test_pickles_that_ask_for_too_much(body, reason, zipped, tmp_path):
    assert reason in read_pickle(tmp_path, body, zipped=zipped)


@pytest.mark.parametrize('zipped', [True, False])
def test_lists_of_the_same_list(zipped, tmp_path):
    """Ten in ten in ten ...: 400 bytes that would be 10^30 objects."""
    body = b'\x80\x02]q\0'
    for n in range(30):
        body += b'0](' + b'h%c' % n * 10 + b'eq%c' % (n + 1)
    assert 'far more' in read_pickle(tmp_path, body + b'.', zipped=zipped)


def torch_zip(path, arrays, *, compress=zipfile.ZIP_STORED):
    data, storages = fuzz_seeds._pickle_torch(arrays, legacy=False, whole=False)
    with zipfile.ZipFile(path, 'w', compress) as archive:
        archive.writestr('x/data.pkl', data)
        for number, array in enumerate(storages):
            archive.writestr(f'x/data/{number}', array.tobytes())
    return str(path)


def test_a_zip_that_swells(tmp_path):
    arrays = {'a': np.zeros(6_000_000, np.float32)}
    path = torch_zip(tmp_path / 'x', arrays, compress=zipfile.ZIP_DEFLATED)
    assert os.path.getsize(path) < 10**5
    with pytest.raises(UserError, match='far more than its size'):
        torch_pickle.read(path)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x/data.pkl', b'\x80\x02N.' + bytes(20_000_000))
    with pytest.raises(UserError, match='data.pkl of 20000004 bytes is too large'):
        torch_pickle.read(path)
    path = torch_zip(tmp_path / 'y', arrays)
    assert torch_pickle.read(path)['a'].shape == (6_000_000,)


def test_many_tensors_of_one_storage(tmp_path):
    """A file of 4 MB that would be 1.2 GB, copied as layouts are changed."""
    path = pathlib.Path(torch_zip(tmp_path / 'x', {'a': np.zeros(10**6, np.float32)}))
    with zipfile.ZipFile(path) as archive:
        body, values = archive.read('x/data.pkl'), archive.read('x/data/0')
    start, end = body.index(b'ctorch._utils'), body.rindex(b's')
    # The dictionary's one tensor, 300 times.
    body = body[:start] + b'(' + body[start:end] * 300 + b'l' + body[end:]
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('x/data.pkl', body)
        archive.writestr('x/data/0', values)
    with pytest.raises(UserError, match='far more'):
        torch_pickle.read(str(path))


def test_a_storage_is_read_once(tmp_path):
    """Tied weights; without it a file of many views would be read as often."""
    path = pathlib.Path(torch_zip(tmp_path / 'x', {'a': np.ones(4, np.float32)}))
    with zipfile.ZipFile(path) as archive:
        body, values = archive.read('x/data.pkl'), archive.read('x/data/0')
    start, end = body.index(b'ctorch._utils'), body.rindex(b's')
    body = body[:start] + b'(' + body[start:end] * 2 + b'l' + body[end:]
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('x/data.pkl', body)
        archive.writestr('x/data/0', values)
    one, other = torch_pickle.read(str(path))['a']
    assert np.shares_memory(one, other) and one.tolist() == [1.0] * 4


def test_a_legacy_storage_that_is_not_there(tmp_path):
    data, _ = fuzz_seeds._pickle_torch({'a': np.ones(3, 'f4')}, legacy=True, whole=0)
    path = tmp_path / 'x.pth'
    path.write_bytes(MAGIC + data + pickle.dumps([], 2))
    with pytest.raises(UserError, match='storage 0 is not there'):
        torch_pickle.read(str(path))
    huge = data.replace(b'K\x03N', b'J\xff\xff\xff\x7fN')
    path.write_bytes(
        MAGIC + huge + pickle.dumps(['0'], 2) + b'\xff\xff\xff\x7f' + bytes(4)
    )
    with pytest.raises(UserError, match='storage 0 is cut short|has another size'):
        torch_pickle.read(str(path))


def write_safetensors(path, arrays, metadata=None):
    from safetensors import numpy as safetensors

    safetensors.save_file(arrays, str(path), metadata)
    return str(path)


def test_a_layer_of_a_million(tmp_path):
    """One name tells of a network whose shapes alone would take an hour."""
    arrays = {
        'features.conv0.weight': np.zeros((8, 3, 7, 7), np.float32),
        'features.denseblock1.denselayer1.conv1.weight': np.zeros((8, 8, 1, 1), 'f4'),
        'features.denseblock1.denselayer1.conv2.weight': np.zeros((4, 8, 3, 3), 'f4'),
        'features.denseblock1.denselayer1000000.norm1.weight': np.zeros(8, 'f4'),
    }
    with pytest.raises(UserError, match='holds no DenseNet'):
        weight_file.load(write_safetensors(tmp_path / 'x', arrays))
    arrays.popitem()
    arrays['features.denseblock1.denselayer1.conv2.weight'] = np.zeros(
        (0, 8, 3, 3), 'f4'
    )
    with pytest.raises(UserError, match='holds no DenseNet'):
        weight_file.load(write_safetensors(tmp_path / 'x', arrays))


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    return fuzz_seeds.make_run(str(tmp_path_factory.mktemp('run')))


@pytest.fixture
def run(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / 'run')
    return str(tmp_path / 'run')


def write_item(run, item, value):
    path = pathlib.Path(run, 'checkpoints', '1', item, item)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


DEEP = '[' * 100_000
BROKEN = {
    'model': [None, 3, {}, {'variant': 3}, {'variant': 'BC-L10k4', 'x': 1}]
    + [{'variant': 'BC-L10k4', 'block_sizes': [10**9]}, {'variant': 'L' + '9' * 5000}]
    + [{'variant': 'BC-L10k4', 'block_sizes': 'abc', 'stem_features': True}]
    + [{'variant': 'BC-L10k4', 'growth_rate': 10**8}]
    + [{'variant': 'BC-L10k4', 'block_sizes': [[1]]}],
    'class_names': [None, 'abc', [], [3], {}, ['a'], ['a', 'b', 'c', 'd']],
    'image_size': [None, 0, -3, 8.5, 10**9, True, '8'],
    'mean': [None, [], [0.5] * 2, ['x'], [float('nan')] * 3, 0.5, [0.5]],
    'data': [None, [], {'resize': 'x'}, {'resize': []}, {'crop_fraction': 1e-9}]
    + [{'crop_fraction': 'x'}, {'mean': 3}, {'mean': [0.5]}, {'interpolation': 3}],
}


@pytest.mark.parametrize(
    ('part', 'value'),
    # Exports of imported weights have no names.
    [(k, v) for k, values in BROKEN.items() for v in values
     if (k, v) != ('class_names', None)],
)  # fmt: skip
def test_metadata_of_a_safetensors_file(part, value, tmp_path):
    made = fuzz_seeds.trained('small images')
    found = made.metadata | {part: value}
    arrays = formats.torch_arrays(made.module, made.variables)
    path = write_safetensors(
        tmp_path / 'x', arrays, {weight_file.METADATA: json.dumps(found)}
    )
    with pytest.raises(UserError):
        weight_file.load(path)


def test_metadata_of_a_run(run):
    made = fuzz_seeds.trained('small images').metadata
    for value in (made | {'mean': 3}, [], 'x', DEEP, '{"a"', {}):
        write_item(run, 'metadata', value)
        for read in (weight_file.load, trained.load_trained):
            with pytest.raises(UserError, match='checkpoint .* (metadata|not intact)'):
                read(run)
    # What the arrays do not fit.
    absurd = made | {'model': {'variant': 'L99999997k1'}}
    write_item(run, 'metadata', absurd)
    with pytest.raises(UserError, match='more than 500'):
        trained.load_trained(run)
    other = {'variant': 'BC-L16k4'}
    for value in (made | {'model': other}, made | {'class_names': ['a', 'b']}):
        write_item(run, 'metadata', value)
        with pytest.raises(UserError, match='in the model that the metadata describes'):
            trained.load_trained(run)
    write_item(run, 'metadata', made)
    assert trained.load_trained(run).class_names == ('class 0', 'class 1', 'class 2')


@pytest.mark.parametrize('metrics', [{}, {'test_accuracy': 'x', 'test_loss': []}])
def test_metrics_that_are_none_come_last(metrics, run):
    good = {'test_accuracy': 0.0, 'test_loss': 9.0}
    assert checkpoint_reader.rank(metrics) < checkpoint_reader.rank(good)
    write_item(run, 'metrics', metrics)
    assert checkpoint_reader.find_step(run, 'best') == 1


def test_a_checkpoint_too_small_for_its_arrays(run):
    """Absent values would be read as zeros, of any size that the metadata claims."""
    made = fuzz_seeds.trained('small images').metadata
    wide = {'variant': 'BC-L10k4', 'growth_rate': 3000}
    write_item(run, 'metadata', made | {'model': wide})
    with pytest.raises(UserError, match='bytes cannot hold'):
        weight_file.load(run)


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        (dict(block_sizes=(501,)), 'more than 500'),
        (dict(block_sizes=(10**12,)), 'more than 500'),
        (dict(growth_rate=10**6), 'parameters'),
        (dict(stem_features=10**9), 'parameters'),
        (dict(stem_features=10**400), 'stem_features is above 2.15e.09 parameters'),
        (dict(num_classes=2**31), 'parameters'),
        (dict(growth_rate='4'), 'must be a whole number'),
        (dict(growth_rate=True), 'must be a whole number'),
        (dict(block_sizes='666'), 'in brackets'),
        (dict(block_sizes=(True,)), 'integers above 0'),
        (dict(epsilon=float('inf')), 'must be above 0, and at most 1'),
        (dict(epsilon=10**30), 'must be above 0, and at most 1'),
        (dict(fast=1), 'True or False'),
        (dict(variant=3), 'must be a name'),
        (dict(variant='L' + '9' * 5000 + 'k1'), 'is not known'),
    ],
)
def test_models_of_absurd_size_or_kind(fields, said):
    fields = dict(variant='densenet121', num_classes=2) | fields
    start = time.process_time()
    with pytest.raises(UserError, match=said):
        create_model(**fields)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    'name', slow_after(1, ['C-L16k4', 'L13k12', 'BC-L22k12', 'densenet121'])
)
def test_parameters_are_counted_by_arithmetic(name):
    import jax

    made = create_model(name, num_classes=7)
    shapes = initialization.variable_shapes(made, channels=1)['params']
    counted = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert made.count_parameters(channels=1) == counted


def test_the_keras_archive_of_a_later_zip(tmp_path):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, 'w') as archive:
        archive.writestr('config.json', '{}')
    raw = bytearray(raw.getvalue())
    raw[raw.index(b'PK\x01\x02') + 6] = 200  # needs version 20.0
    path = tmp_path / 'x.keras'
    path.write_bytes(raw)
    assert keras_files.is_keras_file(str(path))
    with pytest.raises(UserError, match='not a valid Keras file|h5py'):
        weight_file.load(str(path))


@pytest.mark.parametrize('name', ['metrics.jsonl', 'config.json', 'environment.json'])
@pytest.mark.parametrize(
    'raw', [b'{x}', b'[]}', b'{"a": ' + b'[' * 99999 + b'}', b'\xff']
)
def test_other_files_of_a_run(name, raw, tmp_path):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=name):
        run_folder.load_run(str(tmp_path))


@pytest.mark.parametrize('name', ['config.json', 'environment.json'])
def test_a_file_of_a_run_that_is_no_object(name, tmp_path):
    (tmp_path / name).write_text('[1]')
    with pytest.raises(UserError, match='not a JSON object'):
        run_folder.load_run(str(tmp_path))


@pytest.mark.parametrize(
    ('section', 'name', 'value'),
    [
        *(('data', 'threads', 0), ('data', 'threads', 10**9), ('data', 'workers', -1)),
        *(('data', 'workers', 10**6), ('train', 'epochs', 0), ('train', 'seed', -1)),
        *(('train', 'epochs', 10**30), ('train', 'seed', 2**63)),
    ],
)
def test_numbers_of_absurd_size(section, name, value):
    config = base.get_config().to_dict()
    checks.check_settings(transfer.resolve(settings.from_config(config), None))
    config[section][name] = value
    wrong = transfer.resolve(settings.from_config(config), None)
    with pytest.raises(UserError, match=f'{section}.{name}={value} must be from'):
        checks.check_settings(wrong)


def test_channels_of_absurd_number():
    """Each would be a number of the mean, 16 GB of them."""
    preparation = settings.PreparationSettings(channels=2**31)
    with pytest.raises(UserError, match='data.channels=2147483648 must be from 1'):
        transfer.resolve_preparation(preparation, None)


@pytest.mark.parametrize('field', [{'split_seed': -1}, {'image_size': 10**9}])
def test_data_of_absurd_numbers(field):
    ((name, value),) = field.items()
    with pytest.raises(UserError, match=f'data.{name}={value} must be'):
        dataset.load_source('digits', **field)


def test_a_zip_whose_names_are_no_text(tmp_path):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, 'w') as archive:
        archive.writestr('\u00e4', '{}')
    path = tmp_path / 'x.pth'
    path.write_bytes(raw.getvalue().replace('\u00e4'.encode(), b'\xff\xff'))
    with pytest.raises(UserError, match='not a valid torch file'):
        weight_file.load(str(path))


def test_a_name_with_a_nul():
    with pytest.raises(UserError, match='cannot be read'):
        weight_file.load('a\0b')


def test_errors_are_one_line_of_some_length():
    said = str(UserError('a\nb \x1b[2J \udc80 Ä ' + 'x' * 9000 + ' use y'))
    assert said.startswith(r'a\nb \x1b[2J \x80 Ä xxx') and said.endswith('xx use y')
    assert said.isprintable() and len(said) < 2000
    assert str(UserError(said)) == said
    short = UserError('data.x=3')
    assert str(pickle.loads(pickle.dumps(short))) == 'data.x=3'


def test_metadata_as_it_is_written_passes():
    made = fuzz_seeds.trained().metadata
    assert metadata_lib.check('x', made) is made
