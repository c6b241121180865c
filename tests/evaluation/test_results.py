"""Figures and files of an evaluation, against scikit-learn on the same predictions."""

import csv
import dataclasses
import json
import types

import numpy as np
import pytest
from scipy import special

from flax_densenet import UserError, settings
from flax_densenet.data import dataset, labeled_images
from flax_densenet.evaluation import (
    evaluate,
    measured_data,
    metrics,
    prediction_rows,
    results,
)
from flax_densenet.weights import decisions, thresholds, transfer
from flax_densenet.weights import trained as trained_lib
from helpers import lazy
from helpers.runs import tiny_trained, write_images

sklearn_metrics = lazy.module('sklearn.metrics')

MEASURED = results.Measured('here', 6, 270, 'flip')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('results')
    photos = write_images(folder / 'photos', {'ants': 40, 'bees': 30, 'wasps': 20})
    fields = {'source': f'folder:{photos}', 'image_size': 8}
    trained = tiny_trained(dataset.load_source(**fields))
    made = settings.from_config({'data': fields})
    made = transfer.resolve(made, None)
    source, examples, names, trained_on = measured_data.find_examples(
        trained, 'run', made
    )
    assert trained_on and len(examples) == len(source.test) == 18
    return trained, results.collect(trained, examples, names, batch_size=16), made


