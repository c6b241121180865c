"""What is learned: one class for each image, or any number of labels.

Labels of one dimension are classes: softmax and cross-entropy. Labels of two are 0, 1
or NaN (not known) for each label: a sigmoid for each, and only those that are known
count. So an image's loss is a mean over its known labels, whatever batch it is in.
Values between 0 and 1 are soft targets of labels that nobody knows (see
`data.soft_labels`): `Loss` learns them, and `measure` leaves them out.

`measure` is what runs report and are compared by, the plain cross-entropy; `Loss` is
what the gradient is of.

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
    """The loss of each row that training takes the gradient of.

    With `label_smoothing` s, the target is 1 - s for the image's class plus s / C for
    each of C classes; with several labels, each moves by s / 2 toward a half. Every
    loss is linear in its target, so `w * losses(logits, a) + (1 - w) * losses(logits,
    b)` is the loss of an image that is mixed of two (mixup, CutMix).

    Attributes:
      name: of `LOSSES`. `cross_entropy` of the softmax; with several labels of each
        sigmoid. `focal` (Lin et al., arXiv 1708.02002, equation 4 without alpha):
        each term times (1 - p) ** focal_gamma, p being what the model gives the
        target; of one class an image p is the softmax's, the extension to several
        classes that the paper's footnote 1 speaks of. `bce` (Wightman et al., arXiv
        2110.00476, section 2.1): a sigmoid for each class against 0 or 1, the mean of
        all classes; with several labels that is `cross_entropy`.
      label_smoothing: from 0 to below 1.
      focal_gamma: 0 or above; at 0 `focal` is `cross_entropy`.
      pos_weight: with several labels, factors `[L]` on the loss of positives, as in
        torch's BCEWithLogitsLoss; empty for none.
    """

    name: str = 'cross_entropy'
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0
    pos_weight: tuple[float, ...] = ()

    def losses(self, logits, labels):
        """Of each row, float `[N]`.

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
            # Bounded, since below 1 the power has no slope at 0.
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
    """The loss of the fields of `config.train`.

    Args:
      pos_weight: see `Loss`.

    Raises:
      UserError: one of them is out of range.
    """
    if loss not in LOSSES:
        raise UserError(f'train.loss={loss} is not known; use {", ".join(LOSSES)}')
    if not 0 <= label_smoothing < 1:
        raise UserError(
            f'train.label_smoothing={label_smoothing:g} must be 0 or above, and below '
            '1, as 0.1'
        )
    if not 0 <= focal_gamma < math.inf:
        raise UserError(
            f'train.focal_gamma={focal_gamma:g} must be 0 or above; the paper has 2'
        )
    return Loss(loss, label_smoothing, focal_gamma, pos_weight)


def measure(logits, labels):
    """Cross-entropy and correctness of each image.

    Args:
      logits: `[N, L]`.
      labels: int32 `[N]`, or float32 `[N, L]` of 0, 1 and NaN; soft ones count as NaN.

    Returns:
      Losses float `[N]` in nats; correct `[N]`: bool, or with labels the share of the
      known ones that are right at a probability of a half. An image without any known
      label has loss 0 and counts as right.
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
    """`[N, L]` to `[N]`; 0 where none is known."""
    return jnp.where(known, each, 0.0).sum(-1) / jnp.maximum(known.sum(-1), 1)


def apply_class_weights(losses, labels, class_weights=None):
    """The images' losses, each times the weight of its class.

    Args:
      losses: `[N]`.
      labels: int32 `[N]`, where there are weights.
      class_weights: `[C]`; None weighs all alike.
    """
    if class_weights is None:
        return losses
    return losses * jnp.asarray(class_weights)[labels]
