"""Classes of very different sizes: drawn evenly, or weighed in the loss.

>>> import numpy as np
>>> labels = np.array([0] * 6 + [1] * 2)
>>> draws = Draws(labels, seed=0)
>>> np.bincount([labels[draws(0, slot)] for slot in range(8)]).tolist()
[4, 4]
>>> class_weights(labels, 2).tolist()
[0.6666666865348816, 2.0]
"""

import numpy as np
from grain import experimental

BALANCES = ('none', 'sampler', 'loss')
# From this ratio on of the largest class to the smallest, a line says so.
_HEAVY = 10
# From here on index_shuffle is faster than an order of all; for few it takes 1 ms.
_MANY = 10_000


class Draws:
    """Which example stands where in a stream that draws all classes equally often.

    The n-th draw of the stream is of class n mod C, so an epoch has each class equally
    often, but for one; of a class, each image comes once before any comes again, in an
    order of its own each time. A function of the seed and the place alone.
    """

    def __init__(self, labels, seed: int):
        """Args: labels int `[N]`, classes without an image are left out; seed."""
        labels = np.asarray(labels)
        self._order = np.argsort(labels, kind='stable')
        self._counts = np.bincount(labels)
        self._starts = np.cumsum(self._counts) - self._counts
        self._classes = np.flatnonzero(self._counts)
        self._seed = seed

    def __call__(self, epoch: int, slot: int) -> int:
        """The example's position, from 0 to N - 1, of a slot in 0 to N - 1."""
        number = int(epoch) * len(self._order) + int(slot)
        turn, place = divmod(number, len(self._classes))
        label = int(self._classes[place])
        count = int(self._counts[label])
        round_, place = divmod(turn, count)
        place = _shuffled(place, count, [self._seed, label, round_])
        return int(self._order[self._starts[label] + place])


def _shuffled(place, count, seed):
    """Where a place from 0 to `count` - 1 goes in an order of its own by each seed."""
    if count < _MANY:
        return np.random.default_rng(seed).permutation(count)[place]
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return experimental.index_shuffle(place, max_index=count - 1, seed=seed, rounds=4)


def class_weights(labels, num_classes: int) -> np.ndarray:
    """Of each class's images in the loss: all classes weigh alike, images 1 on average.

    Args:
      labels: int `[N]`.

    Returns:
      float32 `[num_classes]`; 0 for a class without an image.
    """
    counts = np.bincount(labels, minlength=num_classes)
    share = len(labels) / np.count_nonzero(counts)
    return np.where(counts, share / np.maximum(counts, 1), 0).astype(np.float32)


def describe(labels, class_names, balance: str) -> str:
    """What the classes' sizes mean for a run, in a line; empty where it needs no word.

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
        'data.balance=loss weigh them alike'
    )
