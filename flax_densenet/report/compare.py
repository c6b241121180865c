"""`compare.html`: compares several runs, their curves and their differences."""

import datetime
import glob
import json
import os
from typing import Any

import numpy as np

from flax_densenet import settings
from flax_densenet.checkpoints import epoch_records, run_folder
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import images
from flax_densenet.errors import UserError
from flax_densenet.evaluation import result_files, results
from flax_densenet.models import factory, naming
from flax_densenet.report import (
    charts,
    diagnosis,
    folds,
    gallery,
    page,
    paired,
    render,
)
from flax_densenet.report import private as private_lib
from flax_densenet.system import paths
from flax_densenet.weights import ensembles

FILE = 'compare.html'
CLASSES, IMAGES = 40, 40  # rows of these tables
_SIGNIFICANT = 0.05
# The folder of a run or of a cross-validation has one of these.
_OF_RUNS = run_folder.METRICS_FILE, ensembles.FILE


def find_runs(names: str) -> list[str]:
    """Expands `a,b` or a pattern such as `ckpt/*` to folders.

    Folders without a run that a pattern matches are left out.

    Raises:
      UserError: a pattern matches no folder of a run.
    """
    if os.path.isdir(paths.expand(names)):  # a comma or a star in its own name
        return [paths.resolve(names, '--workdir=')]
    found = []
    for text in names.split(','):
        name = paths.resolve(text, '--workdir=')
        if not glob.has_magic(name):
            found.append(name)
            continue
        runs = [match for match in sorted(glob.glob(name)) if _is_run(match)]
        if not runs:
            raise UserError(f'--workdir={name}: no folder of a run matches')
        found += runs
    return found


def _is_run(folder):
    return any(os.path.isfile(os.path.join(folder, name)) for name in _OF_RUNS)


def save(workdirs: list[str], path: str, *, private: bool | None = None):
    """Writes a page that compares runs: metrics, curves, classes, images, settings.

    Args:
      path: path of the page.
      private: leave out pictures, file names and paths; None to do so if the settings
        of any run ask for it.

    Raises:
      UserError: a folder holds no run, or the page cannot be written.
    """
    runs = [folds.load_run(workdir) for workdir in workdirs]
    for workdir, run in zip(workdirs, runs, strict=True):
        if not run.records:
            raise UserError(
                f'--workdir={workdir} holds no run with a finished epoch; leave it '
                'out, or train there first'
            )
    folder = os.path.dirname(os.path.abspath(path))
    names = _short_names(workdirs)
    hidden = any(private_lib.is_private(run.config, private) for run in runs)
    if hidden and names == list(workdirs):
        names = [f'run {number}' for number in range(1, 1 + len(names))]
    rows = [
        {'name': name, **_summarize(run, workdir, folder)}
        for name, run, workdir in zip(names, runs, workdirs, strict=True)
    ]
    if hidden:
        rows = [_hide(row) for row in rows]
    # The best run on the data that most runs share comes first.
    rows.sort(key=lambda row: checkpoint_reader.rank(row['best']), reverse=True)
    groups = _group(rows)
    together = groups[0]
    verdicts = _compare_with_best(together)
    values = {
        'rows': [row for group in groups for row in group],
        'together': len(together),
        'verdicts': verdicts,
        'groups': [
            (group[0]['data'], [row['name'] for row in group]) for group in groups
        ],
        'charts': charts.compared(
            [{'name': r['name'], 'curves': r['curves']} for g in groups for r in g]
        ),
        'names': [row['name'] for row in together],
        'classes': _compare_classes(together),
        'disagreements': [] if hidden else _find_images(together),
        'differing': _differing(rows),
        'columns': [row['name'] for row in rows],
        'areas': any(row['mean_auroc'] is not None for row in rows),
        'validated': [row['validation'] is not None for row in rows],
        'made': datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'),
    }
    render.save_page(path, 'compare.html', {}, private=hidden, **values)


def _hide(row):
    """A row without paths; rows on the same data can still be recognized."""
    kind, _, rest = row['data'].partition(':')
    # `folder:/a: 9 test images, 2 classes`
    counts = rest.rpartition(': ')[2] if ': ' in rest else rest
    fields = private_lib.hide_fields(row['fields'])
    return row | {'link': '', 'fields': fields, 'data': f'{kind}: {counts.strip()}'}


def _summarize(run, workdir, folder):
    """A run's row of the table, with a link from `folder` to its report."""
    own = os.path.join(os.path.abspath(workdir), page.REPORT_FILE)
    best = max(run.records, key=checkpoint_reader.rank)
    places = [os.path.join(workdir, name) for name in _OF_RUNS]
    finished = max(os.path.getmtime(one) for one in places if os.path.isfile(one))
    seconds = sum(row['seconds'] for row in run.records)
    row = {
        'link': os.path.relpath(own, folder) if os.path.exists(own) else '',
        'best': best,
        'curves': run_folder.curves(run.records),
        'fields': run_folder.flatten(run.config),
        'epochs': len(run.records),
        **{
            name: epoch_records.get(best, name)
            for name in ('accuracy', 'mean_auroc', 'loss')
        },
        'validation': None,
        'diverged': diagnosis.has_diverged(epoch_records.get(best, 'loss')),
        'time': str(datetime.timedelta(seconds=round(seconds))),
        'speed': run_folder.median(run.records, 'images_per_second'),
        'memory': max(row['peak_memory_gib'] for row in run.records),
        'device': run.environment.get('device', ''),
        'date': f'{datetime.datetime.fromtimestamp(finished):%Y-%m-%d %H:%M}',
        'metrics': None,
        'versus': '',
        'images': [],
        'workdir': workdir,
        'predictions': {},
    }
    measured = result_files.folder_of_own(workdir)
    loaded = results.load(measured)
    # Metrics on other data or of an earlier checkpoint are left out.
    same = loaded and loaded[0].own and loaded[0].step == best.get('step')
    # Metrics of an ensemble on other data have no step either.
    if same and ('step' in best or loaded[0].out_of_fold):
        row['metrics'] = loaded[1]
        row['predictions'] = paired.load(measured)
        row['measured'] = measured
    if epoch_records.part_of(best) == epoch_records.VAL:
        row['validation'] = row['accuracy']
        row['accuracy'] = row['loss'] = row['mean_auroc'] = None
    if row['metrics'] is not None:
        _show_measured(row)
    row['data'] = _describe_data(row)
    row['network'] = _describe_network(run, row['metrics'])
    return row