@pytest.mark.slow
def test_files_equal_scikit_learn(run, tmp_path):
    trained, found, _ = run
    results.save(str(tmp_path / 'new'), found, MEASURED)
    with open(tmp_path / 'new' / 'eval.json') as file:
        figures = json.load(file)
    with open(tmp_path / 'new' / 'predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert figures['data'] == 'here' and figures['count'] == len(rows) == 18
    names = ('ants', 'bees', 'wasps')
    true, said = ([row[key] for row in rows] for key in ('true', 'predicted'))
    probabilities = np.array([[row[f'probability_{n}'] for n in names] for row in rows])
    probabilities = probabilities.astype(float)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    probabilities /= probabilities.sum(-1, keepdims=True)
    assert said == [names[i] for i in probabilities.argmax(-1)]
    assert all(
        f'/{label}/' in row['path'] for label, row in zip(true, rows, strict=True)
    )
    assert figures['accuracy'] == sklearn_metrics.accuracy_score(true, said)
    assert figures['loss'] == pytest.approx(
        sklearn_metrics.log_loss(true, probabilities, labels=names), rel=1e-4
    )
    matrix = sklearn_metrics.confusion_matrix(true, said, labels=names)
    assert figures['confusion'] == matrix.tolist()
    expected = sklearn_metrics.precision_recall_fscore_support(
        true, said, labels=names, zero_division=0
    )
    for key, values in zip(
        ('precision', 'recall', 'f1', 'support'), expected, strict=True
    ):
        found_values = [row[key] or 0 for row in figures['classes']]
        np.testing.assert_allclose(found_values, values)
    area = sklearn_metrics.roc_auc_score(true, probabilities, multi_class='ovr')
    assert figures['macro']['auroc'] == pytest.approx(area, abs=1e-4)


def test_same_figures_as_training(run):
    """`evaluate.evaluate`, which training calls, sums on the device."""
    trained, found, _ = run
    sums = evaluate.evaluate(
        trained.module,
        trained.variables,
        found.examples,
        batch_size=8,
        mesh=trained.mesh,
        mean=tuple(trained.metadata['mean']),
        std=tuple(trained.metadata['std']),
    )
    assert found.metrics['accuracy'] == sums['accuracy']
    assert found.metrics['loss'] == pytest.approx(sums['loss'], rel=1e-5)


def test_table(run):
    _, found, _ = run
    text = results.format_metrics_table(found, '18 test images')
    lines = text.splitlines()
    assert lines[0].startswith('Test_acc: ') and lines[0].endswith('(18 test images)')
    assert '95% interval' in lines[1] and 'calibration error' in lines[3]
    largest = max(found.metrics['classes'], key=lambda row: row['support'])
    share = largest['support'] / 18 * 100
    baseline = f'baselines: always {largest["name"]} {share:.1f}%, chance 33.3%'
    assert lines[2] == baseline
    assert lines[4].startswith('means, 95% intervals by bootstrap of 18 images')
    assert lines[-5].startswith('class ')
    assert [line.split()[0] for line in lines[-4:-1]] == ['ants', 'bees', 'wasps']
    assert max(map(len, lines)) <= 90
    many = results.Results(
        found.examples,
        tuple(f'class {i}' for i in range(60)),
        np.random.default_rng(0).normal(size=(200, 60)).astype(np.float32),
        np.arange(200) % 60,
    )
    lines = results.format_metrics_table(many, '').splitlines()
    means = 3
    assert len(lines) == 4 + means + 1 + results.ROWS + 1 + 1
    assert '(20 classes with a higher F1: see eval.json)' in lines


def test_thresholds_decide(tmp_path):
    """Of several labels which are predicted; of two classes which is positive."""
    logits = np.array([[2, -1], [-3, 1], [0.5, 0.5]], np.float32)
    examples = type('Named', (), {'name': lambda self, row: f'{row}.png'})()
    about = {'step': None, 'model': '', 'classes': 2, 'data': 'x', 'part': 'val'}

    def measure(labels, *values):
        found = decisions.Decisions(
            **about, count=9, thresholds=thresholds.Thresholds('f1', values)
        )
        made = results.Results(examples, ('a', 'b'), logits, labels, decisions=found)
        results.save(str(tmp_path), made, MEASURED)
        with open(tmp_path / 'predictions.csv', newline='') as file:
            return made, list(csv.DictReader(file))

    several = np.array([[1, 0], [0, np.nan], [0, 1]], np.float32)
    found, rows = measure(several, 0.9, 0.2)
    assert [row['predicted'] for row in rows] == ['b', 'b', 'b']
    assert found.metrics['accuracy'] == pytest.approx((0 + 1 + 1) / 3)
    assert found.metrics['thresholds']['rule'] == 'f1'
    assert found.metrics['classes'][0]['recall'] == 0
    table = results.format_metrics_table(found, '').splitlines()
    assert all(len(line) <= 80 for line in table)
    place = table.index('at thresholds chosen for the largest F1, with 95% intervals:')
    row, ends = found.metrics['thresholds']['classes'][1], table[place + 5]
    assert table[place + 4].split()[:2] == ['b', f'{row["threshold"]:.3f}']
    assert table[place + 4].split()[2] == f'{row["sensitivity"]:.3f}'
    assert ends.split()[0] == '-'.join(f'{x:.3f}' for x in row['sensitivity_interval'])
    found, rows = measure(np.array([0, 1, 1], np.int32), None, 0.6)
    assert [row['predicted'] for row in rows] == ['a', 'b', 'a']
    assert [row['positive'] for row in rows] == ['', 'b', '']
    assert found.metrics['thresholds']['classes'][0]['sensitivity'] == 0.5


def test_several_labels(tmp_path):
    logits = np.array([[2, -1], [-3, 1], [0.5, 0.5]], np.float32)
    labels = np.array([[1, 0], [0, np.nan], [0, 1]], np.float32)
    examples = type('Named', (), {'name': lambda self, row: f'{row}.png'})()
    found = results.Results(examples, ('a', 'b'), logits, labels)
    assert found.metrics['accuracy'] == pytest.approx((1 + 1 + 0.5) / 3)
    each = np.log1p(np.exp([[-2, -1], [-3, 0], [0.5, -0.5]]))
    loss = (each[0].mean() + each[1, 0] + each[2].mean()) / 3
    assert found.metrics['loss'] == pytest.approx(loss)
    results.save(str(tmp_path), found, MEASURED)
    with open(tmp_path / 'predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['true'] for row in rows] == ['a', '', 'b']
    assert [row['predicted'] for row in rows] == ['a', 'b', 'a;b']
    assert [row['true_b'] for row in rows] == ['0', '', '1']
    assert 'Test_auroc' in results.format_metrics_table(found, '')


def test_other_data(run, tmp_path):
    trained, _, made = run
    photos = write_images(tmp_path / 'photos', {'bees': 4, 'wasps': 5})
    data = dataclasses.replace(made.data, source=f'folder:{photos}')
    made = dataclasses.replace(made, data=data)
    _, examples, names, trained_on = measured_data.find_examples(trained, 'run', made)
    assert not trained_on and len(examples) == 9
    assert names == ('ants', 'bees', 'wasps') and set(examples.labels) == {1, 2}
    assert isinstance(examples, labeled_images.Examples)


def test_unusable(run, tmp_path):
    trained, found, _ = run
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written .*; use another --workdir'):
        results.save(str(tmp_path / 'file'), found, MEASURED)
    kernel = trained.variables['params']['classifier']['kernel']
    nothing = {'kernel': np.full(kernel.shape, np.nan, 'f4'), 'bias': np.zeros(3, 'f4')}
    broken = {
        'params': trained.variables['params'] | {'classifier': nothing},
        'batch_stats': trained.variables['batch_stats'],
    }
    bad = trained_lib.Trained(**{**vars(trained), 'variables': broken})
    with pytest.raises(UserError, match='not finite'):
        results.collect(bad, found.examples, found.class_names, batch_size=16)


@pytest.mark.slow
def test_very_many_classes_stay_small(tmp_path):
    """Neither all pairs of classes nor all probabilities go to a file."""
    rng, classes = np.random.default_rng(0), metrics.WIDE + 1
    logits = rng.standard_normal((40, classes), np.float32)
    labels = rng.integers(0, classes, 40)
    logits[np.arange(20), labels[:20]] += 9
    names = tuple(f'c{number}' for number in range(classes))
    examples = types.SimpleNamespace(name='{}.jpg'.format)
    found = results.Results(examples, names, logits, labels)
    results.save(str(tmp_path), found, MEASURED)
    figures = json.loads((tmp_path / 'eval.json').read_text())
    assert figures['confusion'] is None
    wrong = [[t, s, 1] for t, s in zip(labels, logits.argmax(-1), strict=True) if t - s]
    assert sorted(figures['confused']) == sorted(wrong)
    with open(tmp_path / 'predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and len(rows[0]) == 4 + 2 * prediction_rows.LIKELIEST
    probabilities = special.softmax(logits.astype(np.float64), axis=-1)
    for number, row in enumerate(rows):
        best = np.argsort(-probabilities[number])[: prediction_rows.LIKELIEST]
        assert [row[f'class_{n}'] for n in range(1, 11)] == [names[c] for c in best]
        assert float(row['probability_10']) == pytest.approx(
            probabilities[number, best[9]], rel=1e-5
        )
        assert row['predicted'] == row['class_1'] and row['path'] == f'{number}.jpg'
        assert row['true'] == names[labels[number]]
        true = probabilities[number, labels[number]]
        assert float(row['probability_of_true']) == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize(
    'measured',
    [
        MEASURED,
        results.Measured('digits', None, None, 'none', 'x.pth'),
        results.Measured('digits', None, None, 'flip'),
    ],
)
def test_what_was_measured_comes_back(measured, run, tmp_path):
    _, found, _ = run
    results.save(str(tmp_path), found, measured)
    loaded, fields = results.load(str(tmp_path))
    assert loaded == measured and fields['count'] == 18
    # As earlier versions wrote it: a sentence, in their words.
    old = {
        n: v for n, v in fields.items() if n not in vars(measured) and n != 'version'
    }
    sentence = measured.model.partition(', averaged over')
    model = sentence[0] + (', each image seen mirrored as well' if sentence[1] else '')
    old |= {'data': measured.data, 'model': model}
    (tmp_path / 'eval.json').write_text(json.dumps(old))
    loaded, fields = results.load(str(tmp_path))
    assert loaded == measured and fields['accuracy'] == found.metrics['accuracy']


def test_no_file_and_a_file_of_something_else(tmp_path):
    assert results.load(str(tmp_path)) is None
    for text in ('{', '[]', '3', '{"data": "x"}', '{"data": "x", "model": "y"}'):
        (tmp_path / 'eval.json').write_text(text)
        with pytest.raises(UserError, match=r'eval.json .* run eval again'):
            results.load(str(tmp_path))


def test_labels_that_are_known_of_no_image():
    """They count in no mean; images without any known label are told of."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 2)).astype(np.float32)
    labels = np.full((20, 2), np.nan, np.float32)
    labels[:, 1] = rng.integers(0, 2, 20)
    both, alone = (
        metrics.measure_labels(logits[:, chosen], labels[:, chosen], names)
        for chosen, names in (([0, 1], 'ab'), ([1], 'b'))
    )
    assert both['macro'] == alone['macro'] and both['loss'] == alone['loss']
    assert both['classes'][0]['support'] == 0 and both['classes'][0]['auroc'] is None


@pytest.mark.parametrize(
    ('cells', 'expected'),
    [
        (['1,0', ',1'], []),
        (['1,', '0,'], ['1 of 2 labels have no known value in any image']),
        (['1,0', ','], ['1 of 2 images have no known label']),
        ([',', ','], None),
    ],
)
def test_what_is_known_is_told(cells, expected, monkeypatch):
    values = [[float(x) if x else np.nan for x in cell.split(',')] for cell in cells]
    lines = []
    monkeypatch.setattr(measured_data.notes, 'say', lines.append)
    made = settings.from_config({'data': {'labels': 't.csv'}})
    if expected is None:
        with pytest.raises(UserError, match='no image has a known value for a label'):
            measured_data._check_known(made, np.array(values), ('a', 'b'))
        return
    measured_data._check_known(made, np.array(values), ('a', 'b'))
    assert len(lines) == len(expected)
    assert all(text in line for text, line in zip(expected, lines, strict=True))


def test_labels_that_are_not_known_have_no_values():
    labels = np.float32([[1, np.nan], [0, np.nan], [1, np.nan], [0, np.nan]])
    logits = np.float32([[2, 1], [-1, 1], [1, -1], [1, 1]])
    found = results.Results([], ('a', 'b'), logits, labels)
    row = found.metrics['classes'][1]
    assert (row['precision'], row['recall'], row['f1']) == (None,) * 3
    text = results.format_metrics_table(found, '4 images')
    assert text.splitlines()[-2].split() == ['b', *'----', '0']
    assert ', of all labels at 50%\n' in text
    assert (
        found.metrics['macro']['recall'] == found.metrics['classes'][0]['recall'] == 1
    )
