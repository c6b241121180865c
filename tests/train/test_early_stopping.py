"""When a run has waited long enough for a better epoch."""

import pytest

from flax_densenet import UserError
from flax_densenet.train import early_stopping, fit
from helpers.runs import tiny_config


def over_at(accuracies, epochs, **fields):
    """The epoch after which a run would end, or None."""
    records = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        records.append({'epoch': epoch, 'test_accuracy': accuracy, 'test_loss': 1.0})
        if early_stopping.should_stop(records, epochs, **fields):
            return epoch
    return None


def test_epochs_without_a_better_one():
    accuracies = [0.5, 0.6, 0.6, 0.55, 0.7, 0.7, 0.7, 0.7]
    assert over_at(accuracies, 0) is None
    assert over_at(accuracies, 1) == 3  # as good is not better
    assert over_at(accuracies, 2) == 4
    assert over_at(accuracies, 3) == 8
    assert over_at(accuracies, 4) is None
    # The head's epochs do not count.
    assert over_at(accuracies, 1, head_epochs=3) == 4
    assert over_at([0.9, *accuracies], 2, head_epochs=4) == 6
    # A loss that is lower makes the better one of equals; nan is the worst of all.
    records = [
        {'epoch': n, 'test_accuracy': 0.5, 'test_loss': loss}
        for n, loss in enumerate((2.0, float('nan'), 1.5), start=1)
    ]
    assert early_stopping.should_stop(
        records[:2], 1
    ) and not early_stopping.should_stop(records, 1)
    assert not early_stopping.should_stop([], 1)


def test_what_is_said():
    records = [{'epoch': n, 'test_accuracy': a} for n, a in ((1, 0.5), (2, 0.4))]
    assert early_stopping.describe(records, 1) == (
        'early after epoch 2: none is better than epoch 1 (train.patience=1)'
    )


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'train.patience': -1}, 'train.patience=-1 must be from 0 to 1000000'),
        ({'train.ema': 1.0}, 'train.ema=1 must be 0 .off. or a decay'),
        ({'train.loss': 'mse'}, 'train.loss=mse is not known; use'),
        (
            {'optimizer.decay': 'no'},
            'optimizer.decay=no is not known; use all, kernels',
        ),
        ({'data.tta': 'ten'}, 'data.tta=ten is not known; use none, flip'),
    ],
)
def test_bad_fields_stop_before_anything_is_written(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fit.fit(tiny_config(**overrides), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()
