"""`report.html`: a self-contained page about the quality of a model."""

import datetime
import logging
import os

import numpy as np

from flax_densenet.checkpoints import epoch_records, run_folder
from flax_densenet.data import dataset
from flax_densenet.distributed import mesh
from flax_densenet.evaluation import intervals as intervals_lib
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.evaluation import out_of_fold, results
from flax_densenet.inference import explain
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.models import naming
from flax_densenet.report import (
    charts,
    decisions,
    diagnosis,
    doubt_charts,
    faithfulness,
    folds,
    gallery,
    headline,
    plots,
    recipe,
    render,
    subgroup_tables,
)
from flax_densenet.report import matrix as matrix_lib
from flax_densenet.report import private as private_lib
from flax_densenet.weights import trained as trained_lib

_LOGGER = logging.getLogger(__name__)
REPORT_FILE = 'report.html'
SAMPLES, MISTAKES = 24, 18  # images of these sections
CLASSES = 100  # maximum in the confusion matrix and the ROC chart
PAIRS = 12  # pairs of the most confused classes
# Rows of the table of classes.
COLUMNS = {
    'precision': 'Precision',
    'recall': 'Recall',
    'f1': 'F1',
    'auroc': 'AUROC',
    'specificity': 'Specificity',
    'average_precision': 'Average precision',
}
CELL_MAPS = 24  # images of cells with heat maps, besides those of the other sections
_POINTS = 60  # points of each ROC curve if there are many
_TFDS_LABELS = 20_000  # each has to be read from disk


def save_report(
    workdir: str,
    trained: trained_lib.Trained,
    source: dataset.Source,
    found: results.Results,
    *,
    path: str | None = None,
    trained_on: bool = True,
    own: bool = True,
    weights: str | None = None,
    how: explain.Options = explain.DEFAULT,
    pooled: out_of_fold.OutOfFold | None = None,
    private: bool | None = None,
) -> str:
    """Writes `report.html`, and `eval.json` and `predictions.csv` in the run's folder.

    Every host has to call it; one writes.

    Args:
      source: the data, with its training images if the model was trained on it.
      found: the model's results on the test images.
      path: path of the page; None for `report.html` in the run's folder.
      trained_on: False for data other than the model's own.
      own: False for other images than the run's own test images; see `results.save`.
      weights: path that the model was loaded from, if it is not a checkpoint.
      how: the method for heat maps.
      pooled: the cross-validation that `found` belongs to, or None.
      private: leave out pictures, file names and paths; None: as in the run's settings.

    Returns:
      The page's path.

    Raises:
      UserError: the folder cannot be written.
    """
    run = run_folder.load_run(workdir)
    measured = results.describe(trained, source.name, weights=weights, own=own)
    more = None
    if pooled is not None:
        measured, more = pooled.measured(), pooled.about()
    results.save(workdir, found, measured, more)
    hidden = private_lib.is_private(run.config, private)
    found = private_lib.anonymous(found) if hidden else found
    kept = _kept_classes(found)
    pictures, trust = _make_pictures(trained, found, kept, how, hidden, pooled)
    path = path or os.path.join(workdir, REPORT_FILE)
    if mesh.is_writer():
        if hidden:
            measured = private_lib.measured(measured)
        values = _describe(workdir, run, trained, source, found, measured, trained_on)
        if pooled is not None:
            values['selection'] = out_of_fold.describe_selection(pooled)
            values['folds'] = folds.describe(workdir, pooled)
        confusion = _confusion(found, kept, hidden)
        data = {
            'names': found.class_names,
            'confusion': confusion,
            'extra': {row['row']: row for row in pictures.pop('extra')},
            'choices': values['choices'],
        }
        values |= {'explained': how.describe(), 'trust': trust}
        values['subgroups'] = subgroup_tables.section(found.metrics, private=hidden)
        values['trust_charts'] = charts.faithfulness(trust) if trust else []
        if hidden:
            values = private_lib.hide(values, found)
        values |= pictures | {'confusion': confusion}
        render.save_page(path, 'report.html', data, private=hidden, **values)
    return path


