"""Test-time augmentation: predictions averaged over several views of an image.

The mean probabilities are returned as logits, so code that takes logits works without
changes.

>>> import jax.numpy as jnp
>>> views = jnp.log(jnp.array([[[0.9, 0.1]], [[0.5, 0.5]]]))
>>> logits = mean_logits(views, multi_label=False)
>>> round(float(jnp.exp(logits[0, 0])), 3)
0.7
"""

import math
from typing import Any

import jax
from jax.scipy.special import logsumexp

from flax_densenet.errors import UserError

VIEWS = ('none', 'flip')


def check(tta: str):
    """Raises `UserError` for an invalid value of `data.tta`."""
    if tta not in VIEWS:
        raise UserError(f'data.tta={tta} is not known; use {", ".join(VIEWS)}')


def from_metadata(metadata: dict[str, Any]) -> str:
    """`data.tta` of a trained model; `none` if its metadata has no such field."""
    return metadata['data'].get('tta') or 'none'


def describe(tta: str) -> str:
    """The addition to a line of metrics; empty for `none`."""
    return ', averaged over each image and its mirror image' if tta == 'flip' else ''


def views_of(images, tta: str):
    """The views of images `[N, H, W, C]`; the first one is the original."""
    return [images, images[:, :, ::-1]] if tta == 'flip' else [images]


def mean_logits(views, *, multi_label: bool):
    """Logits `[N, C]` of the mean probabilities.

    Args:
      views: logits `[V, N, C]`.
      multi_label: whether probabilities are sigmoids of each label, or a softmax.
    """
    if multi_label:
        positive, negative = (
            logsumexp(jax.nn.log_sigmoid(sign * views), axis=0) for sign in (1, -1)
        )
        return positive - negative
    return logsumexp(jax.nn.log_softmax(views), axis=0) - math.log(len(views))
