"""Grad-CAM: which parts of an image speak for a class (Selvaraju et al., 1610.02391).

The maps A are the model's `features` (behind the last batch norm). Their weights are
the gradients of the class's logit, averaged over the positions (equation 1); the map
shown is the ReLU of their weighted sum (equation 2).
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flax_densenet import model

# Points of a colour map from dark blue over green to yellow, seen alike by the colour
# blind (viridis, CC0).
_COLOURS = np.array(
    [
        (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
        (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
    ],
    np.float32,
)  # fmt: skip


@functools.partial(jax.jit, static_argnames='module')
def grad_cam(variables, images, classes, *, module: model.DenseNet):
    """Logits, and the map of one class for each image.

    Args:
      variables: `{'params', 'batch_stats'}`.
      images: float32 `[N, H, W, C]`, normalised.
      classes: int32 `[N]`; -1 takes the class with the highest logit.

    Returns:
      logits `[N, num_classes]`, maps float32 `[N, h, w]`, 0 or above, not scaled.
    """
    features = module.apply(variables, images, method='features')
    return from_features(variables, features, classes, module=module)


def from_features(variables, features, classes, *, module: model.DenseNet):
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


def _colour(cam, shape, strength):
    """Colours `[H, W, 3]` of a map, and their share `[H, W, 1]`."""
    height, width = shape
    cam = np.asarray(cam, np.float32)
    cam = cam / max(float(cam.max()), 1e-12)
    cam = Image.fromarray(cam).resize((width, height), Image.Resampling.BILINEAR)
    cam = np.clip(np.asarray(cam), 0, 1)
    place = cam * (len(_COLOURS) - 1)
    low = np.minimum(place.astype(int), len(_COLOURS) - 2)
    share = (place - low)[..., None]
    colours = _COLOURS[low] * (1 - share) + _COLOURS[low + 1] * share
    return colours, strength * cam[..., None]


def overlay(image: np.ndarray, cam: np.ndarray, *, strength: float = 0.55):
    """A map laid over its image.

    Args:
      image: uint8 `[H, W, 3]` or `[H, W, 1]`.
      cam: `[h, w]`; its highest value gets the brightest colour.
      strength: share of the colours where the map is highest.

    Returns:
      uint8 `[H, W, 3]`.
    """
    image = np.broadcast_to(image, (*image.shape[:2], 3)).astype(np.float32)
    colours, alpha = _colour(cam, image.shape[:2], strength)
    mixed = image * (1 - alpha) + colours * alpha
    return mixed.round().astype(np.uint8)


# Pixels: a panel's side at least, the caption's strip, its letters, the gap.
_PANEL, _STRIP, _LETTERS, _GAP = 224, 30, 16, 6


def picture(image: np.ndarray, cam: np.ndarray, caption: str) -> Image.Image:
    """An image beside its overlay, under a caption: readable without the program.

    Args:
      image: uint8 `[H, W, 3]` or `[H, W, 1]`; small ones are shown enlarged.
      cam: `[h, w]`.
      caption: one line; what does not fit is cut off.

    Returns:
      An RGB image.
    """
    times = max(1, -(-_PANEL // min(image.shape[:2])))
    large = image.repeat(times, 0).repeat(times, 1)
    height, width = large.shape[:2]
    page = Image.new('RGB', (2 * width + _GAP, height + _STRIP), 'white')
    font = _font()
    while caption and font.getlength(caption) > page.width - 2 * _GAP:
        caption = caption.removesuffix('…')[:-1] + '…' if len(caption) > 1 else ''
    ImageDraw.Draw(page).text((_GAP, _STRIP / 2), caption, 'black', font, anchor='lm')
    plain = np.broadcast_to(large, (height, width, 3))
    page.paste(Image.fromarray(np.ascontiguousarray(plain)), (0, _STRIP))
    page.paste(Image.fromarray(overlay(large, cam)), (width + _GAP, _STRIP))
    return page


@functools.cache
def _font():
    """DejaVu Sans of matplotlib: Pillow's own font has few letters beyond ASCII."""
    import matplotlib  # 0.2 s, and only where a picture is made

    path = os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')
    return ImageFont.truetype(path, _LETTERS)


def layer(cam: np.ndarray, shape: tuple[int, int], *, strength: float = 0.7):
    """A map to be laid over an image by who shows it: `overlay`'s colours and alpha.

    Args:
      cam: `[h, w]`, as `overlay` takes it.
      shape: (H, W) of the result.
      strength: opacity where the map is highest.

    Returns:
      uint8 `[H, W, 4]`, RGBA, transparent where the map is 0.
    """
    colours, alpha = _colour(cam, shape, strength)
    return np.concatenate([colours, 255 * alpha], -1).round().astype(np.uint8)
