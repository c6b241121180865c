"""The public API: every name, what it returns, and what it refuses."""

import inspect
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import flax_densenet
from flax_densenet import api
from flax_densenet.errors import UserError
from helpers.paths import ROOT
from helpers.runs import write_images
from helpers.shared import DIGITS


@pytest.fixture(scope='module')
def model(digits_run):
    return flax_densenet.load(digits_run.workdir, batch_size=8)


def test_names():
    assert set(flax_densenet.__all__) == {
        *('create_model', 'init_variables', 'list_models', 'load', 'train'),
        'list_weights',
        *('evaluate', 'export', 'get_config', 'DenseNet', 'RDNet', 'Predictor'),
        *('UserError', '__version__'),
    }
    assert set(flax_densenet.__all__) <= set(dir(flax_densenet))
    for name in flax_densenet.__all__:
        assert getattr(flax_densenet, name) is not None
    with pytest.raises(AttributeError, match='no_such_name'):
        _ = flax_densenet.no_such_name
    assert flax_densenet.load_trained is not None  # former names
    assert 'densenet121' in flax_densenet.VARIANTS


@pytest.mark.parametrize(
    'function',
    [
        *(api.evaluate, api.export, api.get_config, api.list_models, api.load),
        *(api.train, flax_densenet.create_model, flax_densenet.init_variables),
        flax_densenet.list_weights,
    ],
)
def test_every_argument_is_documented_and_typed(function):
    documented = inspect.getdoc(function).partition('Args:')[2]
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for argument in signature.parameters.values():
        if argument.kind is not inspect.Parameter.VAR_KEYWORD:
            assert argument.annotation is not inspect.Parameter.empty
        assert argument.name in documented


def test_import_is_light():
    """No JAX, no other package, no output, no environment variable."""
    code = (
        'import os, sys; before = dict(os.environ); import flax_densenet; '
        'print(sorted({"jax", "flax", "orbax", "matplotlib", "numpy", "absl"} '
        '& set(sys.modules)), dict(os.environ) == before)'
    )
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-c', code],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.stdout, done.stderr) == ('[] True\n', '')


def test_list_models():
    assert flax_densenet.list_models() == list(flax_densenet.VARIANTS)
    assert flax_densenet.list_models('rdnet_*') == [
        *('rdnet_tiny', 'rdnet_small', 'rdnet_base', 'rdnet_large')
    ]


def test_get_config(tmp_path):
    assert flax_densenet.get_config().model.variant == 'densenet121'
    assert flax_densenet.get_config('folder', 'photos').data.source == 'folder:photos'
    assert flax_densenet.get_config('cifar:quick').train.epochs == 13
    own = tmp_path / 'own.py'
    own.write_text(
        'from configs import base\n\n\ndef get_config(epochs="1"):\n'
        '    config = base.get_config()\n    config.train.epochs = int(epochs)\n'
        '    return config\n'
    )
    config = flax_densenet.get_config(own, '7')
    assert config.train.epochs == 7
    with pytest.raises(AttributeError, match='epochs'):
        config.train.epoch = 3
    with pytest.raises(UserError, match='did you mean cifar'):
        flax_densenet.get_config('cifra')
    with pytest.raises(UserError, match='40_12,x'):
        flax_densenet.get_config('cifar', '40_12,x')


def test_train_returns_the_records(digits_run):
    lines = (ROOT / digits_run.workdir / 'metrics.jsonl').read_text().splitlines()
    assert digits_run.records == [json.loads(line) for line in lines]
    assert [record['epoch'] for record in digits_run.records] == [1, 2, 3, 4]
    assert digits_run.best in digits_run.records
    assert digits_run.best['test_accuracy'] == max(
        record['test_accuracy'] for record in digits_run.records
    )


def test_train_writes_the_report_and_resumes(digits_run, capsys):
    made = {path.name for path in (ROOT / digits_run.workdir).iterdir()}
    assert {'report.html', 'eval.json', 'checkpoints', 'config.json'} <= made
    again = flax_densenet.train(DIGITS, digits_run.workdir)
    assert again == digits_run
    assert 'nothing to train' in capsys.readouterr().out


def test_train_takes_a_config_dict(digits_run, capsys):
    config = flax_densenet.get_config('base')
    for section, fields in DIGITS.items():
        config[section].update(fields)
    assert flax_densenet.train(config, digits_run.workdir) == digits_run
    capsys.readouterr()


@pytest.mark.parametrize(
    ('config', 'line'),
    [
        (
            {'train': {'epoch': 3}},
            r'train\.epoch is not a field; did you mean train\.e',
        ),
        ({'train': {'epochs': 'many'}}, r"train\.epochs='many'"),
        ({'trian': {'epochs': 3}}, r'trian\.epochs is not a field'),
        ({'data': {'source': 'nothing'}}, r'data\.source=nothing'),
    ],
)
def test_train_refuses(config, line, tmp_path):
    with pytest.raises(UserError, match=line):
        flax_densenet.train(config, tmp_path / 'run')


