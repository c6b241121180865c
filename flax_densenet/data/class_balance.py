"""Balances classes of different sizes, by sampling or by weights in the loss.

>>> import numpy as np
>>> labels = np.array([0] * 6 + [1] * 2)
>>> draws = Draws(labels, seed=0)
>>> np.bincount([labels[draws(0, slot)] for slot in range(8)]).tolist()
[4, 4]
>>> class_weights(labels, 2).tolist()
[0.6666666865348816, 2.0]
"""

import difflib
import math

import numpy as np
from grain import experimental

from flax_densenet.errors import UserError, list_first

BALANCES = ('none', 'sampler', 'loss')
# Ratio of the largest to the smallest class from which a warning is printed.
_HEAVY = 10
# Largest weight of positives that is derived from counts.
_HEAVIEST = 100.0
# Above this, index_shuffle, which takes 1 ms, is faster than a permutation.
_MANY = 10_000


class Draws:
    """A stream of examples in which all classes are equally frequent.

    The n-th draw is of class n mod C, so the classes' counts in an epoch differ by at
    most one. Every image of a class is drawn once before any is drawn again, in a
    new order each time. The stream is a function of the seed and the position only.

    With several labels per image, the positives of each label are a class, and the
    images without any positive one more. An image with two labels is in two of them.
    """

    def __init__(self, labels, seed: int):
        """Makes the stream; classes without images are never drawn.

        Args:
          Args: labels: int `[N]`, or float `[N, L]` of 0, 1, NaN and soft targets,
            which count as NaN here.
          seed: seed of the order.
        """
        labels = np.asarray(labels)
        self._total = len(labels)
        if labels.ndim == 2:
            groups = [np.flatnonzero(group) for group in _label_groups(labels)]
            self._order = np.concatenate(groups)
            self._counts = np.array([len(group) for group in groups])
        else:
            self._order = np.argsort(labels, kind='stable')
            self._counts = np.bincount(labels)
        self._starts = np.cumsum(self._counts) - self._counts
        self._classes = np.flatnonzero(self._counts)
        self._seed = seed

    def __call__(self, epoch: int, slot: int) -> int:
        """The example, 0 to N - 1, at a position of an epoch, 0 to N - 1."""
        number = int(epoch) * self._total + int(slot)
        turn, place = divmod(number, len(self._classes))
        label = int(self._classes[place])
        count = int(self._counts[label])
        round_, place = divmod(turn, count)
        place = _shuffled(place, count, [self._seed, label, round_])
        return int(self._order[self._starts[label] + place])


def _label_groups(labels):
    """The positives of each label, and the images without any: bool `[L + 1, N]`."""
    positive = labels == 1
    return np.concatenate([positive, ~positive.any(1, keepdims=True)], 1).T


def _shuffled(place, count, seed):
    """The image at a position, 0 to `count` - 1, in the random order of a seed."""
    if count < _MANY:
        return np.random.default_rng(seed).permutation(count)[place]
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return experimental.index_shuffle(place, max_index=count - 1, seed=seed, rounds=4)


def class_weights(labels, num_classes: int) -> np.ndarray:
    """Weights of the images in the loss with which all classes count equally.

    Args:
      labels: int `[N]`.

    Returns:
      float32 `[num_classes]`, on average 1 per image; 0 for a class without images.
    """
    counts = np.bincount(labels, minlength=num_classes)
    share = len(labels) / np.count_nonzero(counts)
    return np.where(counts, share / np.maximum(counts, 1), 0).astype(np.float32)


def positive_weights(text: str, labels, names) -> tuple[float, ...]:
    """The weights of positives in the loss, one for each label; empty for none.

    Args:
      text: `train.pos_weight`.
      labels: float `[N, L]` of the training images; values other than 0 and 1 are not
        counted.
      names: names of the labels.

    Raises:
      UserError: the text has another form, or names an unknown label.
    """
    if not text.strip():
        return ()
    if text.strip() == 'auto':
        positive, negative = (labels == 1).sum(0), (labels == 0).sum(0)
        ratios = negative / np.maximum(positive, 1)
        return tuple(float(x) for x in np.clip(ratios, 1 / _HEAVIEST, _HEAVIEST))
    weights = dict.fromkeys(names, 1.0)
    for part in text.split(','):
        name, equals, number = (piece.strip() for piece in part.rpartition('='))
        if equals and name not in weights:
            close = difflib.get_close_matches(name, weights, 1)
            hint = f'did you mean {close[0]}? ' if close else ''
            raise UserError(
                f'train.pos_weight={text}: {name} is not a label; {hint}'
                f'The labels are {list_first(names)}'
            )
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not 0 < weight < math.inf or (not equals and ',' in text):
            raise UserError(
                f'train.pos_weight={text} is not known; use auto, a number above 0 for '
                'all labels, or NAME=NUMBER,...'
            )
        weights |= {name: weight} if equals else dict.fromkeys(names, weight)
    return tuple(weights.values())


def describe_positive_weights(weights: tuple[float, ...], names, text: str) -> str:
    """One line with the weights of some labels."""
    pairs = [f'{n} {w:.3g}' for n, w in zip(names, weights, strict=True)]
    return f'train.pos_weight={text}: a positive weighs {list_first(pairs, 8)}'


def describe_label_draws(labels, names) -> str:
    """One line about `data.balance=sampler` with several labels per image."""
    counts = [int(group.sum()) for group in _label_groups(np.asarray(labels))]
    pairs = [
        f'{name} {count}' for name, count in zip([*names, 'none'], counts, strict=True)
    ]
    return (
        f'data.balance=sampler: draws each label, and images without any, equally '
        f'often (training images: {list_first(pairs, 8)})'
    )


def describe(labels, class_names, balance: str) -> str:
    """One line about the effect of the class sizes on a run; empty if none.

    Args:
      labels: int `[N]` of the training images.
      balance: `data.balance`.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    most, least = counts.argmax(), np.where(counts, counts, len(labels) + 1).argmin()
    sizes = (
        f'{class_names[most]} has {counts[most]} images to train on, '
        f'{class_names[least]} {counts[least]}'
    )
    if balance == 'sampler':
        share = len(labels) / np.count_nonzero(counts)
        return (
            f'data.balance=sampler: an epoch draws {share:.4g} of each class ({sizes})'
        )
    if balance == 'loss':
        weights = class_weights(labels, len(class_names))
        return (
            f'data.balance=loss: an image weighs {weights[most]:.3g} to '
            f'{weights[least]:.3g} ({sizes})'
        )
    if counts[most] < _HEAVY * counts[least]:
        return ''
    return (
        f'{sizes}: data.balance=sampler would draw all classes equally often, '
        'data.balance=loss would weight them equally'
    )
