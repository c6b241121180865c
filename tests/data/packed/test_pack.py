"""Packed images are those of their folder, whole or said to be damaged."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import msgpack
import numpy as np
import pytest
from absl import flags
from PIL import Image

from flax_densenet import UserError
from flax_densenet.data import dataset, images, pipeline
from flax_densenet.data.packed import manifest, records
from flax_densenet.data.packed import plan as pack_plan
from flax_densenet.data.packed import reader as packed_reader
from flax_densenet.data.packed import writer as pack_writer
from flax_densenet.train import fit
from helpers.paths import ROOT
from helpers.runs import (
    Stopped,
    assert_equal_bits,
    final_arrays,
    stop_after,
    tiny_config,
    write_images,
)

# Some three images of `write_images` a shard.
SMALL = pack_plan.Options(shard_mib=0.003)


def load(source, **fields):
    return dataset.load_source(source, **{'image_size': 16, **fields})


def make(folder, out, **fields):
    return pack_writer.pack(
        f'folder:{folder}', str(out), **{'options': SMALL, **fields}
    )


def contents(out):
    """`{name: bytes}` of all that a pack has written."""
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    files.pop('.lock')
    return files


def assert_same_parts(folder, out, one, other):
    """Pixels, labels, names and order of two sources."""
    assert one.class_names == other.class_names
    assert (one.has_test, one.multi_label) == (other.has_test, other.multi_label)
    for mine, theirs in ((one.train, other.train), (one.test, other.test)):
        assert len(mine) == len(theirs) > 0
        np.testing.assert_array_equal(mine.labels, theirs.labels)
        assert mine.labels.dtype == theirs.labels.dtype
        for index in range(len(mine)):
            path = os.path.join(folder, theirs.name(index))
            assert mine.name(index) == path
            a, b = mine[index], theirs[index]
            np.testing.assert_array_equal(a['image'], b['image'])
            np.testing.assert_array_equal(a['label'], b['label'])


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / 'photos', {'ants': 9, 'bees': 11, 'wasps': 5})


@pytest.fixture
def out(folder, tmp_path):
    make(folder, tmp_path / 'packed')
    return tmp_path / 'packed'


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
    # Not in the folder's order, one label not known.
    lines = [
        f'{n:03}.jpg,{values[column](n)},{n % 2},{"" if n == 3 else n % 3 // 2}'
        for n in [*range(10, 20), *range(10)]
    ]
    table.write_text('\n'.join([f'image,{column},ill,old', *lines]))
    make(folder, out, labels=str(table))
    one, other = load(f'folder:{folder}', labels=str(table)), load(f'packed:{out}')
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


@pytest.mark.slow
def test_a_resumed_training_of_a_pack_is_that_of_its_folder(
    folder, out, tmp_path, monkeypatch
):
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


def end_after(monkeypatch, count, error):
    """Packing ends with `error` when so many images are stored."""
    record, left = pack_plan.Images.record, itertools.count()

    def counted(self, index):
        if next(left) == count:
            raise error
        return record(self, index)

    monkeypatch.setattr(pack_plan.Images, 'record', counted)


def test_a_pack_that_was_ended_goes_on(folder, out, tmp_path, monkeypatch, capsys):
    again = tmp_path / 'again'
    with monkeypatch.context() as patch:
        end_after(patch, 14, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make(folder, again, threads=1)
    there = {path.name for path in again.iterdir()}
    assert there >= {'progress.jsonl', 'train-00000.array_record'}
    assert 'pack.json' not in there and not any('.part' in name for name in there)
    with pytest.raises(
        UserError, match='there is no pack.json; give a folder that pack'
    ):
        load(f'packed:{again}')
    # What a kill may leave besides: a half shard, a shard that was not noted, half a
    # note; and a disk may spoil a whole one.
    whole = sorted(name for name in there if name.endswith('.array_record'))
    assert len(whole) >= 3
    (again / '.train-00009.array_record.part').write_bytes(b'half')
    noted = (again / 'progress.jsonl').read_text().splitlines()
    noted = [line for line in noted if line]
    kept = noted[:-1]
    (again / 'progress.jsonl').write_text('\n'.join([*kept, noted[-1][:30]]))
    flip(again / whole[1], 2000)
    before = {name: (again / name).stat().st_mtime_ns for name in whole}
    capsys.readouterr()
    make(folder, again)
    shards = packed_reader.load(str(out)).manifest.shards
    said = f'{len(kept) - 1} of {len(shards)} shards are'
    assert said in capsys.readouterr().out
    assert contents(again) == contents(out)
    changed = [n for n in whole if (again / n).stat().st_mtime_ns != before[n]]
    assert changed == sorted({whole[1], json.loads(noted[-1])['file']})
    # A whole one is looked at and stays; so does a damaged one of a whole pack.
    flip(again / whole[0], 3000)
    make(folder, again)
    assert contents(again) == contents(out)


def test_a_pack_of_other_images_stays(folder, out, tmp_path):
    before = contents(out)
    for options in (
        {'options': pack_plan.Options(shard_mib=0.005)},
        {'options': pack_plan.Options(shard_mib=0.003, max_side=20)},
    ):
        with pytest.raises(UserError, match='holds a pack of other images or settings'):
            make(folder, out, **options)
    (folder / 'ants/000.jpg').unlink()
    with pytest.raises(UserError, match='holds a pack of other images or settings'):
        make(folder, out)
    assert contents(out) == before
    with pytest.raises(
        UserError, match=r'holds other files \(ants\); choose a new fol'
    ):
        make(folder, folder)
    (tmp_path / 'file').write_text('x')
    with pytest.raises(UserError, match='cannot be used .Not a directory'):
        make(folder, tmp_path / 'file')


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[3])
from flax_densenet import pack, shards
record = shards.Images.record
def slow(self, index):
    import time
    time.sleep(0.02)
    return record(self, index)
shards.Images.record = slow
options = shards.Options(shard_mib=0.003)
pack.pack('folder:' + sys.argv[1], sys.argv[2], options=options, threads=2)
"""


