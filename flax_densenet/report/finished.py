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
from flax_densenet.evaluation import results
from flax_densenet.report import page, plots
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
):
    """Draws the curves, writes the report, and logs what is in the folder.

    Every host has to call it; one writes. A report that cannot be written is reported
    in a line, and takes nothing from the run.

    Args:
      records: of all epochs, as in `metrics.jsonl`.
      source: what was trained and tested on.
      report: whether report.html is wanted.
      renew: False if a report that is there still holds.
      batch_size: of the evaluation, over all devices of the mesh.
      threads, workers: as of `data.pipeline.eval_batches`.
    """
    best = max(records, key=checkpoint_reader.rank)
    drawn = errors.is_installed('matplotlib')
    if mesh_lib.is_writer() and drawn:
        plots.save_curves(workdir, records)
    written = []
    if os.path.exists(os.path.join(workdir, page.REPORT_FILE)) and not renew:
        written = [page.REPORT_FILE]
    elif report and processes.broadcast(
        'report', lambda: errors.is_installed('jinja2')
    ):
        loading = {'batch_size': batch_size, 'threads': threads, 'workers': workers}
        written = _save_report(workdir, source, mesh, loading)
    if mesh_lib.is_writer():
        pictures = ['curves.png', 'samples.png'] if drawn else ['metrics.jsonl']
        *names, last = ['checkpoints', *written, *pictures]
        chosen = ', chosen on these test images' if len(records) > 1 else ''
        _LOGGER.info(
            f'best: epoch {best["epoch"]}, Test_acc: {best["test_accuracy"]:.1%}'
            f'{chosen}'
        )
        _LOGGER.info(f'{", ".join(names)} and {last} are in {workdir}')


def _save_report(workdir, source, mesh, loading):
    """Writes the page of the best checkpoint; its name in a list, or an empty one."""
    _LOGGER.info(f'writing {page.REPORT_FILE}')
    try:
        trained = trained_lib.load_trained(workdir, 'best', mesh=mesh)
        found = results.collect(trained, source.test, source.class_names, **loading)
        page.save_report(workdir, trained, source, found)
    except UserError as error:
        _LOGGER.info(f'no {page.REPORT_FILE}: {error}; try: report RUN')
        return []
    return [page.REPORT_FILE]
