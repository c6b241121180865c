"""Packed images are those of their folder, whole or said to be damaged."""

import itertools
import json
import os
import shutil

import msgpack
import numpy as np
import pytest
from absl import flags

from flax_densenet import UserError
from flax_densenet.data import label_options, labeled_images, pipeline
from flax_densenet.data.packed import manifest, records
from flax_densenet.data.packed import reader as packed_reader
from flax_densenet.data.packed import writer as pack_writer
from flax_densenet.train import fit
from helpers.packs import assert_same_parts, contents, flip, load, make
from helpers.runs import (
    Stopped,
    assert_equal_bits,
    final_arrays,
    reuse_steps,
    stop_after,
    tiny_config,
    write_images,
)


def test_a_pack_is_its_folder(folder, out):
    files = contents(out)
    assert len([name for name in files if name.endswith('.array_record')]) > 4
    for fields in ({}, {'split_seed': 3, 'test_fraction': 0.4, 'channels': 1}):
        one = load(f'folder:{folder}', **fields)
        other = load(f'packed:{out}', **fields)
        assert_same_parts(folder, out, one, other)
    # The files' own bytes, which any other program can read.
    reader = packed_reader.load(str(out))
    paths = sorted(folder.rglob('*.jpg'))
    assert [reader[i] for i in range(25)] == [path.read_bytes() for path in paths]
    path = out / 'train-00000.array_record'
    record = msgpack.unpackb(next(records.records(str(path))))
    assert record['name'] == b'ants/000.jpg' and record['label'] == 0
    assert record['image'] == paths[0].read_bytes()
    images_of = json.loads(files['pack.json'])['images']
    assert images_of == {'train': 25, 'test': 0}


def test_parts(tmp_path):
    folder, out = tmp_path / 'photos', tmp_path / 'packed'
    write_images(folder / 'train', {'ants': 6, 'bees': 5})
    write_images(folder / 'val', {'ants': 3, 'bees': 2}, seed=1)
    (folder / 'train/ants/000.jpg').rename(folder / 'train/ants/grö ße\n.jpg')
    os.rename(
        folder / 'train/bees/000.jpg', os.fsencode(folder) + b'/train/bees/\xff.jpg'
    )
    made = make(folder, out)
    assert (made.count('train'), made.count('test')) == (11, 5)
    assert_same_parts(folder, out, load(f'folder:{folder}'), load(f'packed:{out}'))


