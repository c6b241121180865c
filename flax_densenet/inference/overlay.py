"""Draws class activation maps over their images."""

import functools
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flax_densenet.data import deep_picture

# A color map from dark blue over green to yellow that suits color-blind people
# (viridis, CC0).
_COLORS = np.array(
    [
        (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
        (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
    ],
    np.float32,
)  # fmt: skip


def _color(cam, shape, strength):
    """Colors `[H, W, 3]` of a map, and their opacity `[H, W, 1]`."""
    height, width = shape
    cam = np.asarray(cam, np.float32)
    cam = cam / max(float(cam.max()), 1e-12)
    cam = Image.fromarray(cam).resize((width, height), Image.Resampling.BILINEAR)
    cam = np.clip(np.asarray(cam), 0, 1)
    place = cam * (len(_COLORS) - 1)
    low = np.minimum(place.astype(int), len(_COLORS) - 2)
    share = (place - low)[..., None]
    colors = _COLORS[low] * (1 - share) + _COLORS[low + 1] * share
    return colors, strength * cam[..., None]


def overlay(image: np.ndarray, cam: np.ndarray, *, strength: float = 0.55):
    """Draws a map over its image.

    Args:
      image: uint8 or uint16 `[H, W, 3]` or `[H, W, 1]`.
      cam: `[h, w]`; the highest value gets the brightest color.
      strength: opacity of the colors at the highest value.

    Returns:
      uint8 `[H, W, 3]`.
    """
    image = deep_picture.to_uint8(image)
    image = np.broadcast_to(image, (*image.shape[:2], 3)).astype(np.float32)
    colors, alpha = _color(cam, image.shape[:2], strength)
    mixed = image * (1 - alpha) + colors * alpha
    return mixed.round().astype(np.uint8)


# In pixels: smallest side of a panel, height of the caption, its font, the gap.
_PANEL, _STRIP, _LETTERS, _GAP = 224, 30, 16, 6


def picture(image: np.ndarray, cam: np.ndarray, caption: str) -> Image.Image:
    """An image next to its overlay, with a caption.

    Args:
      image: uint8 `[H, W, 3]` or `[H, W, 1]`; a small one is enlarged.
      cam: `[h, w]`.
      caption: one line, cut off if it does not fit.

    Returns:
      An RGB image.
    """
    image = deep_picture.to_uint8(image)
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
    """DejaVu Sans of matplotlib if installed; Pillow's font has only basic letters."""
    try:
        import matplotlib  # takes 0.2 s, and is only needed for pictures
    except ImportError:
        return ImageFont.load_default(_LETTERS)
    path = os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')
    return ImageFont.truetype(path, _LETTERS)


def layer(cam: np.ndarray, shape: tuple[int, int], *, strength: float = 0.7):
    """A transparent layer for programs that draw the map over the image themselves.

    Args:
      cam: `[h, w]`; the highest value gets the brightest color.
      shape: (H, W) of the result.
      strength: opacity at the highest value.

    Returns:
      uint8 `[H, W, 4]`, RGBA, transparent where the map is 0.
    """
    colors, alpha = _color(cam, shape, strength)
    return np.concatenate([colors, 255 * alpha], -1).round().astype(np.uint8)
