"""The line printed after an epoch: a log line in files, a table row on a terminal."""

import time
from typing import Any

from flax_densenet.checkpoints import epoch_records
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.evaluation import evaluate
from flax_densenet.system import terminal


def format_epoch(record: dict[str, Any]) -> str:
    """The line of an epoch in logs and files."""
    auroc, part = '', epoch_records.part_of(record).capitalize()
    if (area := epoch_records.get(record, 'mean_auroc', ...)) is not ...:
        auroc = f'{part}_auroc: {evaluate.format_auroc(area)}, '
    return (
        f'Epoch: {record["epoch"]:2d}. '
        f'Train_acc: {record["train_accuracy"] * 100:.1f}%, '
        f'Train_loss: {record["train_loss"]:.3f}, '
        f'{part}_acc: {epoch_records.get(record, "accuracy") * 100:.1f}%, '
        f'{part}_loss: {epoch_records.get(record, "loss"):.3f}, '
        f'{auroc}Lr: {record["learning_rate"]:.2E}'
    )


class EpochLines:
    """The lines of a run's epochs, in order.

    Args:
      epochs: number of epochs of the run.
      done: epochs that were finished before this start.
    """

    def __init__(self, epochs: int, done: int):
        self._epochs, self._done = epochs, done
        self._began = time.monotonic()
        self._headed = False

    def line(self, records: list[dict[str, Any]]) -> str:
        """The line of the last record; on a terminal a row, the first with a heading.

        Rows have at most 80 columns; `*` marks the best epoch so far.
        """
        record = records[-1]
        if not terminal.is_interactive():
            return format_epoch(record)
        part = epoch_records.part_of(record)
        areas = f'{part}_mean_auroc' in record
        heading = ''
        if not self._headed:
            heading = terminal.paint(_heading(part, areas), 'bold') + '\n'
        self._headed = True
        best = max(records, key=checkpoint_reader.rank) is record
        row = _row(record, self._epochs, best, self._left(record['epoch']), areas)
        return heading + (terminal.paint(row, 'green') if best else row)

    def _left(self, epoch):
        """Estimated time for the remaining epochs."""
        if epoch >= self._epochs:
            return ''
        each = (time.monotonic() - self._began) / max(epoch - self._done, 1)
        return terminal.format_duration(each * (self._epochs - epoch))


def _heading(part, areas):
    auroc = f'{"AUROC":>7}' if areas else ''
    return (
        f'  {"epoch":>9}  {"train acc":>9} {"loss":>8}'
        f'  {f"{part} acc":>9} {"loss":>8}'
        f'{auroc}  {"rate":>8}  {"time left":>10}'
    )


def _row(record, epochs, best, left, areas):
    auroc = ''
    if areas:
        auroc = f'{evaluate.format_auroc(epoch_records.get(record, "mean_auroc")):>7}'
    number = f'{record["epoch"]}/{epochs}'
    return (
        f'{"*" if best else " "} {number:>9}'
        f'  {record["train_accuracy"] * 100:>8.1f}% {_loss(record["train_loss"]):>8}'
        f'  {epoch_records.get(record, "accuracy") * 100:>8.1f}%'
        f' {_loss(epoch_records.get(record, "loss")):>8}'
        f'{auroc}  {record["learning_rate"]:>8.1E}  {left:>10}'
    )


def _loss(value):
    return f'{value:.3f}' if abs(value) < 1e4 else f'{value:.1e}'
