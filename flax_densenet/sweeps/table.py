"""The table of a sweep: one row for each setting, the best first."""

import csv
import dataclasses
import os
import statistics

from flax_densenet.report import diagnosis, render
from flax_densenet.sweeps import record as sweep_record
from flax_densenet.system import atomic

FILE = 'sweep.csv'
_ORDER = {'done': 0, 'training': 1, 'pruned': 2, 'failed': 3}


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting and its result.

    Attributes:
      folder: folder of the setting, below the sweep's.
      count: number of seeds it was trained with.
      mean: mean of the metric at each run's best epoch; None without a run.
      spread: sample standard deviation of these; None for fewer than two.
      best: the highest of them, with its seed.
      loss: mean of the losses at these epochs.
      epochs: the largest number of epochs of a run.
      test: mean of the metric on the test images; None if they chose the epoch.
    """

    setting: sweep_record.SettingResult
    folder: str
    count: int = 0
    mean: float | None = None
    spread: float | None = None
    best: float | None = None
    best_seed: str = ''
    loss: float | None = None
    epochs: int = 0
    seconds: float = 0.0
    test: float | None = None

    @property
    def diverged(self) -> bool:
        """Whether the loss of the runs diverged."""
        return self.setting.state == 'done' and diagnosis.has_diverged(self.loss)

    @property
    def state(self) -> str:
        """The state in words."""
        if self.setting.state == 'pruned':
            return f'pruned at epoch {self.epochs}'
        if self.diverged:
            return 'diverged'
        return {'training': 'unfinished'}.get(self.setting.state, self.setting.state)


def make_rows(kept: sweep_record.SweepRecord) -> list[Row]:
    """All settings: finished ones by their mean, then those that were pruned or failed.

    With equal means, the lower loss comes first.
    """
    rows = [_row(kept, setting) for setting in kept.settings]
    return sorted(
        rows,
        key=lambda row: (
            _ORDER[row.setting.state],
            -(row.mean if row.mean is not None else -1),
            row.loss if row.loss is not None else 0,
        ),
    )


def _row(kept, setting):
    runs, folder = setting.runs, kept.folder(setting)
    if not runs:
        return Row(setting, folder)
    figures = [run.best for run in runs.values()]
    best_seed = max(runs, key=lambda seed: (runs[seed].best, -runs[seed].loss))
    return Row(
        setting,
        folder,
        count=len(runs),
        mean=statistics.fmean(figures),
        spread=statistics.stdev(figures) if len(runs) > 1 else None,
        best=runs[best_seed].best,
        best_seed=best_seed,
        loss=statistics.fmean(run.loss for run in runs.values()),
        epochs=max(len(run.figures) for run in runs.values()),
        seconds=sum(run.seconds for run in runs.values()),
        test=_mean([run.test for run in runs.values()]),
    )


def _mean(values):
    """The mean; None unless all values are known."""
    return None if None in values else statistics.fmean(values)


def show(figure: float | None, name: str) -> str:
    """`95.3%`, an AUROC as `0.953`; a dash for None."""
    if figure is None:
        return '-'
    return render.percent(figure) if name.endswith('accuracy') else f'{figure:.3f}'


def format_rows(kept: sweep_record.SweepRecord, rows: list[Row]) -> str:
    """The table for a terminal, and the reasons of failed settings."""
    names = kept.fields
    head = ['trial', *kept.short_fields, 'mean', 'spread', 'best', 'seeds', 'state']
    cells = [
        [
            os.path.basename(row.folder),
            *(row.setting.fields.get(name, '-') for name in names),
            *(show(x, kept.figure) for x in (row.mean, row.spread, row.best)),
            str(row.count),
            row.state,
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [
        '  '.join(
            cell.rjust(width) if 0 < place < len(head) - 1 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, *cells]
    ]
    lines += [
        f'trial {os.path.basename(row.folder)} failed: {row.setting.why}'
        for row in rows
        if row.setting.state == 'failed'
    ]
    return '\n'.join(lines)


def save(workdir: str, kept: sweep_record.SweepRecord, rows: list[Row]):
    """Writes `sweep.csv` with all digits."""
    head = ['trial', *kept.fields, 'state', 'mean', 'spread', 'best', 'best_seed']
    head += ['seeds', f'{kept.part}_loss', 'epochs', 'seconds', 'folder', 'why']
    with atomic.replacing(os.path.join(workdir, FILE), newline='') as file:
        table = csv.writer(file)
        table.writerow(head)
        for row in rows:
            figures = (row.mean, row.spread, row.best)
            table.writerow(
                [
                    os.path.basename(row.folder),
                    *(row.setting.fields.get(name, '') for name in kept.fields),
                    row.setting.state,
                    *('' if x is None else f'{x:.6g}' for x in figures),
                    row.best_seed,
                    row.count,
                    '' if row.loss is None else f'{row.loss:.6g}',
                    row.epochs,
                    f'{row.seconds:.0f}',
                    row.folder,
                    row.setting.why,
                ]
            )
