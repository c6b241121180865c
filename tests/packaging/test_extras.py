"""An installation without extras trains and predicts; all else names its extra."""

import os
import subprocess
import sys

import pytest

from flax_densenet import errors, settings
from flax_densenet.cli import main, trained_model
from flax_densenet.data import dataset
from flax_densenet.data.packed import writer as pack_writer
from flax_densenet.errors import MissingExtraError
from flax_densenet.inference import overlay
from flax_densenet.report import plots, render
from flax_densenet.sweeps import optuna_study
from flax_densenet.train import announce
from flax_densenet.weights import trained
from helpers import runs
from helpers.paths import ROOT

# What no package of the core needs: grain needs array_record, orbax prometheus_client.
OPTIONAL = (
    *('matplotlib', 'jinja2', 'tensorboardX', 'optuna', 'starlette'),
    *('hypercorn', 'onnx', 'onnxruntime', 'flatbuffers', 'keras', 'h5py'),
)
# An entry of None is how Python itself notes a module that cannot be imported.
WITHOUT = f'import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); '
TINY = (
    *('--config.model.variant=BC-L10k4', '--config.data.image_size=8'),
    *('--config.data.batch_size=1000', '--config.train.epochs=2'),
)


def run(code, *arguments, cwd):
    return subprocess.run(
        [sys.executable, '-c', WITHOUT + code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )


def hide(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_missing_package_names_its_extra(monkeypatch):
    hide(monkeypatch, 'optuna')
    line = r"^sweep needs optuna: pip install 'flax_densenet\[sweep\]'$"
    with pytest.raises(MissingExtraError, match=line):
        optuna_study.check('none')
    assert not errors.is_installed('optuna') and errors.is_installed('numpy')


@pytest.mark.parametrize('name', ['jinja2'])
def test_pages_need_the_report_extra(monkeypatch, tmp_path, name):
    hide(monkeypatch, name)
    with pytest.raises(MissingExtraError, match=rf'report\.html needs {name}.*report'):
        render.save_page(tmp_path / 'report.html', 'report.html', {})


@pytest.mark.parametrize(
    ('arguments', 'hidden', 'line'),
    [
        (('report', 'run'), 'jinja2', 'report needs jinja2'),
        (('serve', 'run'), 'starlette', 'serve needs starlette'),
        (('sweep', '--sweep=train.seed=0,1'), 'optuna', 'sweep needs optuna'),
        (('export', 'run', 'x.onnx'), 'jinja2', 'the model card needs jinja2'),
        (('export', 'run', 'x.onnx'), 'onnx', '--format=onnx needs onnx'),
    ],
)
def test_commands_name_their_extra(
    monkeypatch, tmp_path, capsys, arguments, hidden, line
):
    """Before they look for the data, one line and exit status 2."""
    hide(monkeypatch, hidden)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, 'set_up', lambda invocation: None)
    monkeypatch.setattr(trained_model, 'find', lambda invocation: 'run')
    model = runs.tiny_trained(dataset.load_source('digits', image_size=8))
    monkeypatch.setattr(trained, 'load_trained', lambda *_, **__: model)
    assert main.main(['flax-densenet', *arguments]) == 2
    extra = arguments[0]
    expected = f"error: {line}: pip install 'flax_densenet[{extra}]'\n"
    assert capsys.readouterr().err == expected


def test_plots_need_the_report_extra(monkeypatch):
    hide(monkeypatch, 'matplotlib', 'matplotlib.figure')
    with pytest.raises(MissingExtraError, match=r'needs matplotlib.*\[report\]'):
        plots.plot_rates([1.0], [1.0], [1.0], None)


@pytest.mark.parametrize('name', ['msgpack', 'array_record.python'])
def test_packed_data_needs_its_extra(monkeypatch, tmp_path, name):
    hide(monkeypatch, name)
    line = rf'packed data needs {name.partition(".")[0]}.*\[packed\]'
    with pytest.raises(MissingExtraError, match=line):
        dataset.load_source(f'packed:{tmp_path}')
    with pytest.raises(MissingExtraError, match=line):
        pack_writer.pack(f'folder:{tmp_path}', str(tmp_path / 'out'))


def test_captions_without_matplotlib(monkeypatch):
    hide(monkeypatch, 'matplotlib')
    overlay._font.cache_clear()
    try:
        assert overlay._font('ants').getlength('ants 76.1%') > 0
    finally:
        overlay._font.cache_clear()


@pytest.mark.parametrize(
    ('hidden', 'fields', 'line'),
    [
        ((), {}, ''),
        (('matplotlib',), {}, 'curves.png, samples.png; [report]'),
        (('jinja2',), {}, 'report.html; [report]'),
        (('jinja2',), {'report': False}, ''),
        (('tensorboardX',), {}, 'TensorBoard events; [tensorboard]'),
        (('tensorboardX',), {'tensorboard': False}, ''),
        (
            ('matplotlib', 'jinja2', 'tensorboardX'),
            {},
            'curves.png, samples.png, report.html, TensorBoard events; '
            '[report,tensorboard]',
        ),
    ],
)
def test_line_of_files_not_written(monkeypatch, hidden, fields, line):
    hide(monkeypatch, *hidden)
    expected = ''
    if line:
        names, extras = line.split('; ')
        expected = (
            f"not written: {names}; they need pip install 'flax_densenet{extras}'"
        )
    train = settings.TrainingSettings(**fields)
    assert announce.describe_missing(train) == expected


@pytest.mark.slow
def test_core_alone_trains(tmp_path):
    """In its own process; one line says what is not written."""
    code = 'import launch; sys.exit(launch.main(sys.argv))'
    done = run(code, *TINY, '--workdir=run', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if 'pip install' in line] == [
        'not written: curves.png, samples.png, report.html, TensorBoard events; they '
        "need pip install 'flax_densenet[report,tensorboard]'"
    ]
    assert 'checkpoints and metrics.jsonl are in run' in done.stdout
    assert done.stderr == ''
    made = {path.name for path in (tmp_path / 'run').iterdir()} - {'.lock'}
    fitted = {'decisions.json', 'decisions.safetensors'}
    kept = {'checkpoints', 'config.json', 'environment.json', 'metrics.jsonl'}
    assert made == kept | fitted


@pytest.mark.slow
def test_models_need_no_optional_package(tmp_path):
    code = (
        'import flax_densenet as d; import jax.numpy as jnp; '
        'm = d.create_model("BC-L10k4", num_classes=3); '
        'print(m.apply(d.init_variables(m, 0), jnp.zeros((1, 8, 8, 3))).shape); '
        'early = {"orbax", "grain", "tensorflow_datasets", "sklearn", "PIL"}; '
        'print(sorted(early & set(sys.modules)))'
    )
    done = run(code, cwd=tmp_path)
    assert done.stdout == '(1, 3)\n[]\n', done.stderr
    assert done.stderr == ''
