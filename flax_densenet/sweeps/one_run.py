"""One run of a sweep or of a cross-validation: training and its result."""

from collections.abc import Callable
from typing import Any

from flax_densenet import settings as settings_lib
from flax_densenet.checkpoints import epoch_records, run_folder
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.report import finished, plots
from flax_densenet.sweeps.record import TrialResult
from flax_densenet.system import signals
from flax_densenet.train import fit


def train(
    settings: settings_lib.Settings,
    folder: str,
    *,
    stop: signals.Stop | None,
    ends_after: Callable[[dict[str, Any]], bool] = lambda record: False,
    **options,
) -> dict[str, Any] | None:
    """Trains a run in a folder, or resumes it, and writes its final files.

    Args:
      stop, ends_after: as in `fit.fit`.
      **options: further arguments of `fit.fit`.

    Returns:
      Metrics on the test images, if they were not used for any choice; else None.
    """
    result = fit.fit(
        settings,
        folder,
        stop=stop,
        ends_after=ends_after,
        save_samples=plots.save_samples,
        **options,
    )
    tested = finished.write(folder, **result.report_options())
    result.send_files()
    return tested


def result_of(folder: str, tested: dict[str, Any] | None) -> TrialResult:
    """The result of the run in a folder.

    Args:
      tested: result of `train`.
    """
    records = run_folder.load_run(folder).records
    best = max(records, key=checkpoint_reader.rank)
    return TrialResult(
        figures=[checkpoint_reader.rank(record)[0] for record in records],
        best_epoch=1 + records.index(best),
        loss=epoch_records.get(best, 'loss'),
        seconds=sum(record['seconds'] for record in records),
        test=_test_figure(tested, best),
    )


def _test_figure(metrics, best):
    """The metric on test images not used for any choice; None if there are none."""
    if metrics is None:
        return None
    if epoch_records.get(best, 'mean_auroc') is not None:
        return metrics['macro']['auroc']
    return metrics['accuracy']
