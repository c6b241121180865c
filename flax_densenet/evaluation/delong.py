"""The variance of areas under ROC curves, without resampling.

DeLong, DeLong and Clarke-Pearson (Biometrics 1988): the area is a mean over pairs of a
positive and a negative image. The contribution of each image, its placement value,
gives the variance of an area and the covariance of two areas on the same images. The
values are computed from ranks (Sun and Xu, IEEE Signal Processing Letters 2014).
Contributions of images in one group are added before taking the variance (Obuchowski,
Biometrics 1997).

>>> import numpy as np
>>> true = np.array([False, False, True, True, True])
>>> area, _, _ = placements(true, np.array([0.1, 0.6, 0.4, 0.7, 0.9]))
>>> round(area, 4)
0.8333
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of two areas on the same images.

    Attributes:
      difference: the first minus the second.
      interval: its 95% interval.
      p_value: two-sided p-value of equal areas.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float


def placements(true: np.ndarray, score: np.ndarray):
    """The area and the placement values.

    Args:
      true: bool `[N]`, with both values.
      score: `[N]`.

    Returns:
      The area; for each positive the share of negatives below it; and for each negative
      the share of positives above it. Equal scores count as a half.
    """
    from scipy import stats

    score = np.asarray(score, np.float64)  # scipy keeps this dtype for its ranks
    positive, negative = score[true], score[~true]
    m, n = len(positive), len(negative)
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - stats.rankdata(positive)) / n
    below = 1 - (ranks[m:] - stats.rankdata(negative)) / m
    return float(above.mean()), above, below


def influence(true: np.ndarray, score: np.ndarray) -> tuple[float, np.ndarray]:
    """The area, and the influence of each image on it: `[N]`, which add up to 0.

    The sum of their squares is the variance of the area, except for the factors m / (m
    - 1) and n / (n - 1). The influence on a mean of areas is the mean of the
    influences.
    """
    area, above, below = placements(true, score)
    moves = np.empty(len(true))
    moves[true] = (above - area) / len(above)
    moves[~true] = (below - area) / len(below)
    return area, moves


def deviation(moves: np.ndarray, groups: np.ndarray | None = None) -> float:
    """The standard error of the quantity that `influence` belongs to.

    Args:
      groups: `[N]`; images of one group count as one unit, since they may be
        correlated.
    """
    if groups is not None:
        place = np.unique(groups, return_inverse=True)[1]
        moves = np.bincount(place, weights=moves)
    count = len(moves)
    return float(np.sqrt(np.sum(moves**2) * count / max(count - 1, 1)))


def interval(area: float, deviation: float) -> tuple[float, float] | None:
    """A 95% interval that stays between 0 and 1: normal on the logit scale.

    Pepe, The Statistical Evaluation of Medical Tests, 2003, page 107. None for areas of
    0 and 1, which have no known variance.
    """
    from scipy import special, stats

    if not 0 < area < 1:
        return None
    margin = stats.norm.ppf(0.975) * deviation / (area * (1 - area))
    ends = special.expit(special.logit(area) + np.array([-margin, margin]))
    return float(ends[0]), float(ends[1])


def compare(true: np.ndarray, one: np.ndarray, other: np.ndarray) -> Comparison:
    """DeLong's test of two scores on the same images.

    Args:
      true: bool `[N]`, with both values.
      one, other: scores `[N]`.
    """
    from scipy import stats

    parts = [placements(true, score) for score in (one, other)]
    difference = parts[0][0] - parts[1][0]
    variance = 0.0
    for first, second in zip(parts[0][1:], parts[1][1:], strict=True):
        if len(first) > 1:
            variance += float(np.var(first - second, ddof=1)) / len(first)
    spread = variance**0.5
    margin = float(stats.norm.ppf(0.975)) * spread
    p_value = 1.0
    if spread > 0:
        p_value = float(2 * stats.norm.sf(abs(difference) / spread))
    elif difference:  # every pair of images gives the same result
        p_value = 0.0
    ends = difference - margin, difference + margin
    return Comparison(difference, ends, p_value)


def bound(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """A 95% interval of an area of 0 or 1, which has no estimated variance.

    Newcombe's method 5 (Statistics in Medicine 2006): like Wilson's interval, it solves
    for the areas from which this one is 1.96 standard deviations away.
    """
    from scipy import optimize, stats

    z = stats.norm.ppf(0.975)
    middle = (positives + negatives) / 2 - 1

    def distance(x):
        spread = 1 + middle * ((1 - x) / (2 - x) + x / (1 + x))
        variance = x * (1 - x) * spread / (positives * negatives)
        return (x - area) ** 2 - z**2 * variance

    if area == 1:
        return float(optimize.brentq(distance, 1e-9, 1 - 1e-9)), 1.0
    return 0.0, float(optimize.brentq(distance, 1e-9, 1 - 1e-9))
