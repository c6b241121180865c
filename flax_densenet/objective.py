"""What is learned: one class for each image, or any number of labels.

Labels of one dimension are classes: softmax and cross-entropy. Labels of two are 0, 1
or NaN (not known) for each label: a sigmoid for each, and only those that are known
count. So an image's loss is a mean over its known labels, whatever batch it is in.

>>> import jax.numpy as jnp
>>> logits = jnp.zeros((1, 3))
>>> losses, correct = measure(logits, jnp.array([[1.0, 0.0, jnp.nan]]))
>>> round(float(losses[0]), 4), float(correct[0])
(0.6931, 0.5)
"""

import jax.numpy as jnp
import numpy as np
import optax

from flax_densenet import metrics


def measure(logits, labels):
    """Loss and correctness of each image.

    Args:
      logits: `[N, L]`.
      labels: int32 `[N]`, or float32 `[N, L]` of 0, 1 and NaN.

    Returns:
      Losses float `[N]` in nats; correct `[N]`: bool, or with labels the share of the
      known ones that are right at a probability of a half. An image without any known
      label has loss 0 and counts as right.
    """
    if labels.ndim == 1:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, logits.argmax(-1) == labels
    known = ~jnp.isnan(labels)
    target = jnp.where(known, labels, 0.0).astype(logits.dtype)
    each = optax.sigmoid_binary_cross_entropy(logits, target)
    count = jnp.maximum(known.sum(-1), 1)
    wrong = known & ((logits > 0) != (target > 0.5))
    return jnp.where(known, each, 0.0).sum(-1) / count, 1 - wrong.sum(-1) / count


def weigh(losses, labels, class_weights=None):
    """The images' losses, each times the weight of its class.

    Args:
      losses: `[N]`.
      labels: int32 `[N]`, where there are weights.
      class_weights: `[C]`; None weighs all alike.
    """
    if class_weights is None:
        return losses
    return losses * jnp.asarray(class_weights)[labels]


def auroc(logits: np.ndarray, labels: np.ndarray) -> list[float | None]:
    """Area under the ROC curve of each label; None where all known ones are alike.

    Args:
      logits: `[N, L]`.
      labels: `[N, L]` of 0, 1 and NaN.
    """
    areas = []
    for score, label in zip(logits.T, labels.T, strict=True):
        known = ~np.isnan(label)
        areas.append(metrics.area(label[known] > 0.5, score[known]))
    return areas


def mean_auroc(areas: list[float | None]) -> float | None:
    """Mean of the areas that there are."""
    return metrics.mean(areas)
