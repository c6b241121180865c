"""What the numbers of a run mean, in sentences: over- and underfitting, the data.

>>> row = dict(train_loss=0.5, test_loss=0.6, train_accuracy=0.8, test_accuracy=0.7)
>>> falling = [row | {'epoch': n, 'test_loss': 0.9 - 0.1 * n} for n in range(1, 6)]
>>> diagnose_curves(falling)[0].partition(':')[0]
'The test loss was still falling in the last epoch'
"""

import math
from typing import Any

from flax_densenet.data import class_balance, dataset
from flax_densenet.report import render

_RISE = 1.05  # of the test loss over its lowest value, from which it has risen
_DIVERGED = 100.0  # nats; chance among a million classes has 14
_GAP = 0.1  # of the accuracies
_LOW = 0.8  # accuracy on the training images


def has_diverged(loss: float | None) -> bool:
    """Whether a cross-entropy is one that only diverged training leaves."""
    return loss is not None and not loss < _DIVERGED


def diagnose_curves(records: list[dict[str, Any]]) -> list[str]:
    """Sentences about the curves of a run; none where they are too short to tell.

    Args:
      records: of `metrics.jsonl`.
    """
    if len(records) < 3:
        return []
    losses = [record['test_loss'] for record in records]
    last = records[-1]
    if not all(map(math.isfinite, losses)):
        return ['The loss is not finite: use a lower optimizer.learning_rate.']
    lowest = min(records, key=lambda record: record['test_loss'])
    told = []
    rose = last['test_loss'] > _RISE * lowest['test_loss']
    if rose and last['train_loss'] < lowest['train_loss']:
        told.append(
            f'The test loss has risen since epoch {lowest["epoch"]} '
            f'({render.figure(lowest["test_loss"])} to '
            f'{render.figure(last["test_loss"])}) while the training loss kept '
            'falling: the network overfits. Stronger augmentation (data.augment, '
            'data.mixup), more weight decay (optimizer.weight_decay), a smaller '
            'network or more images can help.'
        )
    elif lowest is last and losses[-2] - losses[-1] > 0.01 * losses[-1]:
        told.append(
            'The test loss was still falling in the last epoch: training longer '
            '(train.epochs) will probably help.'
        )
    gap = last['train_accuracy'] - last['test_accuracy']
    shares = (render.percent(last[f'{part}_accuracy']) for part in ('train', 'test'))
    if gap > _GAP and not told:
        told.append(
            'At the end, accuracy was {} on the training and {} on the test images: '
            'the network fits the training images better than new ones '
            '(overfitting).'.format(*shares)
        )
    elif last['train_accuracy'] < _LOW and gap < _GAP:
        told.append(
            'Even on the training images, accuracy was only {} at the end ({} on the '
            'test images): the network underfits. Train longer (train.epochs), or use '
            'a larger network or weaker augmentation. (Augmentation and dropout lower '
            'the accuracy in training.)'.format(*shares)
        )
    return told


def check_data(
    source: dataset.Source, *, labels, duplicates: str, balance: str
) -> list[str]:
    """Warnings about the data, as the terminal printed them when training began.

    Args:
      labels: of the training images; None if they are not in memory.
      duplicates, balance: the settings of these names in `data`.
    """
    warnings = []
    kinds = [line.partition('\t')[0] for line in source.duplicates]
    shared = sum(kind.startswith('training and test') for kind in kinds)
    if shared and duplicates == 'drop':
        warnings.append(
            f'{_images(shared)} appeared in both the training and the test images; '
            'the copies were left out of training.'
        )
    elif shared:
        warnings.append(
            f'{_images(shared)} appear in both the training and the test images, '
            'which makes these metrics too high. data.duplicates=drop leaves the '
            'copies out of training; duplicates.txt lists them.'
        )
    if unclear := sum(kind.endswith('several classes') for kind in kinds):
        warnings.append(
            f'{_images(unclear)} appear in several classes at once, so some labels '
            'must be wrong; duplicates.txt lists them.'
        )
    if source.skipped:
        warnings.append(
            f'{_images(len(source.skipped))} could not be read and were left out; '
            'skipped_images.txt lists them.'
        )
    line = ''
    if labels is not None and labels.ndim == 1 and balance == 'none':
        line = class_balance.describe(labels, source.class_names, balance)
    return [*warnings, f'The classes are imbalanced: {line}.'] if line else warnings


def _images(count):
    return f'{count:,} image{"" if count == 1 else "s"}'
