"""What a command writes about a run that has ended: curves.png and report.html."""

import logging
import os
from typing import Any

from flax_densenet import errors
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import dataset
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.distributed import processes
from flax_densenet.errors import UserError
from flax_densenet.evaluation import fitting, results
from flax_densenet.evaluation import selection as selection_lib
from flax_densenet.report import page, plots
from flax_densenet.weights import choices as choices_lib
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
):
    """Fits decisions, draws the curves, writes the report, and logs what is there.

    Every host has to call it; one writes. A report that cannot be written is reported
    in a line, and takes nothing from the run.

    Args:
      records: of all epochs, as in `metrics.jsonl`.
      source: what was trained and tested on.
      report: whether report.html is wanted.
      renew: False if a report that is there still holds.
      batch_size: of the evaluation, over all devices of the mesh.
      threads, workers: as of `data.pipeline.eval_batches`.
      rules: what to fit of the selection part after training; None for nothing.
    """
    best = max(records, key=checkpoint_reader.rank)
    drawn = errors.is_installed('matplotlib')
    if mesh_lib.is_writer() and drawn:
        plots.save_curves(workdir, records)
    loading = {'batch_size': batch_size, 'threads': threads, 'workers': workers}
    selection = None
    if rules is not None and renew and fitting.FITTERS:
        selection = _fit(workdir, source, mesh, loading, rules)
    written = []
    if os.path.exists(os.path.join(workdir, page.REPORT_FILE)) and not renew:
        written = [page.REPORT_FILE]
    elif report and processes.broadcast(
        'report', lambda: errors.is_installed('jinja2')
    ):
        written = _save_report(workdir, source, mesh, loading, selection)
    if mesh_lib.is_writer():
        pictures = ['curves.png', 'samples.png'] if drawn else ['metrics.jsonl']
        *names, last = ['checkpoints', *written, *pictures]
        chosen = ', chosen on these test images' if len(records) > 1 else ''
        _LOGGER.info(
            f'best: epoch {best["epoch"]}, Test_acc: {best["test_accuracy"]:.1%}'
            f'{chosen}'
        )
        _LOGGER.info(f'{", ".join(names)} and {last} are in {workdir}')


def _fit(workdir, source, mesh, loading, rules):
    """Fits and saves decisions; what the model computed, None if it failed."""
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


def _save_report(workdir, source, mesh, loading, selection):
    """Writes the page of the best checkpoint; its name in a list, or an empty one."""
    _LOGGER.info(f'writing {page.REPORT_FILE}')
    try:
        trained = trained_lib.load_trained(workdir, 'best', mesh=mesh)
        names = source.class_names
        if selection is not None and selection.examples is source.test:
            found = results.from_outputs(trained, source.test, names, selection.outputs)
        else:
            found = results.collect(trained, source.test, names, **loading)
        page.save_report(workdir, trained, source, found)
    except UserError as error:
        _LOGGER.info(f'no {page.REPORT_FILE}: {error}; try: report RUN')
        return []
    return [page.REPORT_FILE]
