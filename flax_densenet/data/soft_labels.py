"""Targets between 0 and 1 for uncertain labels, used only by the loss.

For CheXpert's uncertain labels, Pham et al. (arXiv 1911.06475, section 3.3) train on
random targets from 0.55 to 0.85 instead of 1. Such a label counts as unknown: metrics,
weights of positives and samplers leave it out.

>>> import numpy as np
>>> known_labels(np.array([[1.0, 0.0, 0.7]])).tolist()
[[1.0, 0.0, nan]]
"""

import hashlib

import numpy as np

from flax_densenet.errors import UserError

SPAN = (0.55, 0.85)  # of Pham et al. for uncertain labels that are mostly positive


def check(span) -> tuple[float, float]:
    """The two ends of `data.soft_labels`; equal ends mean a fixed target.

    Raises:
      UserError: they are not two numbers in order between 0 and 1.
    """
    numbers = all(isinstance(x, int | float) for x in span)
    if len(span) != 2 or not numbers or not 0 < span[0] <= span[1] < 1:
        raise UserError(
            f'data.soft_labels={tuple(span)} must be two numbers between 0 and 1, the '
            "lower first, such as '(0.55,0.85)'; '(0.7,0.7)' is a fixed target"
        )
    return float(span[0]), float(span[1])


def draw(image: str, label: str, span: tuple[float, float]) -> float:
    """The target for a label of an image, uniform in the range.

    It depends only on the two names, so it is the same in a resumed run and in tables
    with other rows.
    """
    name = f'{image}\0{label}'.encode('utf-8', 'surrogateescape')
    digest = hashlib.blake2b(name, digest_size=8).digest()
    share = int.from_bytes(digest, 'big') / 2**64
    return span[0] + share * (span[1] - span[0])


def are_soft(labels: np.ndarray) -> np.ndarray:
    """Whether labels are targets between 0 and 1, bool of the same shape."""
    return (labels > 0) & (labels < 1)


def known_labels(labels: np.ndarray) -> np.ndarray:
    """Replaces soft targets by NaN (unknown); classes are unchanged."""
    if labels.ndim < 2 or not are_soft(labels).any():
        return labels
    return np.where(are_soft(labels), np.nan, labels)
