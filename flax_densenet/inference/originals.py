"""Original images, on which maps are drawn, and the part that the model sees."""

import os

import numpy as np
from PIL import Image

from flax_densenet.data import bands, deep_picture, images

SIDE = 768  # the longer side in pixels of an original that is kept for a picture


def load(file, preparation: images.Preparation, *, side: int = SIDE):
    """Loads the original of an image, in any form that a `Predictor` reads.

    Returns:
      The result of `show`.

    Raises:
      UserError: the image cannot be read.
    """
    if isinstance(file, np.ndarray):
        picture = images.to_picture(file, preparation)
    elif isinstance(file, Image.Image):
        picture = images.picture_of(file, preparation)
    else:
        file = file if isinstance(file, bytes) else os.fspath(file)
        picture = images.load_picture(file, preparation)
    return show(picture, preparation, side=side)


def show(picture, preparation: images.Preparation, *, side: int):
    """Converts a picture from `images.load_picture` for a screen.

    Args:
      picture: the picture.
      preparation: the preparation of images for the model.
      side: the largest length of the longer side, in pixels.

    Returns:
      uint8 `[H, W, 3]`, and the part of it that the model sees: left, top, right and
      bottom in pixels.
    """
    if not isinstance(picture, Image.Image):
        kept = preparation.channels
        array = picture.to_array(kept if bands.are_kept(kept) else 3)
        array = bands.to_visible(deep_picture.to_uint8(array))
        picture = Image.fromarray(np.ascontiguousarray(array))
    box = seen_part(preparation, picture.size)
    scale = min(1.0, side / max(picture.size))
    if scale < 1:
        size = tuple(max(1, round(n * scale)) for n in picture.size)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(picture.convert('RGB')), tuple(x * scale for x in box)


def seen_part(preparation: images.Preparation, size):
    """The part of a picture of a size (width, height) that the model sees."""
    width, height = size
    if preparation.resize == 'stretch' or not preparation.size:
        return 0.0, 0.0, float(width), float(height)
    rows, columns = preparation.shape
    unit = preparation.crop_fraction * min(width / columns, height / rows)
    left, top = (width - unit * columns) / 2, (height - unit * rows) / 2
    return left, top, width - left, height - top
