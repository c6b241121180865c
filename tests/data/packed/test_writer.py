"""Packing goes on where it ended, and refuses what would spoil a pack."""

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

import numpy as np
import pytest
from PIL import Image

from flax_densenet import UserError
from flax_densenet.data import images
from flax_densenet.data.packed import plan as pack_plan
from flax_densenet.data.packed import reader as packed_reader
from flax_densenet.data.packed import writer as pack_writer
from helpers.packs import (
    assert_same_parts,
    contents,
    end_after,
    flip,
    load,
    make,
)
from helpers.paths import ROOT


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
from flax_densenet.data.packed import plan, writer
record = plan.Images.record
def slow(self, index):
    import time
    time.sleep(0.02)
    return record(self, index)
plan.Images.record = slow
options = plan.Options(shard_mib=0.003)
writer.pack('folder:' + sys.argv[1], sys.argv[2], options=options, threads=2)
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
