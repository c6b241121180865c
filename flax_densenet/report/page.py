"""`report.html`: one self-contained page that shows how good a model is."""

import datetime
import os

import numpy as np

from flax_densenet.checkpoints import run_folder
from flax_densenet.data import dataset
from flax_densenet.distributed import mesh
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.evaluation import results
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.report import gallery, plots, render
from flax_densenet.weights import trained as trained_lib

REPORT_FILE = 'report.html'
SAMPLES, MISTAKES = 24, 18  # images of these sections
CLASSES = 100  # that the confusion matrix and the ROC chart show at most
PAIRS = 12  # of classes that are confused most
_TFDS_LABELS = 20_000  # each has to be read from the disk


def save_report(
    workdir: str,
    trained: trained_lib.Trained,
    source: dataset.Source,
    found: results.Results,
    *,
    trained_on: bool = True,
    weights: str | None = None,
) -> str:
    """Writes `report.html`, and `eval.json` and `predictions.csv` beside it.

    Every host has to call it; one writes.

    Args:
      source: of the data, for its training images where the model is trained on it.
      found: what the model says of the test images.
      trained_on: False for other data than the model's own.
      weights: where the model was loaded from, if it is not a checkpoint.

    Returns:
      The page's path.

    Raises:
      UserError: the folder cannot be written.
    """
    run = run_folder.load_run(workdir)
    measured = results.describe(trained, source.name, weights=weights)
    about = _describe_model(trained, measured)
    results.save(workdir, found, measured)
    # Small batches: the maps are few, and a CPU compiles for them in the same time.
    predictor = predictor_lib.Predictor(trained, batch_size=6)
    pictures = {}
    for name, pick in (
        ('mistakes', gallery.pick_mistakes),
        ('uncertain', gallery.pick_uncertain),
    ):
        pictures[name] = pick(found, MISTAKES)
        gallery.add_pictures(pictures[name], found, predictor)
    path = os.path.join(workdir, REPORT_FILE)
    if mesh.is_writer():
        values = about | _text(run, trained, source, found, trained_on)
        for kind, rows in pictures.items():
            values[kind] = [_caption(row, found.class_names) for row in rows]
        charts, pairs = _charts(run, found)
        render.save_page(path, 'report.html', charts, pairs=pairs, **values)
    return path


def _text(run, trained, source, found, trained_on):
    """What the page says without a script."""
    return {
        'name': run.name,
        'data_name': source.name,
        'metrics': found.metrics,
        'headline': _headline(found),
        'multi_label': found.multi_label,
        'class_names': found.class_names,
        'counts': _counts(source, found, trained_on),
        'samples': _samples(source if trained_on else None, found),
        'trained': bool(run.records),
        'facts': _facts(run, trained),
        'fields': run_folder.flatten(run.config),
    }


def _charts(run, found):
    """What the scripts draw, and the pairs of classes that are confused most."""
    confusion = _confusion(found)
    pairs = confusion.pop('pairs') if confusion else []
    return {
        'curves': run_folder.curves(run.records),
        'calibration': found.metrics['calibration'],
        'roc': _roc(found),
        'confusion': confusion,
        'names': found.class_names,
    }, pairs


def _describe_model(trained, measured):
    metadata = trained.metadata
    return {
        'variant': metadata['model'].get('variant') or 'DenseNet',
        'which': measured.model,
        'image_size': _describe_size(trained_lib.preparation_of(metadata)),
        'made': datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'),
    }


def _describe_size(preparation):
    text = preparation.shape_text.replace('x', '×')
    height, width = preparation.shape
    return text if height == width else f'{text} (height × width)'


def _headline(found):
    """The few numbers at the top: name, value, and what is to be known of it."""
    metrics = found.metrics
    note = f'on {metrics["count"]:,} test images'
    if metrics['accuracy_interval']:
        low, high = metrics['accuracy_interval']
        note = f'95 % interval {low * 100:.1f} to {high * 100:.1f} %, {note}'
    rows = [('Accuracy', render.percent(metrics['accuracy']), note)]
    if found.multi_label:
        rows[0] = ('Labels right', rows[0][1], note)
    if metrics['top5'] is not None:
        rows.append(
            (
                'Top 5',
                render.percent(metrics['top5']),
                'right class among the first five',
            )
        )
    macro = metrics['macro']
    if macro['auroc'] is not None:
        rows.append(('AUROC', f'{macro["auroc"]:.3f}', 'mean of the classes'))
    if macro['f1'] is not None:
        rows.append(('F1', f'{macro["f1"]:.3f}', 'mean of the classes'))
    rows.append(('Loss', f'{metrics["loss"]:.3f}', 'cross-entropy, nats'))
    if metrics['calibration']:
        error = metrics['calibration']['before']['error']
        rows.append(
            ('Calibration error', render.percent(error), 'the lower the better')
        )
    return rows


