"""The score of unusual images of an ensemble: the same in all ways of computing it."""

import dataclasses

import numpy as np
import pytest

from flax_densenet.data import dataset, subset
from flax_densenet.errors import UserError
from flax_densenet.evaluation import results
from flax_densenet.export import formats, stablehlo, verify
from flax_densenet.inference import predictor
from flax_densenet.serving import answers
from flax_densenet.weights import (
    calibration,
    choices,
    decisions,
    ensembles,
    thresholds,
    unusual_members,
)
from flax_densenet.weights import trained as trained_lib
from helpers import runs
from helpers.decided import decide

COUNT = 3


@pytest.fixture(scope='module')
def source():
    return dataset.load_source('digits', image_size=8)


@pytest.fixture(scope='module')
def examples(source):
    return subset.Subset(source.test, np.arange(8))


@pytest.fixture(scope='module')
def images(examples):
    return np.stack([examples[n]['image'] for n in range(8)])


@pytest.fixture(scope='module')
def members(source, images):
    """Models with a calibration each (the last has none) and a score of `both`."""
    made = []
    for seed in range(COUNT):
        one = runs.tiny_trained(source, seed=seed)
        plain = predictor.Predictor(one, 8).programs(images)
        logits = np.log(plain.probabilities) + 5 * images.mean((1, 2, 3))[:, None] / 255
        found = decide(plain.features, logits, 'both', classes=10)
        scale = None if seed == COUNT - 1 else 0.25 + seed
        if scale:
            changed = calibration.Calibration(('temperature',), (scale,), (0.0,))
            found = dataclasses.replace(found, calibration=changed)
        made.append(dataclasses.replace(one, decisions=found))
    return made


@pytest.fixture(scope='module')
def trained(members):
    """The ensemble, with a score as `unusual_folds.fit` makes it."""
    score = unusual_members.MembersUnusual(
        tuple(one.decisions.unusual for one in members),
        tuple(one.calibration for one in members),
    )
    record = ensembles.Record(('a', 'b', 'c'), {}, {})
    made = ensembles.join('cv', record, members)
    found = dataclasses.replace(members[0].decisions, calibration=None, unusual=score)
    found = dataclasses.replace(found, model=decisions.fingerprint(made.variables))
    return dataclasses.replace(made, decisions=dataclasses.replace(found, step=None))


@pytest.fixture(scope='module')
def scores(members, images):
    """Medians of the scores that the members alone give."""
    each = [predictor.Predictor(one, 8).programs(images).unusual for one in members]
    assert np.ptp(each, 0).min() > 0.01 and len(set(np.argsort(each, 0)[1])) > 1
    return np.median(each, 0)


