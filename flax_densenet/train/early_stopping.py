"""Early stopping: a run ends if its best epoch is too far back.

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
    """Whether the last `patience` epochs brought no improvement.

    Epochs are compared by `checkpoint_reader.rank`. The answer depends on the records
    alone, so a resumed run gets the same one.

    Args:
      records: the records of all epochs so far.
      patience: number of epochs; 0 never stops.
      head_epochs: epochs in which the head trained alone. They do not count, since the
        rest of the network has not learned yet.
    """
    if not patience or not records:
        return False
    since = max(_best(records)['epoch'], head_epochs)
    return records[-1]['epoch'] - since >= patience


def describe(records: list[dict[str, Any]], patience: int) -> str:
    """The end of the message about an early stop."""
    return (
        f'early after epoch {records[-1]["epoch"]}: none is better than epoch '
        f'{_best(records)["epoch"]} (train.patience={patience})'
    )


def _best(records):
    return max(records, key=checkpoint_reader.rank)