def _counts(source, found, trained_on):
    """Images of each class, `[(name, to train on or None, to test on)]`."""
    several = found.multi_label
    count = len(found.class_names)

    def of(labels):
        if several:
            return (labels == 1).sum(0).tolist()
        return np.bincount(labels, minlength=count).tolist()

    train = [None] * count
    if trained_on and _reads_labels(source.train):
        train = of(source.train.labels)
    return list(zip(found.class_names, train, of(found.labels), strict=True))


def _reads_labels(examples):
    """Whether all labels can be had quickly."""
    return examples.reader.labels_in_memory or len(examples) <= _TFDS_LABELS


def _samples(source, found):
    """Training images of all classes; test images where there are none to show."""
    examples, names = found.examples, found.class_names
    labels = found.labels
    if source is not None and _reads_labels(source.train):
        examples, names = source.train, source.class_names
        labels = examples.labels
    return [
        {
            'image': gallery.to_uri(examples[position]['image'], 112),
            'caption': plots.title(labels[position], names),
        }
        for position in gallery.pick_samples(examples, labels, SAMPLES)
    ]


def _facts(run, trained):
    """What it was trained with and what that took, by name."""
    facts, environment = {}, run.environment
    if run.records:
        seconds = sum(row['seconds'] for row in run.records)
        facts['Epochs'] = str(len(run.records))
        facts['Training time'] = str(datetime.timedelta(seconds=round(seconds)))
        speed = run_folder.median(run.records, 'images_per_second')
        facts['Training speed'] = f'{speed:,.1f} images/s (median epoch)'
        waited = run_folder.median(run.records, 'input_wait_share')
        facts['Waiting for input'] = f'{waited * 100:.1f} % of the time'
        peak = max(row['peak_memory_gib'] for row in run.records)
        facts['Peak memory'] = f'{peak:.2f} GiB'
    if environment:
        many = environment['devices']
        facts['Device'] = environment['device'] + (f' × {many}' if many > 1 else '')
        names = ('system', 'python', 'jax', 'flax', 'commit')
        facts |= {n.capitalize(): environment[n] for n in names if environment.get(n)}
    variables = trained.variables['params']
    count = sum(leaf.size for leaf in _leaves(variables))
    facts['Parameters'] = f'{count:,}'
    return facts


def _leaves(tree):
    for value in tree.values():
        if hasattr(value, 'items'):
            yield from _leaves(value)
        else:
            yield value


def _caption(row, names):
    """A mistake's or an uncertain image's row with what stands below it."""
    predicted = names[row['predicted']]
    probability = render.percent(row['probability'])
    if 'present' in row:
        is_there = 'has it' if row['present'] else 'does not have it'
        return row | {
            'predicted': predicted,
            'text': f'{predicted}: {probability}, but {is_there}',
        }
    return row | {
        'predicted': predicted,
        'true': names[row['true']],
        'probability': probability,
        'true_probability': render.percent(row['true_probability']),
        'right': row['true'] == row['predicted'],
    }


def _roc(found):
    """Curves of one class against the rest, the worst first."""
    rows = []
    classes = found.metrics['classes']
    there = [place for place, row in enumerate(classes) if row['auroc'] is not None]
    for place in sorted(there, key=lambda place: classes[place]['auroc'])[:CLASSES]:
        row = classes[place]
        if found.multi_label:
            known = ~np.isnan(found.labels[:, place])
            true = found.labels[known, place] > 0.5
            curve = metrics_lib.roc(true, found.probabilities[known, place])
        else:
            true = found.labels == place
            curve = metrics_lib.roc(true, found.probabilities[:, place])
        rows.append({'name': row['name'], 'auroc': round(row['auroc'], 4), **curve})
    return rows


def _confusion(found):
    """The matrix, of the classes with most mistakes where there are very many."""
    if found.multi_label:
        return None
    names = found.class_names
    count = len(names)
    matrix = metrics_lib.confusion(found.labels, found.predicted, count)
    support = matrix.sum(1)
    mistakes = support + matrix.sum(0) - 2 * matrix.diagonal()
    kept = np.sort(np.argsort(-mistakes, kind='stable')[:CLASSES])
    inside = set(kept.tolist())
    confused = [
        (true, predicted, number)
        for true, predicted, number in found.metrics['confused']
        if true in inside and predicted in inside
    ]
    pairs = [
        {
            'true': true,
            'predicted': predicted,
            'text': f'{names[true]} taken for {names[predicted]}',
            'count': number,
            'of': int(support[true]),
        }
        for true, predicted, number in confused[:PAIRS]
    ]
    return {
        'kept': kept.tolist(),
        'all': count,
        'matrix': matrix[kept][:, kept].toarray().tolist(),
        'cells': gallery.make_cells(found, kept),
        'pairs': pairs,
    }
