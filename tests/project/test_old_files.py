"""What earlier versions wrote is still read, and says what it said then.

tests/data/v0/README.md tells how the files were made.
"""

import csv
import datetime
import hashlib
import json
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from flax_densenet.checkpoints import run_folder
from flax_densenet.data import dataset
from flax_densenet.export import model_card_facts
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.weights import trained as trained_lib
from helpers import commands
from helpers.marks import slow_after
from helpers.paths import ROOT

V0 = ROOT / 'tests' / 'data' / 'v0'
EXPECTED = json.loads((V0 / 'expected.json').read_text())
# Of another processor, and of programs that were compiled in less time.
CLOSE = dict(rtol=2e-4, atol=1e-6)


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the files, which names in them are relative to."""
    folder = shutil.copytree(V0, tmp_path / 'v0')
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def main(monkeypatch, capfd):
    run = commands.make_main(monkeypatch, capfd)

    def succeed(*arguments):
        status, out, err = run(*arguments)
        assert status == 0, err
        return out

    return succeed


def assert_probabilities(path, expected, **tolerance):
    """Of the images that `expected` names; keys are names of files."""
    model = predictor_lib.Predictor(trained_lib.load_trained(path), 4)
    found = model.predict(list(expected))
    rows = [one.probabilities for one in found]
    np.testing.assert_allclose(rows, list(expected.values()), **CLOSE | tolerance)


def assert_holds(found, expected):
    """All of `expected` is in `found`, numbers nearly."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            assert_holds(found[name], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_holds(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3)
    else:
        assert found == expected


@pytest.mark.parametrize('name', ['run', 'labels_run'])
def test_runs(name, old):
    expected = EXPECTED[name]
    best = trained_lib.load_trained(name)
    assert (best.step, best.metadata['epoch']) == (
        expected['best_step'],
        expected['best_epoch'],
    )
    latest = trained_lib.load_trained(name, 'latest')
    assert (latest.step, latest.metadata['epoch']) == (
        expected['latest_step'],
        expected['latest_epoch'],
    )
    metadata = best.metadata
    assert metadata['class_names'] == expected['class_names']
    assert metadata['multi_label'] == expected['multi_label']
    assert metadata['image_size'] == expected['image_size']
    fields = {n: v for n, v in expected['model'].items() if v is not None}
    assert metadata['model'].items() >= fields.items()
    assert_holds(best.metrics, expected['checkpoint_metrics'])
    rows = run_folder.load_run(name).records
    for row, then in zip(rows, expected['records'], strict=True):
        assert_holds(row, then)
    assert_probabilities(name, expected['probabilities'])


@pytest.mark.slow
def test_going_on(old, main):
    """Settings of the run's own command, and one more epoch."""
    main(
        *('--workdir=run', '--config.model.variant=BC-L10k4'),
        *('--config.data.image_size=8', '--config.data.batch_size=64'),
        *('--config.train.epochs=7', '--config.optimizer.learning_rate=0.05'),
        *('--config.train.report=False', '--config.train.tensorboard=False'),
    )
    rows = run_folder.load_run('run').records
    assert [row['epoch'] for row in rows] == list(range(1, 8))
    expected = EXPECTED['run']['record_of_a_7th_epoch']
    for name in ('step', 'train_count', 'learning_rate', 'skipped_steps'):
        assert rows[-1][name] == expected[name]
    assert rows[-1]['train_loss'] == pytest.approx(expected['train_loss'], rel=1e-2)
    found = rows[-1]['train_accuracy'] * 1437
    assert found == pytest.approx(expected['train_accuracy'] * 1437, abs=3)


@pytest.mark.parametrize('name', slow_after(1, ['labels_run', 'run']))
def test_evaluation_again(name, old, main):
    """Of the run's own images: the settings of its data are those of then."""
    main('--mode=eval', f'--workdir={name}')
    found, expected = json.loads((old / name / 'eval.json').read_text()), figures(name)
    if name == 'labels_run':  # no label is ever predicted, so precision is undefined
        assert found['macro'].pop('precision') is None
        expected = expected | {'macro': dict(expected['macro'])}
        assert expected['macro'].pop('precision') == 0.0  # as it was
    assert_holds(found, expected)


def figures(name):
    """What was measured; what it was measured on is worded anew."""
    found = EXPECTED[name]['eval']
    return {n: v for n, v in found.items() if n not in ('data', 'model')}


@pytest.mark.parametrize('name', ['run', 'labels_run'])
def test_evaluations_are_read(name, old):
    """A card has the figures of eval.json, where it is of this checkpoint."""
    expected = EXPECTED[name]['eval']
    best = trained_lib.load_trained(name)
    card = model_card_facts.describe_metrics(best, name)
    assert (card['source'], card['own']) == (expected['data'], True)
    assert (card['count'], card['mirrored']) == (expected['count'], False)
    found = {row[0]: row[1] for row in card['rows']}
    for figure in ('accuracy', 'loss', 'top5'):
        assert found.get(figure) == expected[figure]
    for figure, value in expected['macro'].items():
        assert found[figure] == value
    path = old / name / 'eval.json'
    other = json.loads(path.read_text()) | {
        'model': 'best checkpoint: epoch 9, step 999'
    }
    path.write_text(json.dumps(other))
    card = model_card_facts.describe_metrics(best, name)
    assert 'top5' not in {row[0] for row in card['rows']} and card['classes'] == []


