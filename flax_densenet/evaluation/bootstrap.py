"""Bootstrap: how much a metric varies with the choice of the test images.

Images are resampled with replacement, and the metric is computed on each resample; the
spread of these values estimates its spread over other test sets (Efron and Tibshirani,
An Introduction to the Bootstrap, 1993). If images belong to groups, such as patients,
complete groups are drawn: images of one patient are alike, and intervals that treat
them as independent are too narrow (Field and Welsh, 2007). `scipy.stats.bootstrap` does
not support groups and sorts the images of each resample.

>>> import numpy as np
>>> weights = np.concatenate(list(draw(5, resamples=3)), -1)
>>> weights.shape, weights.sum(0).tolist()
((5, 3), [5.0, 5.0, 5.0])
"""

from collections.abc import Callable, Iterator

import numpy as np

RESAMPLES = 1000
_CHUNK = 2**24  # weights at a time: 64 MiB


def draw(
    count: int,
    *,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """How often each image is in each resample, a few resamples at a time.

    Args:
      count: number of images, N.
      groups: `[N]`, the group of each image; groups are drawn as units. None: no
        groups.
      seed: the same seed draws the same resamples.

    Yields:
      float32 `[N, b]`; all b add up to `resamples`.
    """
    rng = np.random.default_rng(seed)
    units, place = count, None
    if groups is not None:
        names, place = np.unique(groups, return_inverse=True)
        units = len(names)
    size = max(1, min(resamples, _CHUNK // max(count, 1)))
    for start in range(0, resamples, size):
        weights = np.empty((units, min(size, resamples - start)), np.float32)
        for column in range(weights.shape[1]):
            drawn = rng.integers(0, units, units)
            weights[:, column] = np.bincount(drawn, minlength=units)
        yield weights if place is None else weights[place]


def replicate(
    measure: Callable[[np.ndarray], dict], count: int, **drawing
) -> dict[str, np.ndarray]:
    """Computes one or more metrics of every resample.

    Args:
      measure: function of `[N, b]` weights that returns a mapping of arrays ending in
        `[b]`, or of such mappings.
      **drawing: arguments of `draw`.
    """
    return _join([measure(weights) for weights in draw(count, **drawing)])


def _join(parts):
    return {
        name: _join([part[name] for part in parts])
        if isinstance(value, dict)
        else np.concatenate([part[name] for part in parts], -1)
        for name, value in parts[0].items()
    }


def interval(values: np.ndarray, found: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Bias-corrected percentile intervals.

    Resamples hold images more than once, which biases some metrics: average precision
    upward, F1 with many classes downward. This bias is measured and subtracted from the
    resamples and, since the sample is biased against its population in the same way,
    from the center. For the remaining skewness the percentiles are shifted (Efron, JASA
    1987, without the acceleration). `tests/evaluation/test_coverage.py` measures how
    often the intervals contain the true value.

    Args:
      values: `[..., B]`, values of the resamples; NaN where the metric is undefined.
      found: `[...]`, values of the images themselves, which an interval always
        contains.

    Returns:
      `[..., 2]`; NaN if the metric is undefined for more than half of the resamples.
    """
    from scipy import special

    values, known, shift = _centered(values, found)
    skew = _skew(values, found + shift, known)
    margin = special.ndtri((1 + level) / 2)
    shares = (special.ndtr(2 * skew + sign * margin) for sign in (-1, 1))
    ends = np.stack([_quantile(values, known, share) for share in shares], -1)
    ends = ends - 2 * shift[..., None]
    ends[..., 0] = np.minimum(ends[..., 0], found)
    ends[..., 1] = np.maximum(ends[..., 1], found)
    ends[known * 2 < values.shape[-1]] = np.nan
    return ends


def _centered(values, found):
    """Sorted values with NaN at the end; how many are known; the bias of their mean."""
    values = np.sort(values, -1)
    known = (~np.isnan(values)).sum(-1)
    total = np.nansum(values, -1)
    return values, known, total / np.maximum(known, 1) - found


def _skew(values, middle, known):
    """The distance of the median from the mean, in standard deviations of a normal."""
    from scipy import special

    middle = np.asarray(middle)[..., None]
    below = (values < middle).sum(-1) + (values == middle).sum(-1) / 2
    share = below / np.maximum(known, 1)
    return special.ndtri(np.clip(share, 0.1, 0.9))


def _quantile(values, known, share):
    """Quantiles of sorted values, interpolated as in `np.quantile`."""
    place = share * np.maximum(known - 1, 0)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, np.maximum(known - 1, 0))
    low, high = (
        np.take_along_axis(values, np.asarray(index)[..., None], -1)[..., 0]
        for index in (below, above)
    )
    return low + (place - below) * (high - low)


def p_value(values: np.ndarray, found: float) -> float:
    """The two-sided p-value of a difference.

    It is below 0.05 if `interval` does not contain 0.

    Args:
      values: `[B]`, differences of the resamples.
      found: the difference on the images themselves.
    """
    from scipy import special

    values, known, shift = _centered(values, found)
    count, least = int(known), 2 / (values.shape[-1] + 1)
    if not count or (values[:count] == 0).all():
        return 1.0
    zero = 2 * shift  # position of 0 among values that are not shifted
    below = (values < zero).sum() + (values == zero).sum() / 2
    share = np.clip(below / count, 0.5 / count, 1 - 0.5 / count)
    place = special.ndtri(share) - 2 * _skew(values, found + shift, known)
    tail = float(special.ndtr(-abs(place)))
    return min(1.0, max(least, 2 * tail))
