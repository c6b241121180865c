"""Scores for how unusual an image is, from the features or logits of a model.

A classifier gives every image one of its classes, whatever the image shows. These
scores are higher for images that are unlike the training images:

- `energy`: minus the logsumexp of the logits (Liu et al., arXiv 2010.03759); with
  several labels, minus the sum of softplus(logit) (Wang et al., arXiv 2109.14162).
- `mahalanobis`: the distance of the pooled features to the nearest class mean, in the
  metric of the covariance within classes (Lee et al., arXiv 1807.03888).
- `neighbor`: the distance of the pooled features, scaled to length 1, to the k-th
  nearest of the training images (Sun et al., arXiv 2204.06507).
- `both`: the sum of `energy` and `mahalanobis`, each in units of the distance between
  its median and its limit on the validation images.

The reported score is 0 for a median validation image and 1 at the limit. A chosen share
of the validation images lies below the limit.
"""

import dataclasses

import numpy as np

from flax_densenet.weights import decision_entry

METHODS = ('both', 'energy', 'mahalanobis', 'neighbor')
TITLES = {
    'both': 'energy and Mahalanobis distance',
    'energy': 'energy',
    'mahalanobis': 'Mahalanobis distance',
    'neighbor': 'distance to near training images',
}
_TINY = 1e-12
_NUMBERS = ('middle', 'limit', 'scale', 'energy_weight', 'distance_weight')
_ARRAYS = ('references', 'mean', 'directions', 'gains')


def _empty():
    return np.zeros((0, 0), np.float32)