def test_names_that_settings_had(old):
    """The fields of config.json under the names that they have now."""
    path = old / 'run' / 'config.json'
    config = json.loads(path.read_text())
    config['data']['colour_jitter'] = [0.25]
    path.write_text(json.dumps(config))
    data = run_folder.load_run('run').config['data']
    assert data['color_jitter'] == [0.25] and 'colour_jitter' not in data


def test_predictions_again(old, main):
    for name in ('predictions.csv', 'predictions.jsonl'):
        before = (old / name).read_text()
        main('--mode=predict', '--workdir=run', '--files=digits', f'--out=new-{name}')
        assert_same_rows(old / f'new-{name}', before)


def assert_same_rows(path, before):
    new, before = path.read_text().splitlines(), before.splitlines()
    assert len(new) == len(before)
    if path.suffix == '.csv':
        for one, other in zip(csv.reader(new), csv.reader(before), strict=True):
            for a, b in zip(one, other, strict=True):
                number = '.' in b and b[0].isdigit()
                assert (
                    float(a) == pytest.approx(float(b), rel=1e-3) if number else a == b
                )
    else:
        for one, other in zip(new, before, strict=True):
            assert_holds(json.loads(one), json.loads(other))


def as_number(cell):
    return float(cell) if cell[:1].isdigit() and '.png' not in cell else cell


def test_packed(old):
    source = dataset.load_source('packed:packed', image_size=8)
    expected = EXPECTED['packed']
    assert list(source.class_names) == expected['class_names']
    for name in ('train', 'test'):
        part, then = getattr(source, name), expected[name]
        rows = [part[n] for n in range(len(part))]
        assert [part.name(n) for n in range(len(part))] == then['names']
        assert [int(row['label']) for row in rows] == then['labels']
        hashes = [hashlib.sha256(row['image'].tobytes()).hexdigest() for row in rows]
        assert hashes == then['pixels_sha256']


@pytest.mark.parametrize(
    'name', ['run.safetensors', 'run_bfloat16.safetensors', 'run_hub']
)
def test_exported_weights(name, old):
    expected = EXPECTED['exported'][name]
    path = f'exported/{name}'
    metadata = trained_lib.load_trained(path).metadata
    assert list(metadata['class_names']) == expected['class_names']
    assert metadata['image_size'] == expected['image_size']
    assert_probabilities(path, expected['probabilities'])


def pixels(expected):
    return np.stack([np.asarray(Image.open(name).convert('RGB')) for name in expected])


def test_exported_onnx(old):
    runtime = pytest.importorskip('onnxruntime')
    expected = EXPECTED['exported']['run.onnx']
    session = runtime.InferenceSession('exported/run.onnx')
    images = pixels(expected['probabilities'])
    (found,) = session.run(None, {expected['input']: images})
    np.testing.assert_allclose(found, list(expected['probabilities'].values()), **CLOSE)


def test_exported_stablehlo(old):
    from flax_densenet.export import stablehlo

    expected = EXPECTED['exported']['run.stablehlo']
    with zipfile.ZipFile('exported/run.stablehlo') as archive:
        written = json.loads(archive.read('metadata.json'))['written_on']
    age = datetime.date.today() - datetime.date.fromisoformat(written)
    try:
        function, metadata = stablehlo.load('exported/run.stablehlo')
    except Exception as error:
        if age < datetime.timedelta(days=180):  # for which JAX promises to read it
            raise
        pytest.skip(f'JAX reads no program that is {age.days} days old: {error}')
    assert list(metadata['class_names']) == expected['class_names']
    assert metadata['written_with_jax'] == expected['written_with_jax']
    found = function(pixels(expected['probabilities']))
    np.testing.assert_allclose(found, list(expected['probabilities'].values()), **CLOSE)


@pytest.mark.slow
def test_a_sweep_goes_on(old, main):
    main(
        *('--mode=sweep', '--workdir=sweep', '--config.model.variant=BC-L10k4'),
        *('--config.data.image_size=8', '--config.data.source=packed:packed'),
        *('--config.data.batch_size=4', '--config.train.epochs=1'),
        '--config.train.tensorboard=False',
        '--sweep=optimizer.learning_rate=1e-3..1e-1',
        '--trials=3',
    )
    settings = json.loads((old / 'sweep' / 'sweep.json').read_text())['settings']
    expected = EXPECTED['sweep']
    assert len(settings) == 3
    for found, then in zip(settings, expected['settings'], strict=False):
        assert_holds(found, {n: v for n, v in then.items() if n != 'runs'})
    third = expected['a_3rd_trial']
    assert settings[2]['fields'] == third['fields']
    folder = str(old / 'sweep' / 'trials' / '003' / 'seed0')
    (row,) = run_folder.load_run(folder).records
    assert row['test_loss'] == pytest.approx(third['test_loss'], rel=1e-3)
