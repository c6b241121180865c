"""Bootstrap: how much a metric varies with the choice of the test images.

Images are drawn again with replacement, and the metric is computed of each such
resample; 95% of the values are between the ends of the percentile interval (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993). Where images belong to groups, as
those of one patient do, whole groups are drawn: images of one patient are alike, and
intervals that take them for independent are too short (Field and Welsh, 2007).
`scipy.stats.bootstrap` knows no groups, and sorts the images of each resample anew.

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
    """How often each image is in each resample, some resamples at a time.

    Args:
      count: images, N.
      groups: `[N]`, the group of each image, which are drawn whole; None: no groups.
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
    """A metric, or several, of every resample.

    Args:
      measure: of `[N, b]` weights: a mapping of arrays that end in `[b]`, or of such
        mappings.
      **drawing: of `draw`.
    """
    return _join([measure(weights) for weights in draw(count, **drawing)])


def _join(parts):
    return {
        name: _join([part[name] for part in parts])
        if isinstance(value, dict)
        else np.concatenate([part[name] for part in parts], -1)
        for name, value in parts[0].items()
    }


def percentiles(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """The ends of the percentile interval, as `np.nanpercentile` has them.

    Args:
      values: `[..., B]`; NaN where a resample does not define the metric.

    Returns:
      `[..., 2]`; NaN where fewer than half of the resamples define it.
    """
    values = np.sort(values, -1)  # NaN at the end
    known = (~np.isnan(values)).sum(-1)
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        place = share * np.maximum(known - 1, 0)
        below = np.floor(place).astype(int)
        above = np.minimum(below + 1, np.maximum(known - 1, 0))
        low, high = (
            np.take_along_axis(values, index[..., None], -1)[..., 0]
            for index in (below, above)
        )
        ends.append(low + (place - below) * (high - low))
    found = np.stack(ends, -1)
    found[known * 2 < values.shape[-1]] = np.nan
    return found


def p_value(differences: np.ndarray) -> float:
    """How likely a difference at least this far from 0 is by chance, two-sided.

    Args:
      differences: `[B]`, of the resamples.
    """
    known = differences[~np.isnan(differences)]
    beyond = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(known) + 1)))
