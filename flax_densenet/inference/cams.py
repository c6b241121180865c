"""Class activation maps other than Grad-CAM, from a layer A and its gradients G.

A is a feature map `[N, h, w, F]`, and G the gradient of the logit of the class.

* Grad-CAM++ (Chattopadhay et al., 1710.11063): relu(sum_k w_k A_k), with
  w_k = sum_ij a relu(G) and a = G^2 / (2 G^2 + G^3 sum_ij A) (equation 19). Where G is
  positive, a = 1 / (2 + G sum_ij A); elsewhere a does not matter. The paper assumes
  that A is positive, so the sum only includes positive values.
* HiResCAM (Draelos and Carin, 2011.08891): relu(sum_k G_k A_k) (equation 4).
* Layer-CAM (Jiang et al., 2021): relu(sum_k relu(G_k) A_k) (equations 7 and 8).
"""

import jax
import jax.numpy as jnp

from flax_densenet.inference import explain, grad_cam


def from_features(module, head, features, classes, *, method: str):
    """Maps from the last feature map.

    Args:
      module: the network.
      head: the variables after the features.
      features: `[N, h, w, F]`.
      classes: int32 `[N]`, not negative.
      method: a key of `explain.METHODS`.

    Returns:
      float32 `[N, h, w]`, not negative, not scaled.
    """
    if method == explain.GRADCAM:
        return grad_cam.from_features(head, features, classes, module=module)[1]
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    if module.fields().get('last_relu'):
        # The map after its ReLU, without negative values, as in the papers.
        features, module = jax.nn.relu(features), module.clone(last_relu=False)
    return of_layer(
        features,
        lambda maps: module.apply(head, maps, method='head'),
        classes,
        method=method,
    )


def of_layer(activations, rest, classes, *, method: str):
    """Maps from any layer.

    Args:
      activations: activations of the layer, `[N, h, w, F]`.
      rest: a function from the activations to logits `[N, num_classes]`.
      classes: int32 `[N]`, not negative.
      method: a key of `explain.METHODS`.

    Returns:
      float32 `[N, h, w]`, not negative, not scaled.
    """
    wide = jnp.promote_types(activations.dtype, jnp.float32)

    def of_classes(activations):
        logits = rest(activations)
        # The logit of an image depends only on its own activations.
        return jnp.take_along_axis(logits, classes[:, None], 1).sum()

    gradients = jax.grad(of_classes)(activations).astype(wide)
    return _COMBINE[method](activations.astype(wide), gradients).astype(jnp.float32)


def _grad_cam_plus_plus(activations, gradients):
    positive = jax.nn.relu(gradients)
    total = jax.nn.relu(activations).sum((1, 2), keepdims=True)
    weights = (positive / (2 + positive * total)).sum((1, 2), keepdims=True)
    return jax.nn.relu((weights * activations).sum(-1))


def _hires_cam(activations, gradients):
    return jax.nn.relu((gradients * activations).sum(-1))


def _layer_cam(activations, gradients):
    return jax.nn.relu((jax.nn.relu(gradients) * activations).sum(-1))


_COMBINE = {
    'gradcam++': _grad_cam_plus_plus,
    'hirescam': _hires_cam,
    'layercam': _layer_cam,
}
