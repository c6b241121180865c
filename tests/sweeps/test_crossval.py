"""Cross-validation: folds that resume, pooled predictions, the folds as one model."""

import csv
import json
import re
import shutil

import numpy as np
import pytest

import flax_densenet
from flax_densenet import UserError
from flax_densenet import settings as settings_lib
from flax_densenet.checkpoints import run_folder
from flax_densenet.data import dataset
from flax_densenet.evaluation import choosing, measured_data, unusual_folds
from flax_densenet.export import sample_images
from flax_densenet.inference import predictor
from flax_densenet.report import folds
from flax_densenet.sweeps import crossval, crossval_record, one_run
from flax_densenet.weights import (
    calibration,
    choices,
    decisions,
    ensembles,
    precision,
)
from flax_densenet.weights import trained as trained_lib
from helpers import commands as helper
from helpers import shared
from helpers.paths import ROOT
from helpers.runs import tiny_config, write_images

FOLDS = 2

# All of them are of the folds that a module's fixture trains.
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    def make(folder):
        write_images(folder / 'train', {'a': 8, 'b': 9, 'c': 7}, size=(8, 8))
        write_images(folder / 'val', {'a': 4, 'b': 4, 'c': 4}, seed=1, size=(8, 8))

    return shared.once(tmp_path_factory, 'crossval-photos', make)


def files(photos, part='val'):
    return sorted(map(str, (photos / part).rglob('*.jpg')))


def config_of(photos, **fields):
    fields = {'data.batch_size': 8, 'optimizer.learning_rate': 1e-2} | fields
    return tiny_config(**{'data.source': f'folder:{photos}', **fields})