def _make_pictures(trained, found, kept, how, hidden, pooled):
    """The rows of images with their heat maps, and the faithfulness of the maps."""
    if hidden:
        return {'mistakes': [], 'uncertain': [], 'extra': []}, None
    # Small batches: there are few maps, and a CPU compiles larger ones no faster.
    if pooled is None:
        predictors = [predictor_lib.Predictor(trained, batch_size=6)]
    else:
        predictors = folds.make_predictors(pooled, batch_size=6)
    pictures = _pick_pictures(found, kept)
    if how.is_slow:
        count = sum(map(len, pictures.values()))
        _LOGGER.info(f'explaining {count} images one by one: {how.describe()}')
    for rows in pictures.values():
        if pooled is not None:
            folds.add_pictures(rows, pooled, predictors, how)
        else:
            gallery.add_pictures(rows, found, predictors[0], how)
        for row in rows:
            row |= _caption(row, found.class_names)
    shown = found if pooled is None else pooled.of_fold(1)
    return pictures, faithfulness.measure(shown, predictors[0], how)


def _pick_pictures(found, kept):
    """The rows of images that get heat maps, by section; `extra` are those of cells."""
    pictures = {
        'mistakes': gallery.pick_mistakes(found, MISTAKES),
        'uncertain': gallery.pick_uncertain(found, MISTAKES),
        'extra': [],
    }
    if kept is not None:
        known = {row['row'] for rows in pictures.values() for row in rows}
        pictures['extra'] = gallery.pick_in_cells(
            found, kept, most=CELL_MAPS, known=known
        )
    return pictures


def _describe(workdir, run, trained, source, found, measured, trained_on):
    """The content of the page that needs no script."""
    labels = None
    if trained_on and _reads_labels(source.train):
        labels = source.train.labels
    fields = run_folder.flatten(run.config)
    warnings = []
    if trained_on:
        warnings = diagnosis.check_data(
            source,
            labels=labels,
            duplicates=fields.get('data.duplicates', 'report'),
            balance=fields.get('data.balance', 'none'),
        )
    curves = run_folder.curves(run.records)
    validation = None
    if trained_on and source.val is not None:
        validation = len(source.val)
        # Runs of versions with only two parts called these test images.
        curves = curves and curves | {'part': epoch_records.VAL}
    return {
        'name': run.name,
        'network': naming.describe(
            trained.module,
            trained.variant,
            channels=len(trained.mean),
        ),
        'which': measured.model,
        'cropped': found.examples.preparation.resize == 'crop',
        'image_size': _describe_size(found.examples.preparation),
        'made': datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'),
        'data_name': source.name,
        'metrics': found.metrics,
        'columns': tuple(COLUMNS.values()),
        'class_rows': _class_rows(found.metrics),
        'headline': headline.rows(found),
        'folds': None,
        'selection': headline.selection(run.records, measured, trained_on, validation),
        'multi_label': found.multi_label,
        'class_names': found.class_names,
        'counts': _counts(source, found, trained_on),
        'samples': _samples(source if trained_on else None, found),
        'curves': charts.training(curves) if curves else [],
        'diagnosis': diagnosis.diagnose_curves(run.records),
        'warnings': warnings,
        'doubt': doubt_charts.section(found),
        **decisions.describe(
            found,
            source.name,
            own=trained_on,
            positive=fields.get('train.positive_class') or None,
        ),
        'roc': _roc(found),
        'facts': recipe.facts(run),
        'command_line': run.environment.get('command'),
        'steps': recipe.next_steps(workdir),
        'fields': fields,
        'changed': recipe.changed(fields),
    }


def _class_rows(metrics):
    """Rows of the table of classes: name, support, cells of value and interval."""
    intervals = metrics['intervals'] or {}
    every = intervals.get('classes') or [{}] * len(metrics['classes'])
    if len(every) > CLASSES:  # eval.json has all classes
        every = [{}] * len(every)
    rows = [
        {
            'name': row['name'],
            'support': row['support'],
            'cells': [(row.get(name), ends.get(name)) for name in COLUMNS],
        }
        for row, ends in zip(metrics['classes'], every, strict=True)
    ]
    ends, macro = intervals.get('macro') or {}, metrics['macro']
    total = [(macro.get(name), ends.get(name)) for name in COLUMNS]
    how = intervals_lib.describe(intervals) if intervals else ''
    return {'rows': rows, 'total': total, 'how': how}


def _describe_size(preparation):
    text = preparation.shape_text.replace('x', '×')
    height, width = preparation.shape
    return text if height == width else f'{text} (height × width)'


