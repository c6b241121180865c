"""Sentences on the metrics of a run: overfitting, underfitting and data problems.

>>> row = dict(train_loss=0.5, val_loss=0.6, train_accuracy=0.8, val_accuracy=0.7)
>>> falling = [row | {'epoch': n, 'val_loss': 0.9 - 0.1 * n} for n in range(1, 6)]
>>> diagnose_curves(falling)[0].partition(':')[0]
'The validation loss was still falling in the last epoch'
"""

import math
from typing import Any

from flax_densenet.checkpoints import epoch_records
from flax_densenet.data import class_balance, dataset
from flax_densenet.report import render

_RISE = 1.05  # significant rise of the test loss over its minimum
_DIVERGED = 100.0  # nats; guessing among a million classes has 14
_GAP = 0.1  # difference of accuracies
_LOW = 0.8  # accuracy on the training images


def has_diverged(loss: float | None) -> bool:
    """Whether a cross-entropy is so high that training must have diverged."""
    return loss is not None and not loss < _DIVERGED


def diagnose_curves(records: list[dict[str, Any]]) -> list[str]:
    """Sentences about the curves of a run; none if they are too short.

    Args:
      records: from `metrics.jsonl`.
    """
    if len(records) < 3:
        return []
    losses = [epoch_records.get(record, 'loss') for record in records]
    last = records[-1]
    held = epoch_records.WORDS[epoch_records.part_of(last)]
    if not all(map(math.isfinite, losses)):
        return ['The loss is not finite: use a lower optimizer.learning_rate.']
    lowest = records[losses.index(min(losses))]
    told = []
    rose = losses[-1] > _RISE * min(losses)
    if rose and last['train_loss'] < lowest['train_loss']:
        told.append(
            f'The {held} loss has risen since epoch {lowest["epoch"]} '
            f'({render.figure(min(losses))} to '
            f'{render.figure(losses[-1])}) while the training loss kept '
            'falling: the network overfits. Stronger augmentation (data.augment, '
            'data.mixup), more weight decay (optimizer.weight_decay), a smaller '
            'network or more images can help.'
        )
    elif lowest is last and losses[-2] - losses[-1] > 0.01 * losses[-1]:
        told.append(
            f'The {held} loss was still falling in the last epoch: training longer '
            '(train.epochs) will probably help.'
        )
    accuracy = epoch_records.get(last, 'accuracy')
    gap = last['train_accuracy'] - accuracy
    shares = map(render.percent, (last['train_accuracy'], accuracy))
    if gap > _GAP and not told:
        told.append(
            'At the end, accuracy was {} on the training and {} on the {} images: '
            'the network fits the training images better than new ones '
            '(overfitting).'.format(*shares, held)
        )
    elif last['train_accuracy'] < _LOW and gap < _GAP:
        told.append(
            'Even on the training images, accuracy was only {} at the end ({} on the '
            '{} images): the network underfits. Train longer (train.epochs), or use '
            'a larger network or weaker augmentation. (Augmentation and dropout lower '
            'the accuracy in training.)'.format(*shares, held)
        )
    return told


def check_data(
    source: dataset.Source, *, labels, duplicates: str, balance: str
) -> list[str]:
    """Warnings about the data, as printed at the start of training.

    Args:
      labels: labels of the training images; None if they are not in memory.
      duplicates, balance: the settings of these names in `data`.
    """
    warnings = []
    kinds = [line.partition('\t')[0] for line in source.duplicates]
    parts = 'both the training and the test images'
    if source.val is not None:
        parts = 'more than one part of the data'
    shared = sum(' and ' in kind for kind in kinds)
    if shared and duplicates == 'drop':
        warnings.append(
            f'{_images(shared)} appeared in {parts}; the copies were left out of '
            'training.'
        )
    elif shared:
        warnings.append(
            f'{_appear(shared)} in {parts}, which makes these metrics too high. '
            'data.duplicates=drop leaves the copies out of training; '
            'duplicates.txt lists them.'
        )
    if unclear := sum(kind.endswith('several classes') for kind in kinds):
        warnings.append(
            f'{_appear(unclear)} in several classes at once, so some labels '
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


def _appear(count):
    return f'{_images(count)} appear{"s" if count == 1 else ""}'