@pytest.mark.slow
def test_predictions(trained, images, scores, examples):
    found = predictor.Predictor(trained, 8)
    assert found.scores_unusual
    np.testing.assert_allclose(
        found.programs(images).unusual, scores, rtol=1e-3, atol=1e-3
    )
    whole = results.collect(trained, examples, trained.class_names, batch_size=8)
    np.testing.assert_allclose(whole.unusual, scores, rtol=1e-3, atol=1e-3)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_other_views_do_not_change_scores(trained, members, images, scores, examples):
    """Neither of an ensemble nor of one model."""
    for one, wanted in ((trained, scores), (members[0], None)):
        plain = predictor.Predictor(one, 8).programs(images)
        flipped = one.with_tta('flip')
        found = predictor.Predictor(flipped, 8).programs(images)
        assert np.abs(found.probabilities - plain.probabilities).max() > 1e-6
        wanted = plain.unusual if wanted is None else wanted
        np.testing.assert_allclose(found.unusual, wanted, rtol=1e-3, atol=1e-3)
        again = results.collect(flipped, examples, one.class_names, batch_size=8)
        np.testing.assert_allclose(again.unusual, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('inputs', ['images', 'normalized'])
def test_onnx(trained, images, scores, tmp_path, inputs):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    path = str(tmp_path / 'x.onnx')
    formats.save(path, trained, 'onnx', formats.Options(inputs))
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    given = verify.as_inputs(images, trained, inputs, nchw=True)
    (found,) = session.run(['unusual'], {session.get_inputs()[0].name: given})
    np.testing.assert_allclose(found, scores, rtol=1e-3, atol=1e-3)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize('inputs', ['images', 'normalized'])
def test_stablehlo(trained, images, scores, tmp_path, inputs):
    pytest.importorskip('flatbuffers')
    path = str(tmp_path / 'x.stablehlo')
    formats.save(path, trained, 'stablehlo', formats.Options(inputs))
    function, metadata = stablehlo.load(path)
    assert metadata['results'][1] == 'unusual'
    given = verify.as_inputs(images, trained, inputs, nchw=False)
    np.testing.assert_allclose(function(given)[1], scores, rtol=1e-3, atol=1e-3)


def load(folder, members, monkeypatch, **options):
    """Loads the ensemble of a folder, whose members are not on the disk."""
    record = ensembles.Record(('a', 'b', 'c'), {}, {})
    monkeypatch.setattr(
        ensembles, 'load', lambda *_: ensembles.join(str(folder), record, members)
    )
    (folder / ensembles.FILE).touch()
    return trained_lib.load_trained(str(folder), choices=choices.make(**options))


def test_files(trained, members, tmp_path, monkeypatch):
    """The score is saved with the ensemble; those of one network do not fit it."""
    decisions.save(str(tmp_path), trained.decisions)
    again = load(tmp_path, members, monkeypatch)
    assert again.decisions.unusual.calibrations[1].scale == (1.25,)
    assert ensembles.MISSING_SCORE not in again.notes
    for n, one in enumerate(again.decisions.unusual.members):
        wanted = members[n].decisions.unusual
        assert (one.references == wanted.references).all()
        assert (one.middle, one.limit) == (wanted.middle, wanted.limit)
    single = dataclasses.replace(
        trained.decisions, unusual=members[0].decisions.unusual
    )
    decisions.save(str(tmp_path), single)
    with pytest.raises(UserError, match='by 1 models, and .* has 3; delete it, or run'):
        load(tmp_path, members, monkeypatch)


def test_folders_of_earlier_versions(trained, members, tmp_path, monkeypatch):
    """One line says how to get a score, and how to keep the thresholds."""
    line = load(tmp_path, members, monkeypatch).notes[ensembles.MISSING_SCORE]
    assert 'no score of unusual images, as earlier versions had none for' in line
    assert line.endswith(f': calibrate {tmp_path} adds it')
    chosen = thresholds.Thresholds('youden', (0.5,) * 10)
    before = dataclasses.replace(trained.decisions, unusual=None, thresholds=chosen)
    decisions.save(str(tmp_path), before)
    line = load(tmp_path, members, monkeypatch).notes[ensembles.MISSING_SCORE]
    assert line.endswith('adds it, and --threshold=youden keeps its thresholds')
    other = dataclasses.replace(before, model='0')  # a fold was calibrated again
    decisions.save(str(tmp_path), other)
    notes = load(tmp_path, members, monkeypatch).notes
    assert 'run calibrate to fit them again' in notes['decisions']
    assert ensembles.MISSING_SCORE not in notes
    plain = [one.without_decisions() for one in members]  # train.unusual=off
    assert not load(tmp_path, plain, monkeypatch).notes.get(ensembles.MISSING_SCORE)


@pytest.mark.parametrize('method', ['both', 'energy'])
def test_scores_of_mean_views_are_left_out(method, members, tmp_path):
    """Earlier versions fitted energies of mean probabilities, which are all about 0."""
    one = members[0].without_decisions()
    score = dataclasses.replace(
        members[0].decisions.unusual,
        method=method,
        **{'energy_weight': 1e6, 'middle': 0.0, 'limit': 1e-6},
    )
    before = dataclasses.replace(
        members[0].decisions,
        **{'step': one.step, 'model': decisions.fingerprint(one.variables)},
        unusual=score,
    )
    decisions.save(str(tmp_path), before)
    for tta in 'none', 'flip':
        found = trained_lib._with_decisions(
            one.with_tta(tta), str(tmp_path), one.variables, choices.make()
        )
        assert (found.decisions.unusual is None) == (tta == 'flip')
    assert 'wrongly with data.tta=flip, so it is left out' in found.notes.pop('score')


def test_what_serve_tells(trained, images, scores):
    predictor_of_all = predictor.Predictor(trained, 8)
    about = answers._describe_unusual(predictor_of_all)
    assert about == {
        **{'method': 'both', 'limit': 1.0, 'usual_share': 0.95},
        **{'training_images': 60, 'validation_images': 90},
    }
    rows = predictor_of_all.predict(list(images))
    np.testing.assert_allclose([r.unusual for r in rows], scores, rtol=1e-3, atol=1e-3)
    assert [row.is_unusual for row in rows] == (scores > 1).tolist()
