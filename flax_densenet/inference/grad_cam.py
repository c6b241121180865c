"""Grad-CAM: the parts of an image that support a class (Selvaraju et al., 1610.02391).

The maps A are the `features` of the network (after the last norm). Their weights are
the gradients of the logit of the class, averaged over all positions (equation 1). The
result is the ReLU of the weighted sum of the maps (equation 2).
"""

import functools

import jax
import jax.numpy as jnp

from flax_densenet.models import network


@functools.partial(jax.jit, static_argnames='module')
def grad_cam(variables, images, classes, *, module: network.Network):
    """Computes the logits of each image, and the map of one class.

    Args:
      variables: `{'params', 'batch_stats'}`.
      images: normalized float32 `[N, H, W, C]`.
      classes: int32 `[N]`; -1 for the class with the highest logit.
      module: the network.

    Returns:
      Logits `[N, num_classes]`, and maps float32 `[N, h, w]`, not negative, not scaled.
    """
    features = module.apply(variables, images, method='features')
    return from_features(variables, features, classes, module=module)


def from_features(variables, features, classes, *, module: network.Network):
    """`grad_cam` for images whose features `[N, h, w, F]` are already computed."""
    features = features.astype(jnp.float32)

    def of_class(features):
        logits = module.apply(variables, features, method='head')
        chosen = jnp.where(classes < 0, logits.argmax(-1), classes)
        picked = jnp.take_along_axis(logits, chosen[:, None], 1)
        # The logit of an image depends only on its own features.
        return picked.sum(), logits

    gradients, logits = jax.grad(of_class, has_aux=True)(features)
    weights = gradients.mean((1, 2), keepdims=True)
    return logits, jax.nn.relu((weights * features).sum(-1))
