"""Random changes of the geometry of training images, and recipes of them.

Each function takes an image uint8 or uint16 `[H, W, C]` and a numpy Generator and
returns an image of the same shape and type. `flip` also takes one of Pillow's.

>>> import numpy as np
>>> image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
>>> augment(image, np.random.default_rng(0), recipe='none').shape
(2, 2, 3)
"""

import math

import numpy as np
from PIL import Image

from flax_densenet.data import deep_picture


def flip(image, rng):
    """Mirrors left and right, with a probability of 0.5."""
    if rng.random() >= 0.5:
        return image
    if isinstance(image, Image.Image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image[:, ::-1]


def shift(image, rng):
    """Shifts by up to an eighth of the side (4 of 32 pixels) and pads with zeros.

    With `flip`, this is the paper's augmentation of CIFAR (section 4.1).
    """
    height, width = image.shape[:2]
    most = (height // 8, width // 8)
    padded = np.pad(image, ((most[0],) * 2, (most[1],) * 2, (0, 0)))
    top, left = rng.integers(2 * most[0] + 1), rng.integers(2 * most[1] + 1)
    return padded[top : top + height, left : left + width]


def crop(image, rng):
    """A random crop (8 to 100% of the area, aspect 3:4 to 4:3), resized to full size.

    The random-resized crop of Szegedy et al., arXiv 1409.4842, section 6. The aspect is
    relative to that of the image.
    """
    height, width = image.shape[:2]
    box = crop_part((width, height), rng, aspect=width / height)
    filter_ = Image.Resampling.BILINEAR
    if image.dtype == np.uint16:
        deep = deep_picture.DeepPicture.from_array(image)
        return deep.resize((width, height), filter_, box).to_array(image.shape[-1])
    picture = as_picture(image).resize((width, height), filter_, box=box)
    return to_array(picture)


def crop_part(size, rng, *, aspect: float = 1.0):
    """The box of `crop` in an image of (width, height): left, top, right, bottom.

    Args: aspect: width / height of the resulting image.
    """
    width, height = size
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))) * aspect
        new_width = round(math.sqrt(area * ratio))
        new_height = round(math.sqrt(area / ratio))
        if 0 < new_width <= width and 0 < new_height <= height:
            left = rng.integers(width - new_width + 1)
            top = rng.integers(height - new_height + 1)
            return left, top, left + new_width, top + new_height
    return 0, 0, width, height


def as_picture(image: np.ndarray) -> Image.Image:
    """uint8 `[H, W, C]` as Pillow's image: RGB, or L (gray) for one channel."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def to_array(picture: Image.Image) -> np.ndarray:
    """Pillow's image as uint8 `[H, W, C]`."""
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


RECIPES = {
    'none': (),
    'flip': (flip,),
    'shift_flip': (shift, flip),
    'crop_flip': (crop, flip),
}


def augment(image, rng, *, recipe: str):
    """Applies the functions of `RECIPES[recipe]` in order."""
    for function in RECIPES[recipe]:
        image = function(image, rng)
    return image
