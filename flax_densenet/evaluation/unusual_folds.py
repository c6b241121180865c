"""Fits the score of unusual images of an ensemble on its out-of-fold images."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from flax_densenet.evaluation import unusual
from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import unusual as unusual_lib
from flax_densenet.weights import unusual_members

_LOGGER = logging.getLogger(__name__)
# Added to limits, so that rounding moves no image across that of its own fold. Scores
# are rounded when they are converted, unlike those of a single model.
_ROUNDING = 1e-4


def fit(
    members: Sequence[tuple[str, trained_lib.Trained]],
    scores: Sequence[np.ndarray | None],
    share: float,
) -> unusual_members.MembersUnusual | None:
    """Fits the limit of each member on the images that were held out from it.

    Args:
      members: name and model of each member.
      scores: each member's scores of its held-out images, float32 `[N]`.
      share: share of these images below the limit.

    Returns:
      The score; None, with a line of log, if members have no score or differ in it.
    """
    found, counts = [], []
    for (name, trained), own in zip(members, scores, strict=True):
        before = trained.decisions and trained.decisions.unusual
        if not isinstance(before, unusual_lib.Unusual) or own is None:
            _LOGGER.info(
                f'no score of unusual images: {name} has none; run calibrate on it, '
                'then on the folder of all folds'
            )
            return None
        middle, limit = unusual.bounds(_plain(own, before), share)
        counts.append(len(own))
        found.append(
            dataclasses.replace(
                before,
                middle=middle,
                limit=limit + _ROUNDING * (limit - middle),
                share=share,
                val_count=len(own),
            )
        )
    methods = {one.method for one in found}
    if len(methods) > 1:
        _LOGGER.info(
            'no score of unusual images: the models use different methods '
            f'({", ".join(sorted(methods))}); run calibrate on each with the same '
            '--unusual, then on the folder of all folds'
        )
        return None
    need = unusual.images_needed(share)
    few = ''
    if min(counts) < need:
        few = f' (reliable limits need at least {need} images in each fold)'
    _LOGGER.info(
        f'unusual images: scored by {unusual_lib.TITLES[found[0].method]}, the median '
        f'of {len(found)} models; {100 * share:g}% of the {sum(counts):,} out-of-fold '
        f'images count as usual{few}'
    )
    calibrations = tuple(trained.calibration for _, trained in members)
    return unusual_members.MembersUnusual(tuple(found), calibrations)


def rescale(
    scores: np.ndarray, before: unusual_lib.Unusual, after: unusual_lib.Unusual
) -> np.ndarray:
    """Scores `[N]` in units of other limits, float32."""
    found = (_plain(scores, before) - after.middle) / (after.limit - after.middle)
    return found.astype(np.float32)


def _plain(scores, score):
    return np.float64(scores) * (score.limit - score.middle) + score.middle