@pytest.mark.parametrize('column', ['patient', 'split'])
def test_several_labels(column, tmp_path):
    folder, out = tmp_path / 'photos', tmp_path / 'packed'
    write_images(folder, {'x': 20})
    table = tmp_path / 'labels.csv'
    values = {'patient': lambda n: n // 4, 'split': lambda n: ['train', 'test'][n % 2]}
    # Not in the folder's order, one label not known, two soft.
    cells = {3: '', 5: -1, 6: -1}
    lines = [
        f'{n:03}.jpg,{values[column](n)},{n % 2},{cells.get(n, n % 3 // 2)}'
        for n in [*range(10, 20), *range(10)]
    ]
    table.write_text('\n'.join([f'image,{column},ill,old', *lines]))
    soft = label_options.Options(uncertain='soft')
    make(folder, out, labels=str(table), table=soft)
    one = load(f'folder:{folder}', labels=str(table), uncertain_labels='soft')
    other = load(f'packed:{out}')
    both = np.concatenate([other.train.labels, other.test.labels])
    assert ((both > 0.55) & (both < 0.85)).sum() == 2
    assert other.multi_label and other.train.labels.shape[1] == 2
    assert np.isnan(other.train.labels).any() or np.isnan(other.test.labels).any()
    assert_same_parts(folder, out, one, other)
    groups = packed_reader.load(str(out)).groups
    assert (groups is None) == (column == 'split')


def test_copies(tmp_path, capsys):
    folder, out = tmp_path / 'photos', tmp_path / 'packed'
    write_images(folder / 'train', {'ants': 6, 'bees': 6}, size=(8, 8))
    write_images(folder / 'val', {'ants': 3, 'bees': 3}, size=(8, 8), seed=1)
    shutil.copy(folder / 'val/ants/001.jpg', folder / 'train/ants/copy.jpg')
    shutil.copy(folder / 'val/bees/002.jpg', folder / 'train/ants/wrong.jpg')
    make(folder, out)
    for source, count in ((f'folder:{folder}', 14), (f'packed:{out}', 14)):
        capsys.readouterr()
        found = load(source)
        assert '2 training images are in the test as well' in capsys.readouterr().out
        assert len(found.train) == count and len(found.duplicates) == 2
        dropped = load(source, duplicates='drop')
        assert len(dropped.train) == count - 2
        assert load(source, duplicates='ignore').duplicates == ()
    assert found.duplicates[0].split('\t')[1:] == [
        'train/ants/copy.jpg',
        'val/ants/001.jpg',
    ]
    # A split of ours keeps them on one side, as the folder's does.
    shutil.rmtree(out)
    shutil.rmtree(folder / 'val')
    for index in range(5):
        shutil.copy(folder / 'train/bees/004.jpg', folder / f'train/bees/c{index}.jpg')
    make(folder / 'train', out)
    moved = load(f'packed:{out}')
    one = load(f'folder:{folder}/train')
    assert moved.test.indices.tolist() == one.test.indices.tolist()
    assert moved.train.indices.tolist() == one.train.indices.tolist()
    plain = load(f'packed:{out}', duplicates='ignore')
    assert plain.test.indices.tolist() != one.test.indices.tolist()


def test_batches_are_those_of_the_folder(folder, out):
    def batches(source, start):
        made = pipeline.train_batches(
            load(source).train, batch_size=6, seed=2, start=start, augment='shift_flip'
        )
        found = list(itertools.islice(made, 7))
        made.close()
        return found

    first = batches(f'folder:{folder}', 0)
    for source, start in ((f'packed:{out}', 0), (f'packed:{out}', 3)):
        for one, other in zip(first[start:], batches(source, start), strict=False):
            assert_equal_bits(one, other)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_decoding_processes(folder, out):
    flags.FLAGS.mark_as_parsed()  # grain's processes take them over

    def batches(**loading):
        made = pipeline.train_batches(
            load(f'packed:{out}').train, batch_size=6, seed=2, **loading
        )
        found = list(itertools.islice(made, 7))
        made.close()
        return found

    for one, other in zip(batches(threads=3), batches(workers=2), strict=True):
        assert_equal_bits(one, other)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_resumed_training_of_a_pack_is_that_of_its_folder(
    folder, out, tmp_path, monkeypatch
):
    reuse_steps(monkeypatch)
    fields = {'data.batch_size': 8, 'data.augment': 'shift_flip', 'train.epochs': 4}
    whole = tiny_config(**{'data.source': f'folder:{folder}'}, **fields)
    fit.fit(whole, str(tmp_path / 'whole'))
    parts = tiny_config(**{'data.source': f'packed:{out}'}, **fields)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)  # in the middle of epoch 3
        with pytest.raises(Stopped):
            fit.fit(parts, str(tmp_path / 'parts'))
    fit.fit(parts, str(tmp_path / 'parts'))
    (step, one), (other_step, other) = (
        final_arrays(tmp_path / name) for name in ('whole', 'parts')
    )
    assert step == other_step == 10
    assert_equal_bits(one, other)


def test_the_number_of_threads_changes_nothing(folder, out, tmp_path):
    for threads in (1, 5):
        other = tmp_path / f'by-{threads}'
        make(folder, other, threads=threads)
        assert contents(other) == contents(out)


def test_a_flipped_byte_is_found(out):
    path = out / 'train-00001.array_record'
    flip(path, path.read_bytes().index(b'\xff\xd8') + 300)
    message = r'train-00001.array_record: image 0 cannot be read .*damaged: copy it'
    first = packed_reader.load(str(out)).manifest.shards[0].count
    with pytest.raises(UserError, match=message) as error:
        packed_reader.load(str(out))[first]
    assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='train-00001.array_record is damaged .its SHA'):
        pack_writer.verify(str(out))
    # Others of the shard can be read, also by the reader that met the damage.
    reader = packed_reader.load(str(out))
    for index in (first, first + 1, first, first - 1, first + 1):
        if index == first:
            with pytest.raises(UserError):
                reader[index]
        else:
            assert reader[index][:2] == b'\xff\xd8'
    source = load(f'packed:{out}')
    for skip in ('skip', 'error'):
        batches = pipeline.eval_batches(
            labeled_images.join(source.train, source.test),
            batch_size=25,
            bad_images=skip,
        )
        if skip == 'skip':
            assert next(batches)['mask'].tolist().count(0) == 1
            assert batches.unread == {first: 1}
        else:
            with pytest.raises(UserError, match=message):
                next(batches)
        batches.close()