@pytest.fixture(scope='module')
def made(tmp_path_factory, photos):
    """A finished cross-validation, which was interrupted in its second fold."""

    def make(folder):
        config, workdir = config_of(photos), str(folder / 'cv')
        train = one_run.train

        def interrupt(settings, place, **options):
            def ends(record):
                if settings.data.fold == 2:
                    raise KeyboardInterrupt

            return train(settings, place, ends_after=ends, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(crossval.jax, 'clear_caches', lambda: None)
            patch.setattr(crossval.gc, 'collect', lambda: None)
            patch.setattr(one_run, 'train', interrupt)
            with pytest.raises(KeyboardInterrupt):
                crossval.run(config, workdir, folds=FOLDS)
            patch.setattr(one_run, 'train', train)
            before = [
                run_folder.load_run(f'{workdir}/fold-{n}').records for n in (1, 2)
            ]
            with pytest.raises(UserError, match='not finished; run the same crossval'):
                flax_densenet.load(workdir)
            crossval.run(config, workdir, folds=FOLDS)
        (folder / 'before.json').write_text(json.dumps(before))

    return shared.once(tmp_path_factory, 'crossval', make)


@pytest.fixture
def copy(made, tmp_path):
    """The same in a folder of this test."""
    return shutil.copytree(made / 'cv', tmp_path / 'cv')


@pytest.fixture(scope='module')
def model(made):
    return flax_densenet.load(made / 'cv')


def test_an_interrupted_fold_goes_on(made):
    before = json.loads((made / 'before.json').read_text())
    assert [len(records) for records in before] == [2, 1]
    for fold, known in enumerate(before, start=1):
        records = run_folder.load_run(made / f'cv/fold-{fold}').records
        assert records[: len(known)] == known and len(records) == 2
    record = crossval_record.load(made / 'cv')
    assert sorted(record.runs) == ['1', '2'] and record.seconds > 0
    assert record.images == {'train': 24, 'test': 12}


def test_each_image_is_predicted_once_by_a_model_that_is_new_to_it(made, photos):
    with open(made / 'cv/predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['path'] for row in rows] == files(photos, 'train')
    for fold in range(1, FOLDS + 1):
        own = [row for row in rows if row['fold'] == str(fold)]
        assert {row['true'] for row in own} == {'a', 'b', 'c'}
        member = flax_densenet.load(made / f'cv/fold-{fold}')
        predictions = member.predict([row['path'] for row in own])
        found = np.stack([one.probabilities for one in predictions])
        names = [f'probability_{name}' for name in 'abc']
        expected = np.array([[float(row[name]) for name in names] for row in own])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        # In units of the ensemble's limits, which are of these images.
        scores = np.array([float(row['unusual']) for row in own])
        before = decisions.load(str(made / f'cv/fold-{fold}'), 3).unusual
        after = decisions.load(str(made / 'cv'), 3).unusual.members[fold - 1]
        expected = np.array([one.unusual for one in predictions])
        expected = unusual_folds.rescale(expected, before, after)
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
        assert (scores <= 1 + 1e-6).all()  # twelve images: the limit is the highest
        assert after.val_count == len(own) and before.val_count != len(own)
    saved = json.loads((made / 'cv/eval.json').read_text())
    assert saved['out_of_fold'] and (saved['members'], saved['count']) == (FOLDS, 24)
    right = np.mean([row['true'] == row['predicted'] for row in rows])
    assert saved['accuracy'] == pytest.approx(right)
    parts = saved['folds']
    assert sum(one['count'] for one in parts) == 24
    values = [one['accuracy'] for one in parts]
    assert saved['folds_mean']['accuracy'] == pytest.approx(np.mean(values))
    assert saved['folds_spread']['accuracy'] == pytest.approx(np.std(values, ddof=1))


def test_a_fold_is_a_run_of_its_own(made, photos, tmp_path):
    """The same settings train the same fold alone."""
    fields = {'data.folds': FOLDS, 'data.fold': 2, 'data.val_fraction': 0.1}
    config = config_of(photos, **fields)
    alone = flax_densenet.train(config, tmp_path / 'alone')
    records = run_folder.load_run(made / 'cv/fold-2').records
    for name in ('train_loss', 'step'):
        assert [r[name] for r in alone.records] == [r[name] for r in records]
    del config['data']['fold']
    with pytest.raises(UserError, match='folds=2 needs the fold to test on'):
        flax_densenet.train(config, tmp_path / 'all')


def test_what_is_not_the_same_is_refused(photos, copy):
    config = config_of(photos)
    with pytest.raises(UserError, match='holds a cross-validation of 2 folds, not 3'):
        crossval.run(config, str(copy), folds=3)
    other = config_of(photos, **{'optimizer.learning_rate': 0.5})
    with pytest.raises(UserError, match=r'with optimizer.learning_rate=0.01, not 0.5'):
        crossval.run(other, str(copy), folds=FOLDS)
    with pytest.raises(UserError, match='holds a run; a cross-validation needs'):
        crossval.run(config, str(copy / 'fold-1'), folds=FOLDS)
    changed = shutil.copytree(photos, copy.parent / 'photos')
    shutil.copy(changed / 'train/a/000.jpg', changed / 'train/a/new.jpg')
    with pytest.raises(UserError, match='on 36 images, and the data has 37 now'):
        crossval.run(config_of(changed), str(copy), folds=FOLDS)
    (changed / 'train/a/000.jpg').unlink()
    with pytest.raises(UserError, match='on other images than the data has now'):
        crossval.run(config_of(changed), str(copy), folds=FOLDS)


@pytest.mark.exhaustive
def test_the_folds_as_one_model(made, model, photos):
    """Probabilities are averaged, features side by side, and there are maps."""
    named = files(photos)
    members = [flax_densenet.load(made / f'cv/fold-{n}') for n in range(1, FOLDS + 1)]
    single = np.array([[p.probabilities for p in m.predict(named)] for m in members])
    found = [one.probabilities for one in model.predict(named)]
    assert np.ptp(single, 0).max() > 1e-3
    np.testing.assert_allclose(found, single.mean(0), atol=1e-5)
    features = model.features(named)
    expected = np.concatenate([member.features(named) for member in members], -1)
    assert features.shape == (12, model.feature_size)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert model.explain(named[:2], 'b')[0].class_name == 'b'
    fine = model.explain(named[:1], 'b', method='layercam')[0].cam
    own = [m.explain(named[:1], 'b', method='layercam')[0].cam for m in members]
    assert fine.shape == own[0].shape
    # The gradients of the mean are nearly the mean of the gradients.
    both = np.corrcoef(fine.ravel(), np.mean(own, 0).ravel())[0, 1]
    assert both > 0.9
    each = np.array([[one.unusual for one in m.predict(named)] for m in members])
    score = decisions.load(str(made / 'cv'), 3).unusual
    for n, member in enumerate(members):
        before = member.trained.decisions.unusual
        each[n] = unusual_folds.rescale(each[n], before, score.members[n])
    scores = [one.unusual for one in model.predict(named)]
    np.testing.assert_allclose(scores, each.min(0), rtol=1e-3, atol=1e-3)
    flipped = flax_densenet.load(made / 'cv', tta='flip').predict(named[:1])
    assert flipped[0].unusual == pytest.approx(scores[0], abs=1e-3)
    assert np.abs(flipped[0].probabilities - found[0]).max() > 1e-5


def test_the_test_part_is_measured_by_the_ensemble(made, model, photos):
    saved = json.loads((made / 'cv/test/eval.json').read_text())
    assert (saved['count'], saved['members']) == (12, FOLDS)
    assert 'out_of_fold' not in saved
    found = flax_densenet.evaluate(model, photos)
    assert found.metrics['loss'] == pytest.approx(saved['loss'], rel=1e-4)
    other = flax_densenet.evaluate(model, photos / 'val')  # in no folds there
    assert other.metrics['loss'] == pytest.approx(saved['loss'], rel=1e-4)
    pooled = flax_densenet.evaluate(model)
    whole = json.loads((made / 'cv/eval.json').read_text())
    assert pooled.metrics['loss'] == pytest.approx(whole['loss'], rel=1e-5)


def test_images_that_the_members_were_trained_on_are_no_measure(photos, copy):
    """Where there is no test part; to verify an export they will do."""
    only = shutil.copytree(photos / 'train', copy.parent / 'only')
    fields = trained_lib.load_trained(str(copy)).metadata['data']
    settings = settings_lib.from_saved({'data': fields | {'source': f'folder:{only}'}})
    names = 'a', 'b', 'c'
    source = dataset.from_settings(settings.data, settings.preparation, names)
    known = measured_data.identity.describe(source)
    members = ensembles.read(str(copy)).members
    record = ensembles.Record(members, {'train': 24, 'test': 0}, known)
    ensembles.save(str(copy), record)
    trained = trained_lib.load_trained(str(copy))
    with pytest.raises(UserError, match='each on all but its own fold'):
        measured_data.find_examples(trained, 'cv', settings)
    samples = sample_images.from_model(trained, 'cv', settings)
    assert samples.where.endswith(' images of folder:only')


def test_exports(model, tmp_path):
    pytest.importorskip('onnxruntime')
    result = flax_densenet.export(model, tmp_path / 'cv.onnx')
    assert 'largest difference' in result.facts['onnxruntime']
    assert '12 test images of' in result.facts['onnxruntime']
    assert 'of the score of unusual images' in result.facts['onnxruntime']
    card = ''.join(path.read_text() for path in tmp_path.glob('*.md'))
    assert 'the probabilities of 2 networks, averaged' in card
    for name, options, line in (
        ('cv.safetensors', {}, 'holds one network, and this is an ensemble of 2'),
        ('cv.onnx', {'precision': 'int8'}, 'is for one network, and this is an ens'),
    ):
        with pytest.raises(UserError, match=line):
            flax_densenet.export(model, tmp_path / name, **options)


def test_commands(made, copy, photos, monkeypatch, capfd):
    run = helper.make_main(monkeypatch, capfd)
    status, out, err = run('eval', copy)
    assert status == 0, err
    assert 'std. dev.' in out and '24 images of folder:' in out
    assert '12 images of the test part, ensemble of 2 models' in out
    assert 'the measured images chose nothing but the limit of unusual images' in out
    status, out, err = run('predict', copy, files(photos)[0], '--format=csv')
    assert status == 0 and len(out.splitlines()) == 2, err
    assert out.splitlines()[0].endswith(',unusual')
    status, out, err = run('eval', copy, f'--others={photos}/train/a')
    assert status == 0 and out.count('8 images of a: ') == 2, err + out
    page = (made / 'cv/report.html').read_text()
    assert 'score of unusual images' in page and 'Coverage of the sets' in page
    assert '<h2>Folds</h2>' in page and '2 × DenseNet' in page
    assert 'on the 12 images of the test part' in page
    status, out, err = run('crossval', photos, '--folds=1')
    assert status != 0 and '--folds=1 must be at least 2' in err + out
    more = '--folds=3', '--config.data.folds=4'
    status, out, err = run('crossval', photos, *more)
    assert status != 0 and 'give one of them' in err + out


def test_members_that_are_not_alike(copy):
    shutil.rmtree(copy / 'fold-2')
    with pytest.raises(UserError, match=r'its member .*fold-2 is gone'):
        flax_densenet.load(copy)
    shutil.copytree(ROOT / 'tests/data/v0/run', copy / 'fold-2')
    with pytest.raises(UserError, match='fold-2 differs from fold-1 in its network'):
        flax_densenet.load(copy)


@pytest.mark.parametrize(
    'members', [['fold-1'], ['fold-1', 'fold-1'], ['fold-1', '../x'], ['fold-1', 3], 5]
)
def test_files_of_strangers(members, tmp_path):
    content = {'version': 1, 'members': members, 'images': {}, 'identity': {}}
    (tmp_path / ensembles.FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r'ensemble\.json cannot be read'):
        flax_densenet.load(tmp_path)


def test_members_are_calibrated_before_the_mean(copy, photos):
    """And an ensemble has thresholds of its own, of the out-of-fold predictions."""
    member = trained_lib.load_trained(str(copy / 'fold-1'))
    half = calibration.Calibration(('temperature',), (0.5,), (0.0,))
    print_of = decisions.fingerprint(member.variables)
    made = decisions.Decisions(member.step, print_of, 3, '', 'val', 2, half)
    decisions.save(str(copy / 'fold-1'), made)
    named = files(photos)[:4]
    members = [flax_densenet.load(copy / f'fold-{n}') for n in (1, 2)]
    single = np.array([[p.probabilities for p in m.predict(named)] for m in members])
    found = [one.probabilities for one in flax_densenet.load(copy).predict(named)]
    np.testing.assert_allclose(found, single.mean(0), atol=1e-5)
    raw = trained_lib.load_trained(str(copy), choices=choices.make(raw=True))
    found = [one.probabilities for one in predictor.Predictor(raw).predict(named)]
    assert np.abs(np.array(found) - single.mean(0)).max() > 1e-4


def test_thresholds_of_all_folds(copy, monkeypatch, capfd):
    run = helper.make_main(monkeypatch, capfd)
    for flag, line in (
        ('--nocalibrate', 'each model of .* has its own calibration; name one of'),
        ('--unusual=energy', r'has its own statistics; name one .*fold-1, then'),
    ):
        status, out, err = run('calibrate', copy, flag)
        assert status != 0 and re.search(line, err + out), err + out
    monkeypatch.setattr(choosing, 'FEWEST', 3)
    status, out, err = run('calibrate', copy, '--threshold=youden')
    assert status == 0, err
    assert 'chose nothing but the thresholds and the limit of unusual images' in out
    trained = trained_lib.load_trained(str(copy))
    assert trained.decisions.thresholds.rule == 'youden' and not trained.calibration
    assert trained.decisions.unusual.share == 0.95 and trained.decisions.sets
    assert (trained.decisions.part, trained.decisions.count) == ('all', 24)


def test_comparisons_take_the_mean_of_the_folds(made, copy, monkeypatch, capfd):
    run = folds.load_run(str(copy))
    single = [run_folder.load_run(copy / f'fold-{n}').records for n in (1, 2)]
    expected = np.mean([records[-1]['train_loss'] for records in single])
    assert run.records[-1]['train_loss'] == pytest.approx(expected)
    assert len(run.records) == 2 and 'step' not in run.records[0]
    main = helper.make_main(monkeypatch, capfd)
    page = copy.parent / 'compare.html'
    status, out, err = main('report', made / 'cv', copy, f'--out={page}')
    assert status == 0 and '2 runs compared' in out, err
    text = page.read_text()
    assert 'p = 1.000, not significant' in text and 'exact test' in text


def test_bfloat16_counts_if_it_was_measured_for_all_members(copy):
    steps = [trained_lib.load_trained(str(copy / f'fold-{n}')).step for n in (1, 2)]
    trained = trained_lib.load_trained(str(copy))
    for n, count, value in ((1, 10, 0.9), (2, 30, 0.5)):
        assert precision.load(trained, str(copy)) is None
        record = {'step': steps[n - 1], 'count': count, 'metric': 'accuracy'}
        record |= {'float32': 1.0, 'bfloat16': value}
        precision.save(str(copy / f'fold-{n}'), record)
    found = precision.load(trained, str(copy))
    assert (found['float32'], found['bfloat16']) == (1.0, pytest.approx(0.6))
