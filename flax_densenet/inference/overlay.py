"""Class activation maps laid over the images that they explain."""

import functools
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Points of a color map from dark blue over green to yellow, seen alike by the color
# blind (viridis, CC0).
_COLORS = np.array(
    [
        (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
        (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
    ],
    np.float32,
)  # fmt: skip


def _color(cam, shape, strength):
    """Colors `[H, W, 3]` of a map, and their share `[H, W, 1]`."""
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
    """A map laid over its image.

    Args:
      image: uint8 `[H, W, 3]` or `[H, W, 1]`.
      cam: `[h, w]`; its highest value gets the brightest color.
      strength: share of the colors where the map is highest.

    Returns:
      uint8 `[H, W, 3]`.
    """
    image = np.broadcast_to(image, (*image.shape[:2], 3)).astype(np.float32)
    colors, alpha = _color(cam, image.shape[:2], strength)
    mixed = image * (1 - alpha) + colors * alpha
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
    """DejaVu Sans of matplotlib, if installed: Pillow's own has only basic letters."""
    try:
        import matplotlib  # 0.2 s, and only where a picture is made
    except ImportError:
        return ImageFont.load_default(_LETTERS)
    path = os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')
    return ImageFont.truetype(path, _LETTERS)


def layer(cam: np.ndarray, shape: tuple[int, int], *, strength: float = 0.7):
    """A map to be laid over an image by who shows it: `overlay`'s colors and alpha.

    Args:
      cam: `[h, w]`, as `overlay` takes it.
      shape: (H, W) of the result.
      strength: opacity where the map is highest.

    Returns:
      uint8 `[H, W, 4]`, RGBA, transparent where the map is 0.
    """
    colors, alpha = _color(cam, shape, strength)
    return np.concatenate([colors, 255 * alpha], -1).round().astype(np.uint8)
