"""Sets of classes that contain the true one with a chosen probability.

Split conformal prediction (Vovk et al., 2005) with the rule of the smallest sets on
average (Sadinle et al., arXiv 1609.00451; LAC in MAPIE): a class is in the set of an
image if its probability is at least a threshold. With n validation images, the
threshold for a coverage of 1 - a is the k-th smallest probability of a true class,
where k is a * (n + 1) rounded down. The set of a new image then contains its true class
with a probability of at least 1 - a, if the image comes from the same distribution as
the validation images. This holds on average over images, not for each class.

If images have several labels, each label has its own threshold, computed from the
images with that label. A label of an image is in its set with a probability of at least
1 - a.

>>> probabilities = np.linspace(0.05, 0.95, 19)
>>> sets = ConformalSets((19,), probabilities)
>>> sets.thresholds(0.9).round(3).tolist()  # the second smallest of 19
[0.1]
>>> sets.contains(np.array([[0.8, 0.15, 0.05]]), 0.9).tolist()
[[True, True, False]]
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.weights import decision_entry

# Thresholds are lowered by this share, so that rounding to float32 excludes no class.
_ROUNDING = 1e-6
_IN_TABLES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


@dataclasses.dataclass(frozen=True, eq=False)
class ConformalSets(decision_entry.Entry):
    """Probabilities of the true classes of validation images.

    Attributes:
      counts: the number of images; with several labels, the number for each label.
      probabilities: float32 or float64 `[sum of counts]`, ascending within each label.
      several: whether an image can have several labels.
    """

    counts: tuple[int, ...]
    probabilities: np.ndarray
    several: bool = False

    def check(self, classes: int):
        """Raises `ValueError` with what is wrong."""
        if len(self.counts) != (classes if self.several else 1):
            raise ValueError(f'counts has {len(self.counts)} values')
        if min(self.counts) < 0 or self.probabilities.shape != (sum(self.counts),):
            raise ValueError('counts and probabilities differ')
        if ((self.probabilities < 0) | (self.probabilities > 1)).any():
            raise ValueError('probabilities are not from 0 to 1')
        for part in self._parts():
            if (np.diff(part) < 0).any():
                raise ValueError('probabilities are not sorted')

    def _parts(self):
        return np.split(self.probabilities, np.cumsum(self.counts)[:-1])

    def thresholds(self, coverage: float) -> np.ndarray:
        """The lowest probability in a set: float64 `[1]`, or `[L]` for L labels.

        With fewer images than `images_needed` it is 0, so every class is in the set.

        Raises:
          UserError: coverage is not between 0 and 1.
        """
        check_coverage(coverage)
        found = []
        for part in self._parts():
            place = math.floor((1 - coverage) * (len(part) + 1) + 1e-9)
            lowest = float(part[place - 1]) if place else 0.0
            found.append(lowest * (1 - _ROUNDING))
        return np.array(found)

    def table(self) -> dict[str, list[float]]:
        """`{coverage: thresholds}`, for files that other programs read.

        >>> ConformalSets((19,), np.linspace(0.05, 0.95, 19)).table()['0.9']
        [0.0999999]
        """
        return {
            f'{coverage:g}': [
                float(f'{value:.6g}') for value in self.thresholds(coverage)
            ]
            for coverage in _IN_TABLES
        }

    def contains(self, probabilities: np.ndarray, coverage: float) -> np.ndarray:
        """Which classes are in the sets: bool `[N, C]`.

        If each image has one class, the most likely class is always in the set.

        Args:
          probabilities: `[N, C]`.
          coverage: the share of images whose true class is to be in the set.
        """
        probabilities = np.asarray(probabilities)
        inside = probabilities >= self.thresholds(coverage)
        if not self.several:
            np.put_along_axis(
                inside, probabilities.argmax(-1, keepdims=True), True, axis=-1
            )
        return inside

    def warn(self, coverage: float, class_names: Sequence[str]) -> str:
        """A line if there were too few images for a coverage; '' if there were enough.

        Args:
          coverage: between 0 and 1.
          class_names: in the order of the outputs.
        """
        check_coverage(coverage)
        need = images_needed(coverage)
        few = [n for n, count in enumerate(self.counts) if count < need]
        if not few:
            return ''
        if not self.several:
            return (
                f'coverage={coverage:g} needs {need} validation images and there were '
                f'{self.counts[0]}: every class is in each set'
            )
        names = ', '.join(class_names[n] for n in few[:5])
        more = f' and {len(few) - 5} more' if len(few) > 5 else ''
        return (
            f'coverage={coverage:g} needs {need} validation images with each label; '
            f'there were fewer of {names}{more}, which are in each set'
        )


def images_needed(coverage: float) -> int:
    """The smallest number of validation images that a coverage needs.

    >>> images_needed(0.9), images_needed(0.99)
    (9, 99)
    """
    return math.ceil(1 / (1 - coverage) - 1 - 1e-9)


def check_coverage(coverage: float):
    """Raises `UserError` if it is not between 0 and 1."""
    if not 0 < coverage < 1:
        raise UserError(
            f'coverage={coverage:g} must be between 0 and 1, such as 0.9 for sets that '
            'contain the true class of 90% of the images'
        )
