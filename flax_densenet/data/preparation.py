"""How an image becomes the array that a model takes."""

import dataclasses

import numpy as np
from PIL import Image

from flax_densenet.settings import sizes

RESIZES = ('stretch', 'crop')
INTERPOLATIONS = {
    'bilinear': Image.Resampling.BILINEAR,
    'bicubic': Image.Resampling.BICUBIC,
}


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Options for making the array that a model takes from an image.

    Attributes:
      size: side of a square in pixels, or (height, width); 0 keeps the image's own
        shape.
      resize: `stretch` uses the entire image, `crop` the largest centered part with the
        shape of `size`.
      crop_fraction: share of that part's height and width that is kept, for `crop`. It
        is 0.875 (224 of 256) in torchvision and timm.
      interpolation: `bilinear` or `bicubic`, both with antialiasing.
      channels: 3 for color, 1 for gray; any other number keeps those of the file.
      window: values of images of more than 8 bits that become black and white; None:
        16 bits are from 0 to 65535, floats from 0 to 1 or to 255.
      bit_depth: 8 converts all images to uint8. With 9 to 16 they are uint16 from 0
        (black) to 65535 (white), and no intermediate step has fewer levels.
    """

    size: sizes.Size = 0
    resize: str = 'stretch'
    crop_fraction: float = 1.0
    interpolation: str = 'bilinear'
    channels: int = 3
    window: tuple[float, float] | None = None
    bit_depth: int = 8

    def __post_init__(self):
        object.__setattr__(self, 'size', sizes.parse(self.size))

    @property
    def is_deep(self) -> bool:
        """Whether images keep more than 8 bits."""
        return self.bit_depth > 8

    @property
    def dtype(self) -> type[np.generic]:
        """The dtype of prepared images."""
        return np.uint16 if self.is_deep else np.uint8

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels; zeros if the image keeps its own."""
        return sizes.pair(self.size)

    @property
    def shape_text(self) -> str:
        """Height x width, such as `224x224`."""
        return sizes.describe(self.size)

    def decode_shape(self) -> tuple[int, int]:
        """The height and width that an image needs in order not to be enlarged."""
        height, width = self.shape
        return int(height / self.crop_fraction), int(width / self.crop_fraction)

    def least(self) -> tuple[int, int] | None:
        """The minimum size to which an image may be reduced before `apply`."""
        height, width = self.decode_shape()
        return (2 * width, 2 * height) if self.size else None

    def apply(self, image) -> np.ndarray:
        """An image from `images.load_picture` as `[height, width, channels]`."""
        if self.size and image.size != self.shape[::-1]:
            image = self._resize(image)
        if not isinstance(image, Image.Image):
            return image.to_array(self.channels)
        if self.channels == 1:
            return np.asarray(image.convert('L'))[..., None]
        return np.asarray(image)

    def apply_to_part(self, image, box) -> Image.Image | np.ndarray:
        """Resizes the part (left, top, right, bottom) of an image from `load_picture`.

        Returns:
          A Pillow image, RGB or L; with 16 bits or other channels, an array as from
          `apply`.
        """
        image = image.resize(
            self.shape[::-1], INTERPOLATIONS[self.interpolation], box=box
        )
        if not isinstance(image, Image.Image):
            return image.to_array(self.channels)
        return image.convert('L') if self.channels == 1 else image

    def _resize(self, image):
        filter_, size = INTERPOLATIONS[self.interpolation], self.shape[::-1]
        if self.resize == 'stretch':
            return image.resize(size, filter_)
        # Rounds like Resize and CenterCrop of torchvision: the limiting side (for a
        # square the shorter one) to an integer, the other one down, the offset to the
        # nearest even number. If `size` is not square, timm's ResizeKeepRatio rounds
        # the other one.
        enough = self.decode_shape()[::-1]
        limit = int(enough[0] * image.height < enough[1] * image.width)
        to_whole = int if enough[0] == enough[1] else round
        shape = [to_whole(enough[limit] * n / image.size[limit]) for n in image.size]
        left, top = (round((n - m) / 2) for n, m in zip(shape, size, strict=True))
        # Only the part that is kept is computed.
        scale = [n / m for n, m in zip(image.size, shape, strict=True)]
        box = (
            left * scale[0],
            top * scale[1],
            (left + size[0]) * scale[0],
            (top + size[1]) * scale[1],
        )
        return image.resize(size, filter_, box=box)
