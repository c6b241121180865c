"""Losses for one class per image, or for any number of labels.

Labels with one dimension are classes, trained with softmax and cross-entropy. Labels
with two dimensions are 0, 1 or NaN (unknown) for each label. Each label gets a sigmoid,
and only known labels count, so the loss of an image is a mean over its known labels,
whatever batch it is in. Values between 0 and 1 are soft targets for unknown labels (see
`data.soft_labels`): `Loss` trains on them, and `measure` leaves them out.

`measure` is the plain cross-entropy that runs report and are compared by; `Loss` is the
loss to minimize.

>>> import jax.numpy as jnp
>>> logits = jnp.zeros((1, 3))
>>> losses, correct = measure(logits, jnp.array([[1.0, 0.0, jnp.nan]]))
>>> round(float(losses[0]), 4), float(correct[0])
(0.6931, 0.5)
>>> round(float(Loss('focal').losses(logits, jnp.array([1]))[0]), 4)
0.4883
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from flax_densenet.errors import UserError

LOSSES = ('cross_entropy', 'focal', 'bce')


@dataclasses.dataclass(frozen=True)
class Loss:
    """The training loss of each row.

    With `label_smoothing` s, the target is 1 - s for the image's class plus s / C for
    each of C classes; with several labels, each target moves toward 0.5, to (1 - s) *
    target + s / 2. Every loss is linear in its target, so `w * losses(logits, a) + (1 -
    w) * losses(logits, b)` is the loss of a mix of two images (mixup, CutMix).

    Attributes:
      name: a name in `LOSSES`. `cross_entropy` of the softmax, or with several labels
        of each sigmoid. `focal` (Lin et al., arXiv 1708.02002, equation 4 without
        alpha): each term times (1 - p) ** focal_gamma, where p is the predicted
        probability of the target. With one class per image p comes from the softmax,
        the extension to several classes mentioned in the paper's footnote 1. `bce`
        (Wightman et al., arXiv 2110.00476, section 2.1): a sigmoid for each class with
        target 0 or 1, averaged over all classes; with several labels this equals
        `cross_entropy`.
      label_smoothing: from 0 to below 1.
      focal_gamma: 0 or above; at 0, `focal` equals `cross_entropy`.
      pos_weight: with several labels, factors `[L]` on the loss of positives, as in
        torch's BCEWithLogitsLoss; empty for none.
    """

    name: str = 'cross_entropy'
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0
    pos_weight: tuple[float, ...] = ()

    def losses(self, logits, labels):
        """The loss of each row, float `[N]`.

        Args:
          logits: `[N, C]`.
          labels: int32 `[N]`, or float32 `[N, C]` of 0, 1, NaN and soft targets.
        """
        if labels.ndim == 1:
            return self._of_classes(logits, labels)
        known = ~jnp.isnan(labels)
        target = jnp.where(known, labels, 0.0).astype(logits.dtype)
        if self.label_smoothing:
            target = (1 - self.label_smoothing) * target + self.label_smoothing / 2
        if self.name == 'focal':
            each = optax.sigmoid_focal_loss(logits, target, gamma=self.focal_gamma)
        else:
            each = optax.sigmoid_binary_cross_entropy(logits, target)
        if self.pos_weight:
            weight = jnp.asarray(self.pos_weight, logits.dtype)[None]
            if self.name == 'focal':
                each = each * (1 + (weight - 1) * target)
            else:
                each = each + (weight - 1) * target * jax.nn.softplus(-logits)
        return _mean_of_known(each, known)

    def _of_classes(self, logits, labels):
        if self.name == 'cross_entropy' and not self.label_smoothing:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        target = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        if self.label_smoothing:
            target = optax.smooth_labels(target, self.label_smoothing)
        if self.name == 'bce':
            return optax.sigmoid_binary_cross_entropy(logits, target).mean(-1)
        log_p = jax.nn.log_softmax(logits)
        if self.name == 'focal':
            # Clipped, since the gradient of a power below 1 is infinite at 0.
            rest = jnp.maximum(1 - jnp.exp(log_p), jnp.finfo(logits.dtype).eps)
            log_p = rest**self.focal_gamma * log_p
        return -(target * log_p).sum(-1)


CROSS_ENTROPY = Loss()


def make_loss(
    *,
    loss: str,
    label_smoothing: float,
    focal_gamma: float,
    pos_weight: tuple[float, ...] = (),
) -> Loss:
    """The loss from the fields of `config.train`.

    Args:
      pos_weight: see `Loss`.

    Raises:
      UserError: a field is out of range.
    """
    if loss not in LOSSES:
        raise UserError(f'train.loss={loss} is not known; use {", ".join(LOSSES)}')
    if not 0 <= label_smoothing < 1:
        raise UserError(
            f'train.label_smoothing={label_smoothing:g} must be at least 0 and below '
            '1, such as 0.1'
        )
    if not 0 <= focal_gamma < math.inf:
        raise UserError(
            f'train.focal_gamma={focal_gamma:g} must be at least 0; the paper uses 2'
        )
    return Loss(loss, label_smoothing, focal_gamma, pos_weight)


def measure(logits, labels):
    """Cross-entropy and correctness of each image.

    Args:
      logits: `[N, L]`.
      labels: int32 `[N]`, or float32 `[N, L]` of 0, 1 and NaN; soft ones count as NaN.

    Returns:
      Losses, float `[N]`, in nats, and correct `[N]`: bool, or with several labels the
      share of known labels that are correct at a threshold of 0.5. An image without any
      known label has loss 0 and counts as correct.
    """
    if labels.ndim == 2:
        labels = jnp.where((labels > 0) & (labels < 1), jnp.nan, labels)
    losses = CROSS_ENTROPY.losses(logits, labels)
    if labels.ndim == 1:
        return losses, logits.argmax(-1) == labels
    known = ~jnp.isnan(labels)
    wrong = known & ((logits > 0) != (labels > 0.5))
    return losses, 1 - wrong.sum(-1) / jnp.maximum(known.sum(-1), 1)


def _mean_of_known(each, known):
    """The mean over known labels, `[N, L]` to `[N]`; 0 if none is known."""
    return jnp.where(known, each, 0.0).sum(-1) / jnp.maximum(known.sum(-1), 1)


def apply_class_weights(losses, labels, class_weights=None):
    """The images' losses, each times the weight of its class.

    Args:
      losses: `[N]`.
      labels: int32 `[N]`, needed only with weights.
      class_weights: `[C]`; None weighs all equally.
    """
    if class_weights is None:
        return losses
    return losses * jnp.asarray(class_weights)[labels]