def count_notes(out):
    path = out / 'progress.jsonl'
    try:
        return len(path.read_text().split())
    except FileNotFoundError:  # not yet, or not any more
        return 0


@pytest.mark.slow
def test_a_killed_pack_goes_on(folder, out, tmp_path):
    again = tmp_path / 'again'
    command = [sys.executable, '-c', PROGRAM, str(folder), str(again), str(ROOT)]
    kills = 0
    for seconds in itertools.cycle((0.0, 0.04, 0.1)):
        before = count_notes(again)
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        while process.poll() is None and count_notes(again) <= before:
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL and kills < 40
        if (again / 'pack.json').exists():  # killed as it was through
            pack_writer.verify(str(again))
    assert kills > 1
    assert contents(again) == contents(out)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


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
            dataset.join(source.train, source.test), batch_size=25, bad_images=skip
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
    with pytest.raises(
        UserError, match="its label is not the index's: of another pack"
    ):
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
        ('index.safetensors', lambda p: flip(p, 200), 'its SHA-256 is another'),
        ('pack.json', os.unlink, 'there is no pack.json'),
        ('pack.json', lambda p: os.truncate(p, 300), r'is damaged \(not JSON\)'),
        ('pack.json', lambda p: p.write_text('[' * 10**5), r'is damaged \(not JSON\)'),
        ('pack.json', lambda p: p.write_text('{"format": 1}'), 'of another program'),
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
        ('version', 2, 'version 2; this program reads 1'),
        ('class_names', [1], 'no class names'),
        ('shards', [], 'no shards to train on'),
        ('shards', {'file': '../../x'}, 'is no plain name'),
        ('shards', {'file': '/etc/passwd'}, 'is no plain name'),
        ('shards', {'part': 'both'}, 'of both with'),
        ('shards', {'count': -1}, 'with -1 images'),
        ('shards', {'count': True}, 'count is no int'),
        ('shards', {'count': 10**9}, 'labels are not of this pack'),
        ('shards', {'part': 'test'}, 'no shards to train on first'),
        ('has_test', True, 'against has_test'),
        ('multi_label', True, 'labels are not of this pack'),
        ('class_names', ['a', 'b'], 'labels are not of this pack'),
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


def spoil(path):
    """Damage in the middle, which only decoding finds."""
    content = bytearray(path.read_bytes())
    content[200:-200] = bytes(len(content) - 400)
    path.write_bytes(content)


def test_bad_images(folder, tmp_path):
    out = tmp_path / 'packed'
    (folder / 'bees/003.jpg').write_bytes(b'\xff\xd8\xff no image \xff\xd9')
    with pytest.raises(UserError, match=r'bees/003.jpg is not an image .*images=skip'):
        make(folder, out)
    assert not out.exists()  # said before anything is written
    (folder / 'bees/003.jpg').unlink()
    content = Image.effect_noise((40, 30), 50)
    content.save(folder / 'wasps/004.png')
    damaged = (folder / 'wasps/004.png').read_bytes()
    (folder / 'wasps/004.png').write_bytes(damaged[:60] + damaged[90:])
    with pytest.raises(
        UserError, match=r'wasps/004.png cannot be decoded .*the same co'
    ):
        make(folder, out)
    assert (out / 'train-00000.array_record').exists()
    make(folder, out, bad_images='skip')
    assert 'wasps/004.png cannot be decoded' in (out / 'skipped.txt').read_text()
    one = load(f'folder:{folder}', bad_images='skip')
    assert_same_parts(folder, out, one, load(f'packed:{out}'))


