"""Damaged input of every kind ends in a result or in one clear line.

In full (`make faults`) 147,800 inputs, else a few thousand. Input that fails is
kept, and pytest's message says where; `fuzz_engine.py KIND --first=NUMBER --count=1`
makes it again.
"""

import io
import os
import pathlib
import random

import pytest
from PIL import Image, UnidentifiedImageError

from faults import fuzz_bytes, fuzz_engine, fuzz_kinds, fuzz_tables
from flax_densenet import UserError
from helpers.marks import exhaustive_after

# kind: inputs in full, and else.
COUNTS = {
    'images': (60_000, 750),
    'dicom': (10_000, 200),
    'torch_zip': (3_000, 50),
    'torch_legacy': (9_000, 100),
    'safetensors': (5_000, 75),
    'arrays': (10_000, 150),
    'hdf5': (3_000, 50),
    'keras': (2_000, 40),
    'labels': (20_000, 400),
    'flags': (5_000, 75),
    'metadata': (800, 25),
    'tables': (12_000, 150),
    'decisions': (8_000, 150),
}
# In small, `make test-slow` fuzzes these, `make test-exhaustive` the others.
OFTEN = ('images', 'torch_zip', 'labels', 'flags', 'decisions', 'hdf5')
KINDS = [*OFTEN, *(kind for kind in COUNTS if kind not in OFTEN)]


def test_every_kind_counts():
    assert COUNTS.keys() == fuzz_kinds.KINDS.keys()
    assert sum(full for full, _ in COUNTS.values()) >= 100_000


@pytest.mark.faults
@pytest.mark.parametrize('kind', exhaustive_after(len(OFTEN), KINDS))
def test_fuzz(kind, tmp_path):
    if kind in ('hdf5', 'keras'):
        pytest.importorskip('h5py')
    in_full = os.environ.get('FAULTS') == 'full'
    count = COUNTS[kind][0 if in_full else 1]
    # Another range, so that the full run is not the small one again.
    first = 10**6 if in_full else 0
    outcome = fuzz_engine.fuzz(kind, first=first, count=count, folder=tmp_path)
    print(outcome)
    assert not outcome.failures, str(outcome)
    assert outcome.results + outcome.refused == count
    # Both ends are reached, or the damage is too heavy or none.
    assert min(outcome.results, outcome.refused) > count / 100, str(outcome)


class Odd(fuzz_kinds.Kind):
    """Ends in all the ways that a reader must not."""

    def run(self, raw, path):
        if raw == b'slow':
            while True:
                pass
        raised = {
            b'type': TypeError('x'),
            b'memory': MemoryError(),
            b'exit': SystemExit(2),
            b'short': UserError(''),
            b'clear': UserError('data.x=3 is wrong; use 4'),
        }
        if raw in raised:
            raise raised[raw]


@pytest.mark.parametrize(
    ('raw', 'expected'),
    [
        *((b'', 'result'), (b'clear', 'refused'), (b'slow', 'failed')),
        *((b'type', 'failed'), (b'memory', 'failed'), (b'exit', 'failed')),
        (b'short', 'failed'),
    ],
)
def test_what_counts_as_a_failure(raw, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz_engine, 'SECONDS', 0.05)
    with fuzz_engine.interruptible():
        outcome, _ = fuzz_engine.try_input(Odd(), raw, str(tmp_path / 'x'))
    assert outcome == expected


@pytest.mark.faults
def test_a_dead_child_is_seen(monkeypatch, tmp_path):
    """The input it died of is kept and counted, those behind it are run."""
    (tmp_path / 'fuzz_engine.py').write_text(
        'import json, os, pathlib, sys\n'
        'first = int(sys.argv[2].split("=")[1])\n'
        'folder = pathlib.Path(sys.argv[4].split("=")[1])\n'
        '(folder / "input").write_bytes(b"bad")\n'
        'state = dict(index=first + 1, results=1, refused=0)\n'
        'if first: state = dict(results=2, refused=1)\n'
        '(folder / "done.json").write_text(json.dumps(state))\n'
        'if not first: os.kill(os.getpid(), 11)\n'
    )
    monkeypatch.setattr(fuzz_engine, 'HERE', tmp_path)
    outcome = fuzz_engine.fuzz('x', first=0, count=5, folder=tmp_path / 'x')
    (failure,) = outcome.failures
    assert failure['error'] == 'died (-11)' and failure['index'] == 1
    assert pathlib.Path(failure['file']).read_bytes() == b'bad'
    assert (outcome.results, outcome.refused) == (3, 1)


def test_inputs_can_be_made_again():
    for kind in (
        fuzz_kinds.Labels(),
        fuzz_kinds.Metadata(),
        fuzz_tables.Tables(),
    ):
        made = [kind.make(random.Random(f'{n}')) for n in range(400)]
        again = [kind.make(random.Random(f'{n}')) for n in range(400)]
        assert made == again and len(set(made)) > 300


def test_a_sealed_png_is_whole():
    out = io.BytesIO()
    Image.new('RGB', (9, 9)).save(out, 'PNG')
    raw = out.getvalue()
    assert fuzz_bytes.seal_png(raw) == raw
    at = raw.index(b'IHDR') + 4
    changed = raw[: at + 3] + b'\x08' + raw[at + 4 :]  # 8 pixels wide
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(changed)).load()
    assert Image.open(io.BytesIO(fuzz_bytes.seal_png(changed))).size == (8, 9)