def _no_vector():
    return np.zeros(0, np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Unusual(decision_entry.Entry):
    """A fitted score (`evaluation.unusual.fit`).

    For `mahalanobis`, features are first whitened: `(x - mean + D (B (x - mean))) *
    scale`, where B `[r, F]` is `directions` and D is its transpose times `gains`. The
    Mahalanobis distance is then the Euclidean distance. Arrays that a method does not
    need are empty.

    Attributes:
      method: one of METHODS.
      middle: median of the plain scores of the validation images.
      limit: the plain score below which the fraction `share` of them lies.
      share: from 0 to 1.
      train_count: number of training images used for the fit.
      val_count: number of validation images.
      neighbor: which neighbor of `references` the distance is to, counted from 1.
      several: whether an image can have several labels, for `energy`.
      scale: factor of whitened features.
      energy_weight, distance_weight: factors of the two terms of `both`.
      references: float32 or float16 `[M, F]`, the points for distances: whitened class
        means, or features of training images scaled to length 1.
      mean: float32 `[F]`, subtracted from the features.
      directions: float32 or float16 `[r, F]`, the axes along which features vary most.
      gains: float32 `[r]`, how whitening changes features along them.
    """

    method: str
    middle: float
    limit: float
    share: float
    train_count: int
    val_count: int
    neighbor: int = 1
    several: bool = False
    scale: float = 1.0
    energy_weight: float = 1.0
    distance_weight: float = 1.0
    references: np.ndarray = dataclasses.field(default_factory=_empty)
    mean: np.ndarray = dataclasses.field(default_factory=_no_vector)
    directions: np.ndarray = dataclasses.field(default_factory=_empty)
    gains: np.ndarray = dataclasses.field(default_factory=_no_vector)

    def check(self, classes: int):
        """Raises `ValueError` with what is wrong."""
        if self.method not in METHODS:
            raise ValueError(f'method is {self.method!r:.60}')
        if not 0 < self.share < 1:
            raise ValueError('share is not between 0 and 1')
        if not self.middle < self.limit:
            raise ValueError('middle is not below limit')
        if self.method == 'energy':
            return
        if self.references.ndim != 2 or not 1 <= self.neighbor <= len(self.references):
            raise ValueError('references has another shape')
        size = self.references.shape[1]
        if self.method == 'neighbor':
            return
        shapes = {
            'mean': (size,),
            'directions': (len(self.gains), size),
            'gains': (len(self.gains),),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f'{name} has another shape')

    @property
    def member_count(self) -> int:
        """The number of networks that the score is for."""
        return 1

    @property
    def is_flat(self) -> bool:
        """Whether the energies it was fitted on hardly differ.

        So do those of mean probabilities, which are all nearly 0.
        """
        if self.several or not self.needs_logits:
            return False
        spread = 1 / self.energy_weight
        if self.method == 'energy':
            spread = self.limit - self.middle
        return spread < 1.1e-3

    @property
    def needs_logits(self) -> bool:
        """Whether the score needs logits (without calibration)."""
        return self.method in ('both', 'energy')

    @property
    def feature_size(self) -> int | None:
        """The number of features F; None if the score needs no features."""
        return None if self.method == 'energy' else self.references.shape[1]

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays of the score, to pass to compiled programs as arguments."""
        found = {name: np.float32(getattr(self, name)) for name in _NUMBERS}
        return found | {name: getattr(self, name) for name in _ARRAYS}

    def with_arrays(self, arrays) -> 'Unusual':
        """The same score with other arrays, such as traced ones."""
        return dataclasses.replace(self, **arrays)

    def plain(self, features, logits, *, xp=np):
        """The score as defined in its paper, `[N]`.

        Args:
          features: pooled features `[N, F]`.
          logits: `[N, C]`, without calibration.
          xp: `numpy`, or `jax.numpy` for JAX arrays.
        """
        parts = {
            'energy': lambda: energy(logits, several=self.several, xp=xp),
            'distance': lambda: self._distance(features, xp),
        }
        if self.method == 'both':
            first, second = (part() for part in parts.values())
            return first * self.energy_weight + second * self.distance_weight
        return parts['energy' if self.method == 'energy' else 'distance']()

    def _distance(self, features, xp):
        points = xp.asarray(features, np.float32)
        if self.method == 'neighbor':
            length = xp.sqrt((points * points).sum(-1, keepdims=True))
            points = points / (length + _TINY)
        else:
            points = self.whiten(points)
        return distance(points, self.references, self.neighbor, xp=xp)

    def whiten(self, points):
        """Whitened features `[N, F]`: Euclidean distances become Mahalanobis ones."""
        points = points - self.mean[None]
        directions = self.directions.astype(np.float32)
        along = (points @ directions.T) * self.gains[None]
        return (points + along @ directions) * self.scale

    def score(self, features, logits, *, xp=np):
        """The reported score, float32 `[N]`: 0 at the median, 1 at the limit.

        Args:
          features, logits, xp: see `plain`.
        """
        found = self.plain(features, logits, xp=xp)
        found = (found - self.middle) / (self.limit - self.middle)
        return found.astype(np.float32)


def default(*, several: bool) -> str:
    """The method of `auto`; docs/unusual.md has the measurements.

    With several labels, an image without any of them has a high energy and may still be
    quite usual.
    """
    return 'mahalanobis' if several else 'both'


def energy(logits, *, several: bool, xp=np):
    """The energy `[N]` of logits `[N, C]`; high if no logit is high."""
    logits = xp.asarray(logits)
    if several:
        softplus = xp.maximum(logits, 0) + xp.log1p(xp.exp(-xp.abs(logits)))
        return -softplus.sum(-1)
    highest = logits.max(-1)
    rest = xp.exp(logits - highest[:, None]).sum(-1)
    return -(highest + xp.log(rest))


def distance(points, references, neighbor: int = 1, *, xp=np):
    """Distances `[N]` of points `[N, F]` to the nearest of references `[M, F]`.

    Args:
      neighbor: 1 for the nearest, 2 for the second, and so on.
    """
    references = references.astype(np.float32)
    lengths = (references * references).sum(-1)[None]
    squares = (points * points).sum(-1, keepdims=True) + lengths
    squares = squares - 2 * (points @ references.T)
    if neighbor > 1:
        chosen = xp.partition(squares, neighbor - 1, axis=-1)[:, neighbor - 1]
    else:
        chosen = squares.min(-1)
    return xp.sqrt(xp.maximum(chosen, 0))


def is_unusual(score) -> bool:
    """Whether a reported score is above the limit, 1."""
    return bool(score > 1)
