"""The sections of a report that only a cross-validation has: its folds."""

import dataclasses
import os
import statistics
from collections.abc import Sequence
from typing import Any

from flax_densenet.checkpoints import epoch_records, run_folder
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.evaluation import out_of_fold, results
from flax_densenet.inference import explain
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.report import charts, gallery
from flax_densenet.weights import ensembles

_COLORED = 8  # folds with separate colors


def make_predictors(
    found: out_of_fold.OutOfFold, batch_size: int
) -> list[predictor_lib.Predictor]:
    """The models of the folds for heat maps, without calibration and thresholds."""
    predictors = [
        predictor_lib.Predictor(fold.trained.without_decisions(), batch_size)
        for fold in found.folds
    ]
    for predictor in predictors[1:]:
        predictor.programs.share(predictors[0].programs)
    return predictors


def add_pictures(
    rows: Sequence[dict[str, Any]],
    found: out_of_fold.OutOfFold,
    predictors: Sequence[predictor_lib.Predictor],
    how: explain.Options,
):
    """`gallery.add_pictures`, with maps of the model not trained on the image."""
    for fold, predictor in zip(found.folds, predictors, strict=True):
        own = [row for row in rows if found.fold_of[row['row']] == fold.number]
        gallery.add_pictures(own, found.results, predictor, how)


def describe(workdir: str, found: out_of_fold.OutOfFold) -> dict[str, Any]:
    """The section on the folds: a table, its summary rows, a chart of all epochs."""
    mean, spread = found.summarize()
    columns = {'accuracy': 'Accuracy', 'auroc': 'AUROC', 'f1': 'F1', 'loss': 'Loss'}
    if found.results.multi_label:
        columns['accuracy'] = 'Label accuracy'
    return {
        'rows': [
            {
                'number': fold.number,
                'link': _link(workdir, fold.name),
                'count': fold.count,
                'epoch': fold.epoch,
                'metrics': fold.metrics,
            }
            for fold in found.folds
        ],
        'mean': mean,
        'spread': spread,
        'columns': columns,
        'chart': _draw(workdir, found),
        'test': _describe_test(workdir),
    }


def _describe_test(workdir):
    """The result of the ensemble on the test part of the data, if there is one."""
    loaded = results.load(os.path.join(workdir, out_of_fold.TEST))
    if loaded is None:
        return None
    metrics = loaded[1]
    values = metrics | metrics['macro']
    return {'count': metrics['count'], 'interval': metrics['accuracy_interval']} | {
        'metrics': {name: values[name] for name in out_of_fold.METRICS}
    }


def _link(workdir, name):
    """A link to a page or picture of a fold's run, or ''."""
    for file in ('report.html', 'curves.png'):
        if os.path.isfile(os.path.join(workdir, name, file)):
            return f'{name}/{file}'
    return ''


def _draw(workdir, found):
    """A chart of the metric that chooses the epoch, for each fold; or ''."""
    lines, named = [], []
    part, areas = '', False
    for place, fold in enumerate(found.folds):
        records = run_folder.load_run(os.path.join(workdir, fold.name)).records
        if not records:
            continue
        style = f's{place}' if place < _COLORED else 'faint'
        name = f'fold {fold.number}'
        part = epoch_records.WORDS[epoch_records.part_of(records[-1])]
        areas = epoch_records.get(records[-1], 'mean_auroc') is not None
        named.append((style, name))
        lines.append(
            {
                'name': name,
                'style': style,
                'group': name,
                'x': [record['epoch'] for record in records],
                'y': [checkpoint_reader.rank(record)[0] for record in records],
            }
        )
    if not lines or max(len(line['x']) for line in lines) < 2:
        return ''
    unit = f'{part} {"mean AUROC" if areas else "accuracy"}'
    unit = unit[0].upper() + unit[1:]
    chart = charts.by_epoch(lines, title=unit, unit=unit, percent=not areas)
    return charts.figure(
        unit, chart, charts.legend(named, button=True), id='folds-chart'
    )


def load_run(workdir: str) -> run_folder.RunRecord:
    """`run_folder.load_run`; for a cross-validation the mean of its folds by epoch.

    These records have no step, like its `eval.json`. Seconds are the sum over folds.
    """
    run = run_folder.load_run(workdir)
    if run.records or not ensembles.is_ensemble(workdir):
        return run
    members = [
        run_folder.load_run(os.path.join(workdir, name)).records
        for name in ensembles.read(workdir).members
    ]
    records = [_mean_record(rows) for rows in zip(*members, strict=False)]
    return dataclasses.replace(run, records=records)


def _mean_record(rows):
    """Combines the records of an epoch from all folds."""
    made = {}
    for name, value in rows[0].items():
        values = [row.get(name) for row in rows]
        if type(value) in (int, float) and None not in values:
            made[name] = statistics.fmean(values)
    made['epoch'] = rows[0]['epoch']
    made['seconds'] = sum(row['seconds'] for row in rows)
    made.pop('step', None)
    return made