def test_package_and_function_have_one_name(digits_run):
    """Whether or not its modules were imported before."""
    from flax_densenet.export import formats
    from flax_densenet.train import fit

    assert flax_densenet.train.fit is fit and flax_densenet.export.formats is formats
    assert flax_densenet.train(DIGITS, digits_run.workdir) == digits_run


@pytest.mark.exhaustive
@pytest.mark.slow
def test_train_with_decoding_processes_needs_no_absl(tmp_path):
    """grain's processes read flags of absl, which no program but a command parses."""
    (tmp_path / 'program.py').write_text(
        'import flax_densenet\n\n'
        'if __name__ == "__main__":\n'
        f'    config = {DIGITS | {"data": DIGITS["data"] | {"workers": 1}}}\n'
        '    config["train"] |= {"report": False, "epochs": 1}\n'
        '    print(flax_densenet.train(config, "run").best["epoch"])\n'
    )
    done = subprocess.run(
        [sys.executable, 'program.py'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (0, '1\n'), done.stderr


def test_load(model, digits_run):
    assert isinstance(model, flax_densenet.Predictor)
    assert isinstance(model.trained.module, flax_densenet.DenseNet)
    assert (model.path, model.batch_size) == (digits_run.workdir, 8)
    found = model.predict(np.zeros((8, 8), np.uint8))
    assert found[0].label in model.class_names
    with pytest.raises(UserError, match='no such file or folder'):
        flax_densenet.load('nowhere')


def test_evaluate_measures_the_test_images(model, digits_run):
    found = flax_densenet.evaluate(model, batch_size=128)
    assert found.accuracy == pytest.approx(digits_run.best['test_accuracy'])
    # Calibrated, on these images, which are all that may choose.
    before = found.metrics['calibration']['before']['loss']
    assert before == pytest.approx(digits_run.best['test_loss'], rel=1e-4)
    assert found.loss < before - 0.01
    raw = flax_densenet.evaluate(flax_densenet.load(digits_run.workdir, raw=True))
    assert raw.loss == pytest.approx(before, rel=1e-5)
    assert not raw.metrics['calibration']['applied']
    saved = json.loads((ROOT / digits_run.workdir / 'eval.json').read_text())
    assert found.metrics == {name: saved[name] for name in found.metrics}
    assert found.probabilities.shape == (len(found.labels), len(found.class_names))
    assert (found.probabilities.argmax(-1) == found.labels).mean() == found.accuracy
    assert len(set(found.names)) == len(found.labels)


@pytest.mark.slow
def test_evaluate_takes_arrays(model):
    own = flax_densenet.evaluate(model)
    from flax_densenet.data import dataset

    test = dataset.load_source('digits', image_size=8).test
    images = np.stack([one['image'] for one in test])
    found = flax_densenet.evaluate(model, (images, test.labels))
    assert found.metrics == own.metrics
    np.testing.assert_array_equal(found.probabilities, own.probabilities)


def test_evaluate_takes_folders(digits_run, tmp_path):
    folder = write_images(tmp_path / 'more', {'3': 4, '7': 4})
    found = flax_densenet.evaluate(digits_run.workdir, folder, batch_size=4)
    assert sorted(found.labels) == [3] * 4 + [7] * 4
    assert all(name.endswith('.jpg') for name in found.names)
    assert found.metrics['count'] == 8


@pytest.mark.parametrize(
    ('data', 'line'),
    [
        ('nowhere', 'nowhere: there is no such folder'),
        ((np.zeros((2, 8, 8, 3)), np.zeros(2)), r'images: an array of float64'),
        ((np.zeros((2, 8, 8, 3), np.uint8), np.zeros(3)), r'labels: an array of shape'),
        ((np.zeros((2, 8, 8, 3), np.uint8), np.full(2, 10)), 'integers from 0 to 9'),
    ],
)
def test_evaluate_refuses(model, data, line):
    with pytest.raises(UserError, match=line):
        flax_densenet.evaluate(model, data)


@pytest.mark.slow
def test_export_by_ending(model, tmp_path):
    path = tmp_path / 'digits.safetensors'
    found = flax_densenet.export(model, path, license='cc0-1.0')
    assert (found.path, found.format) == (str(path), 'safetensors')
    assert 'flax_densenet' in found.facts and found.facts['precision'] == 'float32'
    assert (tmp_path / 'MODEL_CARD.md').exists()
    again = flax_densenet.load(path)
    image = np.full((8, 8), 100, np.uint8)
    np.testing.assert_allclose(
        again.predict(image)[0].probabilities,
        model.predict(image)[0].probabilities,
        atol=1e-5,
    )
    own = flax_densenet.evaluate(again, batch_size=128)
    assert own.accuracy == flax_densenet.evaluate(model).accuracy


def test_export_refuses(model, tmp_path):
    with pytest.raises(UserError, match='no format has this extension'):
        flax_densenet.export(model, tmp_path / 'digits.bin')
    with pytest.raises(UserError, match='ends with .onnx'):
        flax_densenet.export(model, tmp_path / 'digits.bin', 'onnx')
