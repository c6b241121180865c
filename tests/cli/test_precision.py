"""`--precision`: what computes in bfloat16, when, and what is printed about it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.models import folded
from flax_densenet.weights import precision as precision_lib
from flax_densenet.weights import trained as trained_lib
from helpers import commands as helper
from helpers import servers
from helpers.blocks import require_native
from helpers.paths import ROOT
from helpers.runs import write_images

RECORD = {'step': 113, 'count': 9, 'metric': 'accuracy'}


@pytest.fixture
def native():
    """Compiles the kernels; the function that does, which `run` replaces."""
    require_native('bfloat16')
    return cpu_kernels.load


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run in the working folder, on one device that multiplies bfloat16."""
    monkeypatch.setattr(cpu_kernels, 'load', lambda *_: None)
    devices = jax.devices()[:1]
    monkeypatch.setattr(mesh_lib.jax, 'devices', lambda *_: devices)
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    monkeypatch.setattr(cpu_kernels, 'bfloat16_path', lambda: 'amx')
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / 'tests' / 'data' / 'v0' / 'run', 'run')
    return tmp_path / 'run'


def write(run, float32, bfloat16, step=113):
    found = RECORD | {'step': step, 'float32': float32, 'bfloat16': bfloat16}
    (run / precision_lib.FILE).write_text(json.dumps(found))


def test_what_auto_takes(run, monkeypatch):
    """bfloat16 only where it was measured, for this checkpoint, as accurate."""
    trained = trained_lib.load_trained('run')

    def choose(precision):
        found = precision_lib.resolve(trained, 'run', precision)
        line = trained.notes.pop('precision', '')
        return found.module.dtype, line

    assert choose(None) == choose('float32') == ('float32', '')
    assert choose('bfloat16') == ('bfloat16', '')
    dtype, line = choose('auto')
    assert dtype == 'float32' and 'not been measured; eval --precision=auto' in line
    write(run, 0.95, 0.9491)
    for precision in (None, 'auto'):
        assert choose(precision) == (
            'bfloat16',
            'computing in bfloat16, measured as accurate (accuracy 94.91%, float32 '
            '95.00%); --precision=float32 changes that',
        )
    write(run, 0.95, 0.9489)
    assert choose(None) == ('float32', '')
    dtype, line = choose('auto')
    assert dtype == 'float32' and 'less accurate: accuracy 94.89%' in line
    write(run, 0.95, 0.95, step=112)
    assert choose(None) == ('float32', '')  # another checkpoint
    write(run, 0.95, 0.95)
    monkeypatch.setattr(cpu_kernels, 'bfloat16_path', lambda: 'avx512')
    monkeypatch.setattr(cpu_kernels, 'vendor', lambda: 'AuthenticAMD')
    assert choose(None)[0] == 'bfloat16'
    monkeypatch.setattr(cpu_kernels, 'vendor', lambda: 'GenuineIntel')
    assert 'is no faster than float32' in choose('auto')[1]
    monkeypatch.setattr(cpu_kernels, 'bfloat16_path', lambda: 'portable')
    assert choose(None) == ('float32', '')
    assert 'has no instructions for it' in choose('auto')[1]
    dtype, line = choose('bfloat16')
    assert dtype == 'bfloat16' and 'slower here than float32' in line
    for text in ('{', '[]', '{"step": 113}'):
        (run / precision_lib.FILE).write_text(text)
        with pytest.raises(UserError, match=r'precision.json cannot be read'):
            choose('auto')
    with pytest.raises(UserError, match='--precision=int4 is not known; use auto'):
        predictor_lib.load_trained('run', precision='int4')


@pytest.mark.slow
def test_eval_measures_both_and_predict_follows(native, run, monkeypatch, capfd):
    monkeypatch.setattr(cpu_kernels, 'load', native)
    main = helper.make_main(monkeypatch, capfd)
    photos = write_images(run.parent / 'others', {'3': 4, '8': 5})
    status, out, err = main('eval', 'run', photos, '--precision=auto')
    assert (status, err) == (0, '')
    record = json.loads((run / precision_lib.FILE).read_text())
    assert RECORD.items() <= record.items()
    chosen = 'bfloat16' if precision_lib.is_accurate(record) else 'float32'
    assert f'; using {chosen}, and so do predict and serve unless' in out
    assert f'step 113, in {chosen})' in out
    assert json.loads((run / 'eval.json').read_text())['precision'] == chosen
    write(run, 0.95, 0.95)
    files = sorted((photos / '3').iterdir())
    found = {
        name: predictor_lib.load_trained('run', precision=name).predict(files)
        for name in (None, 'float32', 'bfloat16')
    }
    lines = capfd.readouterr()
    assert 'computing in bfloat16' in lines.out + lines.err
    rows = {
        name: np.stack([one.probabilities for one in predictions])
        for name, predictions in found.items()
    }
    np.testing.assert_array_equal(rows[None], rows['bfloat16'])
    assert 0 < np.abs(rows['bfloat16'] - rows['float32']).max() < 0.1


def test_a_model_trained_in_bfloat16_on_a_slow_processor(monkeypatch):
    """It computes as it was trained, and a line names the faster precision."""
    trained = servers.make_trained()
    module = trained.module.clone(dtype='bfloat16')
    trained = dataclasses.replace(trained, module=module)
    monkeypatch.setattr(folded, 'why_bfloat16_is_slow', lambda module: 'no AMX')
    resolved = precision_lib.resolve(trained, None, None)
    assert resolved.module.dtype == 'bfloat16'
    assert 'slower here than float32: no AMX' in resolved.notes['precision']
    assert '--precision=float32' in resolved.notes['precision']