def _show_measured(row):
    """Shows the metrics of `eval.json`, to which its intervals belong."""
    metrics = row['metrics']
    row['accuracy'], row['loss'] = metrics['accuracy'], metrics['loss']
    row['mean_auroc'] = metrics['macro']['auroc']


def _describe_data(row):
    """A description of a run's test data; runs with the same one can be compared."""
    fields, metrics = row['fields'], row['metrics']
    source = fields.get('data.source', 'unknown data')
    if metrics is None:
        return f'{source} (not measured: report RUN measures it)'
    counts = f'{metrics["count"]:,} test images, {len(metrics["classes"])} classes'
    return f'{metrics["data"]}: {counts}'


def _describe_network(run, metrics):
    variant = run_folder.flatten(run.config).get('model.variant', '')
    try:
        chosen = settings.from_saved(run.config)
        count = len(metrics['classes']) if metrics else 2
        module = factory.from_settings(chosen.model, num_classes=count)
        if metrics is None:  # the number of parameters depends on the classes
            return naming.name(module, chosen.model.variant)
        channels = chosen.preparation.channels or 3
        return naming.describe(module, chosen.model.variant, channels=channels)
    except UserError:
        return variant


def _group(rows):
    """Lists of rows that were tested on the same images, the largest first."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        tested = frozenset(row.get('predictions') or ())
        groups.setdefault((row['data'], tested), []).append(row)
    return sorted(groups.values(), key=lambda group: -len(group))


def _compare_with_best(rows):
    """Adds to each row the p-value of its difference to the best run.

    Returns:
      Sentences, one for each run except the best.
    """
    best, others = rows[0], rows[1:]
    best['versus'] = 'best'
    if any(row['metrics'] is None or not row['predictions'] for row in rows):
        return []
    scored = [paired.load_scores(row['measured']) for row in rows]
    if any(_has_other_labels(scored[0], one) for one in scored[1:]):
        return [
            'The labels of some images changed between these runs, so their '
            'differences are not tested.'
        ]
    resampled = paired.Resampled(scored)
    verdicts = []
    for place, row in enumerate(others, start=1):
        differences = resampled.compare(place, 0)
        verdicts.append(
            paired.tell(
                f'“{row["name"]}”',
                f'the best run, “{best["name"]}”',
                differences,
                comparisons=len(others),
            )
        )
        chance = differences[0].p_value
        told = 'p < 0.001' if chance < 0.001 else f'p = {chance:.3f}'
        if chance >= _SIGNIFICANT / len(others):
            told += ', not significant'
        row['versus'] = told
    return verdicts


def _has_other_labels(one, other):
    return not np.array_equal(one.labels, other.labels, equal_nan=True)


def _compare_classes(rows):
    """F1 of each class and run; classes in which runs differ most come first."""
    if len(rows) < 2 or any(row['metrics'] is None for row in rows):
        return []
    by_run = [
        {one['name']: one['f1'] for one in row['metrics']['classes']} for row in rows
    ]
    found = []
    for name in by_run[0]:
        values = [one.get(name) for one in by_run]
        known = [value for value in values if value is not None]
        spread = max(known) - min(known) if known else 0
        found.append({'name': name, 'values': values, 'spread': spread})
    return sorted(found, key=lambda row: -row['spread'])[:CLASSES]


def _find_images(rows):
    """Images on which the runs disagree, with small pictures if the files exist."""
    if len(rows) < 2 or not all(row.get('predictions') for row in rows):
        return []
    found = paired.find_disagreements([row['predictions'] for row in rows], IMAGES)
    for row in found:
        row['image'] = None
        if os.path.isfile(row['name']):
            try:
                image = images.load_image(row['name'], images.Preparation(96, 'crop'))
                row['image'] = gallery.to_uri(image, 96)
            except UserError:  # the file is damaged
                continue
    return found


def _differing(rows):
    """`(setting, values)` of the settings that differ between runs."""
    fields = [row['fields'] for row in rows]
    every = sorted(set().union(*fields))
    return [
        (field, [row.get(field, '') for row in fields])
        for field in every
        if len({json.dumps(row.get(field)) for row in fields}) > 1
    ]


def _short_names(workdirs):
    """The names of the folders; full paths if two are equal."""
    names = [os.path.basename(os.path.abspath(workdir)) for workdir in workdirs]
    return names if len(set(names)) == len(names) else list(workdirs)