def _counts(source, found, trained_on):
    """Images per class, `[(name, training, validation, test)]`; None: unknown."""
    several = found.multi_label
    count = len(found.class_names)

    def of(labels):
        if several:
            return (labels == 1).sum(0).tolist()
        return np.bincount(labels, minlength=count).tolist()

    train, val = [None] * count, [None] * count
    if trained_on and _reads_labels(source.train):
        train = of(source.train.labels)
    if trained_on and source.val is not None and _reads_labels(source.val):
        val = of(source.val.labels)
    return list(zip(found.class_names, train, val, of(found.labels), strict=True))


def _reads_labels(examples):
    """Whether all labels can be read quickly."""
    return examples.reader.labels_in_memory or len(examples) <= _TFDS_LABELS


def _samples(source, found):
    """Training images of all classes; test images if there are none to show."""
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


def _caption(row, names):
    """The caption of an image: `heading`, whether it is `right`, `captions`."""
    predicted, true = (render.isolate(names[row[key]]) for key in ('predicted', 'true'))
    probability = render.probability(row['probability'])
    if 'present' in row:
        says, there = row['positive'], row['present']
        verdict = {
            (True, True): 'present, correct',
            (False, False): 'absent, correct',
            (True, False): 'absent, false positive',
            (False, True): 'present, missed',
        }[says, there]
        heading = f'{predicted} {probability}: {verdict}'
        right = says == there
    else:
        right = row['true'] == row['predicted']
        heading = f'Predicted {predicted} ({probability})'
        heading += ', correct' if right else f', actual {true}'
        if not right:
            heading += f' ({render.probability(row["true_probability"])})'
    for one in row['maps']:
        name = names[one['class']]
        one['caption'] = f'Evidence for {name}'
        if one['share'] == 0:
            one['caption'] = f'No evidence for {name}'
        elif one['share'] < 0.995:
            one['caption'] += f' ({one["share"]:.0%} as strong)'
    return {'heading': heading, 'right': right}


def _roc(found):
    """Curves of one class against the rest, the worst first, and their number."""
    rows = []
    classes = found.metrics['classes']
    there = [place for place, row in enumerate(classes) if row['auroc'] is not None]
    chosen = sorted(there, key=lambda place: classes[place]['auroc'])[:CLASSES]
    points = metrics_lib.CURVE_POINTS if len(chosen) <= 10 else _POINTS
    for place in chosen:
        row = classes[place]
        if found.multi_label:
            known = ~np.isnan(found.labels[:, place])
            true = found.labels[known, place] > 0.5
            probability = found.probabilities[known, place]
        else:
            true = found.labels == place
            probability = found.probabilities[:, place]
        curve = metrics_lib.roc(true, probability, points=points)
        name = render.isolate(row['name'])
        rows.append({'name': name, 'auroc': row['auroc'], **curve})
    return {
        'chart': charts.roc(rows) if rows else '',
        'names': [
            f'{row["name"]} ({render.figure(row["auroc"])})'
            for row in rows[: len(rows) if len(rows) > 10 else 0]
        ],
    }


def _kept_classes(found):
    """The classes that the confusion matrix shows; None without a matrix."""
    if found.multi_label:
        return None
    matrix = metrics_lib.confusion(
        found.labels, found.predicted, len(found.class_names)
    )
    mistakes = matrix.sum(1) + matrix.sum(0) - 2 * matrix.diagonal()
    return np.sort(np.argsort(-mistakes, kind='stable')[:CLASSES])


def _confusion(found, kept, hidden=False):
    """The matrix; with very many classes, only those with most mistakes."""
    if kept is None:
        return None
    names = found.class_names
    shown = [render.isolate(name) for name in names]
    matrix = metrics_lib.confusion(found.labels, found.predicted, len(names))
    inside = set(kept.tolist())
    support = matrix.sum(1)
    pairs = [
        {
            'true': true,
            'predicted': predicted,
            'text': f'{shown[true]} predicted as {shown[predicted]}',
            'count': number,
            'of': int(support[true]),
        }
        for true, predicted, number in found.metrics['confused']
        if true in inside and predicted in inside
    ]
    counts = matrix[kept][:, kept].toarray()
    return {
        'kept': kept.tolist(),
        'matrix': counts.tolist(),
        'chart': matrix_lib.draw(counts, [names[c] for c in kept], kept.tolist()),
        'cells': {} if hidden else gallery.make_cells(found, kept),
        'pairs': pairs[:PAIRS],
    }
