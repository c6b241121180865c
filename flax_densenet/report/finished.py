"""The files about a finished run: curves.png, report.html and the fitted decisions."""

import logging
import os
from typing import Any

from flax_densenet import errors
from flax_densenet.checkpoints import epoch_records
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import dataset
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.distributed import processes
from flax_densenet.errors import UserError
from flax_densenet.evaluation import fitting, result_files, results
from flax_densenet.evaluation import selection as selection_lib
from flax_densenet.report import figures, plots
from flax_densenet.report import page as page_lib
from flax_densenet.weights import choices as choices_lib
from flax_densenet.weights import decisions as decisions_lib
from flax_densenet.weights import trained as trained_lib

_LOGGER = logging.getLogger(__name__)


def write(
    workdir: str,
    records: list[dict[str, Any]],
    source: dataset.Source,
    *,
    report: bool,
    renew: bool,
    mesh,
    batch_size: int,
    threads: int,
    workers: int,
    rules: selection_lib.Rules | None = None,
) -> dict[str, Any] | None:
    """Fits decisions, draws the curves, measures the test images, writes the report.

    Logs the results. Every host has to call it; one writes. If the report cannot be
    written, a line says why, and the run is not affected.

    Args:
      records: the records of all epochs, as in `metrics.jsonl`.
      source: the data of the run.
      report: whether to write report.html.
      renew: False if an existing report is still valid.
      batch_size: batch size of the evaluation, over all devices of the mesh.
      threads, workers: as in `data.pipeline.eval_batches`.
      rules: what to fit on the selection images after training; None for nothing.

    Returns:
      The metrics of the best checkpoint on the test images, as in `eval.json`; None if
      the test images chose the best epoch, or cannot be measured.
    """
    best = max(records, key=checkpoint_reader.rank)
    drawn = errors.is_installed('matplotlib')
    if mesh_lib.is_writer() and drawn:
        plots.save_curves(workdir, records)
    loading = {'batch_size': batch_size, 'threads': threads, 'workers': workers}
    selection = None
    wanted = rules is not None and rules.fit_anything
    if wanted and (renew or _has_other_rule(workdir, source, rules)):
        selection = _fit(workdir, source, mesh, loading, rules)
        renew = renew or selection is not None
    known = None
    if source.val is not None and not renew:
        known = processes.broadcast('known', lambda: _known(workdir, source, best))
    has_page = os.path.exists(os.path.join(workdir, page_lib.REPORT_FILE)) and not renew
    wants_page = (
        report
        and not has_page
        and processes.broadcast('report', lambda: errors.is_installed('jinja2'))
    )
    if wants_page or (source.val is not None and known is None):
        found = _measure(workdir, source, mesh, loading, selection, page=wants_page)
        has_page = has_page or (wants_page and found is not None)
        known = found
    if mesh_lib.is_writer():
        pictures = ['curves.png', 'samples.png'] if drawn else ['metrics.jsonl']
        written = [page_lib.REPORT_FILE] if has_page else []
        *names, last = ['checkpoints', *written, *pictures]
        _LOGGER.info(_describe_best(best, len(records), source, known))
        _LOGGER.info(f'{", ".join(names)} and {last} are in {workdir}')
    return None if source.val is None else known


def _known(workdir, source, best):
    """The metrics in eval.json, if they are of the best checkpoint for these images."""
    loaded = results.load(result_files.folder_of_own(workdir))
    if loaded is None or loaded[0].step != best.get('step'):
        return None
    measured, metrics = loaded
    same = measured.data == source.name and metrics['count'] == len(source.test)
    return metrics if same else None


def _describe_best(best, epochs, source, metrics):
    """The line about the best epoch and its result on the test images."""
    part = epoch_records.part_of(best).capitalize()
    line = f'best: epoch {best["epoch"]}, {part}_acc: '
    line += f'{epoch_records.get(best, "accuracy"):.1%}'
    if source.val is None:
        return line + (', chosen on these test images' if epochs > 1 else '')
    if metrics is None:
        return line
    line += f'; Test_acc: {metrics["accuracy"]:.1%}'
    if metrics['accuracy_interval']:
        low, high = metrics['accuracy_interval']
        line += f' ({low:.1%} to {high:.1%})'
    elif metrics['macro']['auroc'] is not None:
        line += f', Test_auroc: {metrics["macro"]["auroc"]:.3f}'
    count = metrics['count']
    return (
        f'{line}, measured once on {count:,} test images, which were not used for any '
        'choice'
    )


def _has_other_rule(workdir, source, rules):
    """Whether the settings of a trained run now request other thresholds."""
    if not rules.threshold:
        return False
    try:
        found = decisions_lib.load(workdir, len(source.class_names))
    except UserError:
        return True
    thresholds = found and found.thresholds
    return not thresholds or thresholds.rule != rules.threshold


def _fit(workdir, source, mesh, loading, rules):
    """Fits and saves decisions. Returns the model's outputs, or None if it failed."""
    try:
        trained = trained_lib.load_trained(
            workdir, 'best', mesh=mesh, choices=choices_lib.Choices(raw=True)
        )
        selection = selection_lib.select(
            trained, source, features=rules.need_features, **loading
        )
        fitting.save(workdir, fitting.fit(selection, rules))
    except UserError as error:
        _LOGGER.info(f'not calibrated: {error}; try: calibrate RUN')
        return None
    return selection


def _measure(workdir, source, mesh, loading, selection, *, page):
    """Metrics of the best checkpoint on the test images; None if that failed.

    Writes eval.json and, if requested, the report.
    """
    if page:
        _LOGGER.info(f'writing {page_lib.REPORT_FILE}')
    try:
        trained = trained_lib.load_trained(workdir, 'best', mesh=mesh)
        names = source.class_names
        if selection is not None and selection.examples is source.test:
            found = results.from_outputs(trained, source.test, names, selection.outputs)
        else:
            found = results.collect(trained, source.test, names, **loading)
        if page:
            page_lib.save_report(workdir, trained, source, found)
            if mesh_lib.is_writer() and errors.is_installed('matplotlib'):
                figures.save_confusion(workdir, found)
        else:
            measured = results.describe(trained, source.name)
            results.save(workdir, found, measured)
    except UserError as error:
        what = (
            f'no {page_lib.REPORT_FILE}'
            if page
            else 'the test images were not measured'
        )
        command = 'report' if page else 'eval'
        _LOGGER.info(f'{what}: {error}; try: {command} RUN')
        return None
    return found.metrics
