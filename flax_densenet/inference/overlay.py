"""Draws class activation maps over their images."""

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flax_densenet.data import bands, deep_picture
from flax_densenet.system import fonts

# From purple through magenta to nearly white: hues that are rare in photographs. Their
# brightness increases, so that they can be distinguished without color.
_COLORS = np.array(
    [(70, 0, 120), (140, 0, 160), (215, 0, 150), (255, 70, 180), (255, 200, 240)],
    np.float32,
)


_FINE = 64  # a map of at least this side in pixels is smoothed
_SMOOTH = 1 / 64  # standard deviation, as a fraction of the shorter side


def enlarge(cam: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Enlarges a map `[h, w]` to the size of its image: float32 `[H, W]`.

    Maps with one value per pixel are smoothed; single pixels are hard to see on a
    photograph.
    """
    cam = np.asarray(cam, np.float32)
    if min(cam.shape) >= _FINE:
        from scipy import ndimage

        cam = ndimage.gaussian_filter(cam, _SMOOTH * min(cam.shape))
    picture = Image.fromarray(cam)
    return np.asarray(picture.resize(shape[::-1], Image.Resampling.BILINEAR))


def top_of(cam: np.ndarray) -> float:
    """The value that gets the brightest color.

    It is the highest value; in maps with one value per pixel, which have outliers, it
    is the 99th percentile.
    """
    cam = np.asarray(cam, np.float32)
    highest = float(cam.max())
    if min(cam.shape) < _FINE:
        return highest
    return float(np.percentile(enlarge(cam, cam.shape), 99)) or highest


def _color(cam, shape, strength, top=None):
    """The colors `[H, W, 3]` of a map, and their opacity `[H, W, 1]`."""
    top = top_of(cam) if top is None else top
    cam = np.clip(enlarge(cam, shape) / max(top, 1e-12), 0, 1)
    place = cam * (len(_COLORS) - 1)
    low = np.minimum(place.astype(int), len(_COLORS) - 2)
    share = (place - low)[..., None]
    colors = _COLORS[low] * (1 - share) + _COLORS[low + 1] * share
    return colors, strength * cam[..., None]


def overlay(
    image: np.ndarray,
    cam: np.ndarray,
    *,
    strength: float = 0.75,
    top: float | None = None,
    box: tuple[float, float, float, float] | None = None,
):
    """Draws a map over its image.

    Args:
      image: uint8 or uint16 `[H, W, C]`; see `bands.to_visible`.
      cam: `[h, w]`.
      strength: opacity of the colors at the highest value.
      top: the value that gets the brightest color; by default `top_of(cam)`. Use the
        same value to compare the maps of several classes.
      box: the part of the image that the map covers, (left, top, right, bottom) in
        pixels; the rest is darkened. By default the entire image.

    Returns:
      uint8 `[H, W, 3]`.
    """
    image = deep_picture.to_uint8(image)
    image = bands.to_visible(image).astype(np.float32)
    height, width = image.shape[:2]
    left, above, right, below = map(round, box or (0, 0, width, height))
    mixed = image * 0.45
    part = image[above:below, left:right]
    colors, alpha = _color(cam, part.shape[:2], strength, top)
    mixed[above:below, left:right] = part * (1 - alpha) + colors * alpha
    return mixed.round().astype(np.uint8)


# In pixels: the smallest side of a panel, the height of the caption, the size of its
# font, and the gap.
_PANEL, _STRIP, _LETTERS, _GAP = 224, 30, 16, 6


def picture(
    image: np.ndarray,
    cam: np.ndarray,
    caption: str,
    *,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """Draws an image next to its overlay, with a caption.

    Args:
      image: uint8 `[H, W, 3]` or `[H, W, 1]`; a small one is enlarged.
      cam: `[h, w]`.
      caption: one line, cut off if it does not fit.
      box: see `overlay`.

    Returns:
      An RGB image.
    """
    image = deep_picture.to_uint8(image)
    times = max(1, -(-_PANEL // min(image.shape[:2])))
    large = image.repeat(times, 0).repeat(times, 1)
    height, width = large.shape[:2]
    page = Image.new('RGB', (2 * width + _GAP, height + _STRIP), 'white')
    font = _font(caption)
    while caption and font.getlength(caption) > page.width - 2 * _GAP:
        caption = caption.removesuffix('…')[:-1] + '…' if len(caption) > 1 else ''
    ImageDraw.Draw(page).text((_GAP, _STRIP / 2), caption, 'black', font, anchor='lm')
    plain = bands.to_visible(large)
    page.paste(Image.fromarray(np.ascontiguousarray(plain)), (0, _STRIP))
    scaled = box and (times * box[0], times * box[1], times * box[2], times * box[3])
    drawn = overlay(large, cam, box=scaled)
    page.paste(Image.fromarray(drawn), (width + _GAP, _STRIP))
    return page


@functools.lru_cache(256)
def _font(text):
    """A font for the letters of a text; only basic letters without matplotlib."""
    try:
        path, number = fonts.best_file(text)  # 0.2 s, and only for pictures
    except ImportError:
        return ImageFont.load_default(_LETTERS)
    return ImageFont.truetype(path, _LETTERS, index=number)


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