def test_smaller_images(folder, tmp_path):
    out = tmp_path / 'packed'
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 220, (9, 12, 1), np.uint8)  # and a tint
    smooth = Image.fromarray(gray + rng.integers(0, 35, (9, 12, 3), np.uint8))
    smooth = smooth.resize((400, 300), Image.Resampling.BICUBIC)
    smooth.save(folder / 'ants/000.jpg', quality=95)
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth.save(folder / 'ants/001.jpg', exif=turned, quality=95)
    smooth.convert('P').save(folder / 'ants/002.gif')
    options = pack_plan.Options(max_side=50, quality=92)
    make(folder, out, options=options)
    reader = packed_reader.load(str(out))
    sizes = []
    for index in range(4):
        path = folder / reader.name(index)
        with Image.open(path) as image:
            sizes.append((min(image.size), images.Image.open(_io(reader[index])).size))
        theirs = images.load_image(str(path), images.Preparation(32))
        ours = images.load_image(reader[index], images.Preparation(32))
        if sizes[-1][0] > 50:
            assert np.abs(theirs.astype(int) - ours).mean() < 1.5
        else:
            assert reader[index] == path.read_bytes()
    assert sizes == [
        (300, (67, 50)),
        (300, (50, 67)),
        (300, (67, 50)),
        (30, (40, 30)),
    ]
    first = contents(out)
    shutil.rmtree(out)
    make(folder, out, options=options, threads=1)
    assert contents(out) == first


def _io(content):
    import io

    return io.BytesIO(content)


def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch):
    out = tmp_path / 'packed'
    said = f'write() failed: {os.strerror(errno.ENOSPC)}; writing x; at byte 4096'
    with monkeypatch.context() as patch:
        # As the writer of ArrayRecord says it.
        end_after(patch, 8, RuntimeError(said))
        with pytest.raises(UserError, match='the disk is full; free some space, and'):
            make(folder, out)
    make(folder, out)
    with monkeypatch.context() as patch:
        full = shutil.disk_usage(tmp_path)._replace(free=9)
        patch.setattr(shutil, 'disk_usage', lambda _: full)
        with pytest.raises(UserError, match='take about 0 MiB, 0 are free; choose ano'):
            make(folder, tmp_path / 'other')


def test_one_pack_at_a_time(folder, out):
    from flax_densenet.system import lock

    with (
        lock.hold(str(out), flag='--out', doing='packs'),
        pytest.raises(UserError, match=r'--out=.* is in use: process \d+ on .* packs '),
    ):
        make(folder, out)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'shard_mib': 0.0}, '--shard_mib=0 must be from'),
        ({'max_side': -1}, '--max_side=-1 must be from 0'),
        ({'quality': 101}, '--quality=101 must be from 1 to 100'),
        ({'quality': float('nan')}, '--quality=nan must be'),
    ],
)
def test_options(fields, message):
    with pytest.raises(UserError, match=message):
        pack_plan.Options(**fields)


def test_many_open_shards(out):
    """A bound on open files closes the ones that were not used for longest."""
    reader = packed_reader.load(str(out))
    whole = [reader[index] for index in range(len(reader))]
    few = packed_reader.load(str(out))
    few._pool._most = 2
    for index in [*range(len(few)), *reversed(range(len(few)))]:
        assert few[index] == whole[index]
        assert len(few._pool._open) <= 2


def test_a_manifest_says_what_there_is(out):
    made = manifest.load(str(out))
    assert manifest.describe(made).startswith('25 images, 3 classes, ')
    assert made == pack_writer.verify(str(out))


def test_a_file_that_changed_meanwhile_is_packed_anew(folder, tmp_path, monkeypatch):
    out, fresh = tmp_path / 'packed', tmp_path / 'fresh'
    with monkeypatch.context() as patch:
        end_after(patch, 14, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make(folder, out, threads=1)
    path = folder / 'ants/000.jpg'
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(content[:-2] + b'\xff\xd9')
    flip(path, content.index(b'\xff\xda') + 40)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    make(folder, out)
    make(folder, fresh)
    assert contents(out) == contents(fresh)
    assert packed_reader.load(str(out))[0] == path.read_bytes() != content
