"""`calibrate`, `--raw`, and what predictions make of decisions that were fitted."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import flax_densenet
from flax_densenet.errors import UserError
from flax_densenet.export import formats
from flax_densenet.weights import decisions, trained
from helpers import commands as helper


@pytest.fixture
def run(digits_run, tmp_path):
    return pathlib.Path(shutil.copytree(digits_run.workdir, tmp_path / 'run'))


@pytest.fixture
def main(monkeypatch, capfd):
    return helper.make_main(monkeypatch, capfd)


def predict(path, **options):
    image = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    return flax_densenet.load(path, **options).predict(image)[0].probabilities


def test_training_calibrates_and_eval_says_on_which_images(run, main):
    found = decisions.load(str(run), 10)
    assert (found.part, found.count) == ('test', 360)
    assert found.calibration.methods == ('temperature',)
    assert np.abs(predict(run) - predict(run, raw=True)).max() > 0.01
    status, out, _ = main('eval', run)
    assert status == 0
    assert 'calibration was fitted on 360 test images of digits, the same images' in out
    assert '; before calibration ' in out
    metrics = json.loads((run / 'eval.json').read_text())['calibration']
    assert metrics['applied']
    assert metrics['after']['loss'] < metrics['before']['loss']
    status, out, _ = main('eval', run, '--raw')
    assert status == 0 and 'before calibration' not in out and 'fitted on' not in out
    raw = json.loads((run / 'eval.json').read_text())
    assert raw['loss'] == pytest.approx(metrics['before']['loss'])


@pytest.mark.slow
def test_old_runs_stay_as_they_were_until_they_are_calibrated(run, main):
    calibrated, raw = predict(run), predict(run, raw=True)
    before = (run / decisions.FILE).read_text()
    (run / decisions.FILE).unlink()
    (run / decisions.ARRAYS_FILE).unlink(missing_ok=True)
    np.testing.assert_array_equal(predict(run), raw)
    status, out, _ = main('calibrate', run)
    assert status == 0 and 'decisions.json written' in out
    again = decisions.load(str(run), 10).calibration.temperature
    assert again == pytest.approx(1 / json.loads(before)['calibration']['scale'][0])
    np.testing.assert_allclose(predict(run), calibrated, atol=1e-6)
    status, out, _ = main('calibrate', run, '--nocalibrate', '--threshold=f1')
    assert (
        status == 0
        and 'at thresholds chosen for the largest F1, with 95% intervals' in out
    )
    np.testing.assert_array_equal(predict(run), raw)
    values = decisions.load(str(run), 10).thresholds.values
    assert sum(value is not None for value in values) >= 8


@pytest.mark.slow
def test_decisions_of_another_checkpoint(run, caplog):
    content = json.loads((run / decisions.FILE).read_text())
    del content['checksum']
    for name, value in (('step', 1), ('model', 'ab')):
        (run / decisions.FILE).write_text(json.dumps(content | {name: value}))
        caplog.clear()
        np.testing.assert_array_equal(predict(run), predict(run, raw=True))
        lines = [line for line in caplog.messages if 'decisions.json' in line]
        assert len(lines) == 1 and 'are not applied' in lines[0]
    (run / decisions.FILE).write_text('{')
    with pytest.raises(UserError, match='run calibrate'):
        predict(run)
    predict(run, raw=True)


@pytest.mark.slow
def test_weights_have_theirs_beside_them(run, main, tmp_path):
    path = tmp_path / 'x.safetensors'
    raw = flax_densenet.load(run, raw=True)
    formats.save(str(path), raw.trained, 'safetensors')
    np.testing.assert_allclose(predict(path), predict(run, raw=True), atol=1e-5)
    status, out, _ = main('calibrate', path, 'digits', '--threshold=youden')
    assert status == 0 and 'x.safetensors.decisions.json written' in out
    np.testing.assert_allclose(predict(path), predict(run), atol=1e-4)
    model = flax_densenet.load(path)
    assert model.thresholds is not None and model.trained.step is None
    assert flax_densenet.load(path, raw=True).thresholds is None
    # Other outputs are not what was calibrated.
    other = trained.load_trained(str(path), choices=_choose('sigmoid'))
    assert other.decisions is None and '--outputs=sigmoid' in other.notes['decisions']


def _choose(outputs):
    from flax_densenet.weights import choices

    return choices.make(outputs=outputs)


@pytest.mark.parametrize(
    ('flag', 'line'),
    [
        ('--threshold=best', '--threshold=best is not known; use youden'),
        ('--positive_class=3', 'for two classes, with one per image'),
    ],
)
def test_rules_are_refused_at_once(run, main, flag, line):
    before = (run / decisions.FILE).read_text()
    status, _, err = main('calibrate', run, flag)
    assert status and line in err and err.count('\n') == 1
    assert (run / decisions.FILE).read_text() == before


def test_published_weights_are_refused(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = main('calibrate', 'torchvision:densenet121', 'digits')
    assert status and 'calibrate a copy: export torchvision:densenet121' in err


def test_settings_are_checked_before_training(tmp_path):
    for fields, line in (
        ({'threshold': 'best'}, 'train.threshold=best is not known'),
        ({'positive_class': '3'}, 'train.positive_class=3 is for two classes'),
    ):
        with pytest.raises(UserError, match=line):
            flax_densenet.train({'train': fields}, tmp_path / 'run')
