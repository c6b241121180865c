"""One image file of any common kind -> one uint8 array of the wanted size."""

import dataclasses
import io
import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flax_densenet.errors import UserError

# The formats that are tried, whatever the file is called. Not Pillow's whole list:
# some of the rest start other programs (EPS) or hold no photographs. The JPEG reader
# also takes the stereo files (MPO) that some cameras write as .jpg.
FORMATS = ('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF')
EXTENSIONS = frozenset(
    ('.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.gif', '.webp', '.bmp', '.dib')
    + ('.tif', '.tiff')
)
RESIZES = ('stretch', 'crop')
INTERPOLATIONS = {
    'bilinear': Image.Resampling.BILINEAR,
    'bicubic': Image.Resampling.BICUBIC,
}
# What Pillow raises for files that are broken, in one way or another.
_BROKEN = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    MemoryError,
)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: as a viewer shows it on a white page.

    16-bit grey is divided by 257 (Pillow alone would clip it at 255), transparent
    pixels are laid over white (Pillow alone would show what hides behind them).
    """
    if image.mode.startswith('I'):  # 16-bit grey, some of it read as 32-bit
        grey = np.asarray(image).astype(np.int64)
        grey = np.clip(grey, 0, 65535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert('RGB')
    if image.mode == 'F':  # TIFF of floats: 0 to 1, else 0 to 255
        grey = np.nan_to_num(np.asarray(image))
        grey = np.clip(grey * (255 if grey.max(initial=0) <= 1 else 1), 0, 255)
        return Image.fromarray(grey.round().astype(np.uint8)).convert('RGB')
    if image.mode in ('LA', 'PA', 'RGBA', 'La', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        page = Image.new('RGBA', image.size, 'white')
        return Image.alpha_composite(page, image).convert('RGB')
    return image if image.mode == 'RGB' else image.convert('RGB')


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How an image becomes the square that a model takes.

    Attributes:
      size: side of the square in pixels; 0 leaves the image's own shape.
      resize: `stretch` takes the whole image, `crop` a square in its centre.
      crop_fraction: of `crop`: side of that square, as a share of the shorter side of
        the image; torchvision's and timm's 224 of 256 is 0.875.
      interpolation: `bilinear` or `bicubic`, both with antialiasing.
      channels: 3 for colour, 1 for grey.
    """

    size: int = 0
    resize: str = 'stretch'
    crop_fraction: float = 1.0
    interpolation: str = 'bilinear'
    channels: int = 3

    def decode_size(self) -> int:
        """Shorter side from which on an image is not enlarged."""
        return int(self.size / self.crop_fraction)

    def apply(self, image: Image.Image) -> np.ndarray:
        """An RGB image to uint8 `[size, size, channels]`."""
        if self.size and image.size != (self.size, self.size):
            image = self._resize(image)
        if self.channels == 1:
            return np.asarray(image.convert('L'))[..., None]
        return np.asarray(image)

    def _resize(self, image):
        filter_ = INTERPOLATIONS[self.interpolation]
        size = self.size
        if self.resize == 'stretch':
            return image.resize((size, size), filter_)
        # As torchvision's Resize and CenterCrop round: the shorter side to a whole
        # number, the longer one cut down, the middle to the nearest even number.
        short, side = min(image.size), self.decode_size()
        shape = [side if n == short else int(side * n / short) for n in image.size]
        left, top = (round((n - size) / 2) for n in shape)
        # Only what is kept is computed.
        scale = [n / m for n, m in zip(image.size, shape, strict=True)]
        box = (
            left * scale[0],
            top * scale[1],
            (left + size) * scale[0],
            (top + size) * scale[1],
        )
        return image.resize((size, size), filter_, box=box)


def load_image(file, preparation: Preparation) -> np.ndarray:
    """Reads the first frame of an image, upright.

    Args:
      file: a path, or the bytes of the file.

    Returns:
      uint8 `[size, size, channels]`.

    Raises:
      UserError: with the reason, where the file is no image or is cut short.
    """
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with Image.open(source, formats=FORMATS) as image:
            if preparation.size and image.format in ('JPEG', 'MPO'):
                # Decode at a half, a quarter or an eighth where the result still has
                # twice the wanted size: no visible difference, much less work.
                image.draft(None, (2 * preparation.decode_size(),) * 2)
            ImageOps.exif_transpose(image, in_place=True)  # else it copies
            return preparation.apply(to_rgb(image))
    except _BROKEN as error:
        raise UserError(_reason(error)) from error


def prepare_array(image: np.ndarray, preparation: Preparation) -> np.ndarray:
    """`load_image` for a uint8 array `[H, W]`, `[H, W, 1]` or `[H, W, 3]`."""
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    return preparation.apply(to_rgb(Image.fromarray(image)))


def _reason(error):
    if isinstance(error, FileNotFoundError):
        return 'is not there any more'
    if isinstance(error, UnidentifiedImageError):
        return f'is not an image ({", ".join(FORMATS)})'
    return f'cannot be decoded ({error})'


def check_image(path: str, *, decode: bool) -> str | None:
    """Why a file is no whole image, or None.

    Args:
      path: of the file.
      decode: True decodes it. False reads its first bytes and its last, some 0.1 ms,
        and decodes only where its format's end mark is not at its end.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if decode or not _has_end_mark(path, image.format):
                image.load()
    except _BROKEN as error:
        return _reason(error)
    return None


def _has_end_mark(path, image_format):
    with open(path, 'rb') as file:
        file.seek(-min(12, os.path.getsize(path)), os.SEEK_END)
        end = file.read()
    marks = {'JPEG': b'\xff\xd9', 'GIF': b';', 'PNG': b'IEND\xaeB`\x82'}
    return image_format in marks and end.endswith(marks[image_format])
