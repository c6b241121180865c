"""Applies the operating points of torchxrayvision's networks as that library does.

Each finding has a point p of its own, chosen on validation data. The library maps
sigmoids s piecewise linearly so that p becomes 0.5:

    s / 2p for s < p, else 1 - (1 - s) / 2(1 - p)

The result is a score, not a probability. A finding without a point is always 0.5.

>>> scale([0.1, 0.2, 0.6, 0.9], [0.2, 0.2, 0.2, None]).tolist()
[0.25, 0.5, 0.75, 0.5]
"""

import os
import re
from collections.abc import Sequence

import numpy as np

# The published files lack the points; the library has them, by file.
_FILE = re.compile(r'(.+)-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best(\.pt)?')
_PUBLISHED = {
    'nih-pc-chex-mimic_ch-google-openi-kaggle': (
        0.07422872,
        0.038290843,
        0.09814756,
        0.0098118475,
        0.023601074,
        0.0022490358,
        0.010060724,
        0.103246614,
        0.056810737,
        0.026791653,
        0.050318155,
        0.023985857,
        0.01939503,
        0.042889766,
        0.053369623,
        0.035975814,
        0.20204692,
        0.05015312,
    ),
    'nih': (
        0.039117552,
        0.0034529066,
        0.11396341,
        0.0057298196,
        0.00045666535,
        0.0018880932,
        0.012037827,
        0.038744126,
        0.0037213727,
        0.014730946,
        0.016149804,
        0.054241467,
        0.037198864,
        0.0004403434,
        None,
        None,
        None,
        None,
    ),
    'pc': (
        0.031012505,
        0.013347598,
        0.081435576,
        0.001262615,
        0.002587246,
        0.0035944257,
        0.0023071,
        0.055412333,
        0.044385884,
        0.042766232,
        0.043258056,
        0.037629247,
        0.005658899,
        0.0091741895,
        None,
        0.026507627,
        None,
        None,
    ),
    'chex': (
        0.1988969,
        0.05710573,
        None,
        0.0531293,
        0.1435217,
        None,
        None,
        0.27212676,
        0.07749717,
        None,
        0.19712369,
        None,
        None,
        None,
        0.09932402,
        0.09273402,
        0.3270967,
        0.10888247,
    ),
    'kaggle': (
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        0.13486601,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        0.13511065,
        None,
    ),
    'mimic_nb': (
        0.08558747,
        0.011884617,
        None,
        0.0040595434,
        0.010733786,
        None,
        None,
        0.118761964,
        0.022924708,
        None,
        0.06358637,
        None,
        None,
        None,
        0.022143636,
        0.017476924,
        0.1258702,
        0.014020768,
    ),
    'mimic_ch': (
        0.09121389,
        0.010573786,
        None,
        0.005023008,
        0.003698257,
        None,
        None,
        0.08001232,
        0.037242252,
        None,
        0.05006329,
        None,
        None,
        None,
        0.019866971,
        0.03823637,
        0.11303808,
        0.0069147074,
    ),
}


def of_file(path: str) -> tuple[float | None, ...] | None:
    """The points of a published file, by its name; None for other files."""
    match = _FILE.fullmatch(os.path.basename(path))
    return _PUBLISHED.get(match[1]) if match else None


def scale(sigmoids, points: Sequence[float | None], *, xp=np):
    """Maps sigmoids `[..., C]` to scores of the same shape.

    Args:
      sigmoids: from 0 to 1.
      points: C numbers between 0 and 1; None for findings without a point.
      xp: `numpy`, or `jax.numpy` for JAX arrays.
    """
    sigmoids = xp.asarray(sigmoids)
    shape = (1,) * (sigmoids.ndim - 1) + (-1,)
    given = np.array([p is not None for p in points]).reshape(shape)
    p = np.array([0.5 if p is None else p for p in points]).reshape(shape)
    p = p.astype(sigmoids.dtype)
    scores = xp.where(
        sigmoids < p, sigmoids / (2 * p), 1 - (1 - sigmoids) / (2 * (1 - p))
    )
    return xp.where(given, scores, xp.asarray(0.5, sigmoids.dtype))


def scale_logits(logits: np.ndarray, points: Sequence[float | None]) -> np.ndarray:
    """Logits, float64 `[..., C]`, that give the scores after a sigmoid."""
    z = np.asarray(logits, np.float64)
    given = np.array([p is not None for p in points])
    p = np.array([0.5 if p is None else p for p in points], np.float64)
    is_low = z < np.log(p) - np.log1p(-p)
    # exp(-|z - ...|) of each side stays below p / (1 - p) or its inverse.
    low, high = np.where(is_low, z, -np.inf), np.where(is_low, np.inf, z)
    of_low = z - np.log(2 * p + (2 * p - 1) * np.exp(low))
    of_high = z + np.log(2 * (1 - p) + (1 - 2 * p) * np.exp(-high))
    return np.where(given, np.where(is_low, of_low, of_high), 0.0)


def describe(path: str, points: Sequence[float | None]) -> str:
    """The line about the operating points of a model."""
    line = (
        f'{path}: its operating points are applied as in torchxrayvision: a score of '
        '0.5 is the point of each finding; for raw sigmoids: --outputs=sigmoid'
    )
    without = [str(n) for n, p in enumerate(points) if p is None]
    if without:
        line += f'; outputs without one are always 0.5: {", ".join(without)}'
    return line


def check(path: str, points: Sequence[float | None], count: int) -> tuple[str, bool]:
    """A line about the points of a file, and whether they fit its `count` outputs."""
    if len(points) != count:
        line = f'{path} has {len(points)} operating points for {count} outputs'
        return f'{line}: they are not applied', False
    if not all(point is None or 0 < point < 1 for point in points):
        return f'{path}: its operating points are not between 0 and 1', False
    return describe(path, points), True