def test_shards_of_another_pack(folder, out, tmp_path):
    """Each whole by itself, of the same size and number of images."""
    index = packed_reader.load(str(out))
    labels = index.labels.copy()
    index.labels[:] = (labels + 1) % 3
    with pytest.raises(UserError, match='its label differs from the index'):
        index[0]


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('train-00002.array_record', os.unlink, 'cannot be read .No such file'),
        (
            'train-00002.array_record',
            lambda p: os.truncate(p, 900),
            '900 bytes instead',
        ),
        ('index.safetensors', os.unlink, 'index.safetensors cannot be read .No such'),
        ('index.safetensors', lambda p: flip(p, 200), 'its SHA-256 differs'),
        ('pack.json', os.unlink, 'there is no pack.json'),
        ('pack.json', lambda p: os.truncate(p, 300), r'is damaged \(not JSON\)'),
        ('pack.json', lambda p: p.write_text('[' * 10**5), r'is damaged \(not JSON\)'),
        ('pack.json', lambda p: p.write_text('{"format": 1}'), 'from another program'),
    ],
)
def test_what_is_missing_is_said_at_the_start(name, change, message, out):
    change(out / name)
    with pytest.raises(UserError, match=message) as error:
        load(f'packed:{out}')
    assert name in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('version', 3, 'version 3; this program reads 1 and 2'),
        ('class_names', [1], 'no class names'),
        ('shards', [], 'no training shards'),
        ('shards', {'file': '../../x'}, 'is not a plain name'),
        ('shards', {'file': '/etc/passwd'}, 'is not a plain name'),
        ('shards', {'part': 'both'}, 'of both with'),
        ('shards', {'count': -1}, 'with -1 images'),
        ('shards', {'count': True}, 'count is not of type int'),
        ('shards', {'count': 10**9}, 'labels do not belong to this pack'),
        ('shards', {'part': 'test'}, 'no training shards at the start'),
        ('has_test', True, 'match has_test'),
        ('multi_label', True, 'labels do not belong to this pack'),
        ('class_names', ['a', 'b'], 'labels do not belong to this pack'),
    ],
)
def test_manifests_that_lie(field, value, message, out):
    fields = json.loads((out / 'pack.json').read_text())
    if isinstance(value, dict):
        fields['shards'][0] |= value
    else:
        fields[field] = value
    (out / 'pack.json').write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
        load(f'packed:{out}')


def test_fuzz(out, tmp_path):
    """Whatever is changed: the image as it was, or one line."""
    rng = np.random.default_rng(0)
    reader = packed_reader.load(str(out))
    whole = [reader[index] for index in range(len(reader))]
    caught = dict.fromkeys(names := sorted(contents(out)), 0)
    for turn in range(150):
        name = names[turn % len(names)]
        path = out / name
        before = path.read_bytes()
        content = bytearray(before)
        # Shards are filled up with zeros.
        for place in rng.integers(0, min(len(content), 4500), rng.integers(1, 4)):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            found = packed_reader.load(str(out))
            for index, image in enumerate(whole):
                try:
                    assert found[index] == image
                    found.name(index)
                except UserError as error:
                    caught[name] += 1
                    assert '\n' not in str(error)
        except UserError as error:
            caught[name] += 1
            assert '\n' not in str(error)
        path.write_bytes(before)
    assert min(caught.values()) > 0, caught


@pytest.mark.parametrize(
    'record',
    [
        b'',
        b'\xff' * 9,
        msgpack.packb([1]),
        msgpack.packb({'image': b'x'}),
        msgpack.packb({'image': 'x', 'label': 1, 'name': b'', 'source': b'0' * 16}),
        msgpack.packb({'image': b'', 'label': 1, 'name': b'', 'source': b'0'}),
        msgpack.packb(
            {'image': b'', 'label': b'123', 'name': b'', 'source': b'0' * 16}
        ),
        b'\xdd\xff\xff\xff\xff',  # an array of four thousand million
        b'\x91' * 10**5,
    ],
)
def test_records_that_are_none(record):
    with pytest.raises(ValueError):
        packed_reader.from_record(record)


def test_a_manifest_says_what_there_is(out):
    made = manifest.load(str(out))
    assert manifest.describe(made).startswith('25 images, 3 classes, ')
    assert made == pack_writer.verify(str(out))
