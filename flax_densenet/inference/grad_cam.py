"""Grad-CAM: which parts of an image speak for a class (Selvaraju et al., 1610.02391).

The maps A are the model's `features` (behind the last batch norm). Their weights are
the gradients of the class's logit, averaged over the positions (equation 1); the map
shown is the ReLU of their weighted sum (equation 2).
"""

import functools

import jax
import jax.numpy as jnp

from flax_densenet.models import densenet


@functools.partial(jax.jit, static_argnames='module')
def grad_cam(variables, images, classes, *, module: densenet.DenseNet):
    """Logits, and the map of one class for each image.

    Args:
      variables: `{'params', 'batch_stats'}`.
      images: float32 `[N, H, W, C]`, normalized.
      classes: int32 `[N]`; -1 takes the class with the highest logit.

    Returns:
      logits `[N, num_classes]`, maps float32 `[N, h, w]`, 0 or above, not scaled.
    """
    features = module.apply(variables, images, method='features')
    return from_features(variables, features, classes, module=module)


def from_features(variables, features, classes, *, module: densenet.DenseNet):
    """`grad_cam` for images whose maps `[N, h, w, F]` are computed already."""
    features = features.astype(jnp.float32)

    def of_class(features):
        logits = module.apply(variables, features, method='head')
        chosen = jnp.where(classes < 0, logits.argmax(-1), classes)
        picked = jnp.take_along_axis(logits, chosen[:, None], 1)
        # Each image's logit depends on its own features alone.
        return picked.sum(), logits

    gradients, logits = jax.grad(of_class, has_aux=True)(features)
    weights = gradients.mean((1, 2), keepdims=True)
    return logits, jax.nn.relu((weights * features).sum(-1))
