"""Early stopping: a run ends where its best epoch lies too far back.

>>> accuracies = enumerate((0.5, 0.9, 0.8), start=1)
>>> records = [{'epoch': n, 'test_accuracy': a} for n, a in accuracies]
>>> should_stop(records, 1), should_stop(records, 2), should_stop(records, 0)
(True, False, False)
"""

from typing import Any

from flax_densenet.checkpoints import reader as checkpoint_reader


def should_stop(
    records: list[dict[str, Any]], patience: int, *, head_epochs: int = 0
) -> bool:
    """Whether `patience` epochs brought none that `checkpoint_reader.rank` puts higher.

    A function of the records alone, so a run that is resumed knows it as well.

    Args:
      records: of all epochs until now.
      patience: 0 for ever.
      head_epochs: in which the head trained alone; they do not count, since the rest
        has not learned yet.
    """
    if not patience or not records:
        return False
    since = max(_best(records)['epoch'], head_epochs)
    return records[-1]['epoch'] - since >= patience


def describe(records: list[dict[str, Any]], patience: int) -> str:
    """The end of a line about it."""
    return (
        f'early after epoch {records[-1]["epoch"]}: none is better than epoch '
        f'{_best(records)["epoch"]} (train.patience={patience})'
    )


def _best(records):
    return max(records, key=checkpoint_reader.rank)
