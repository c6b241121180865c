"""The supported image formats, and how to open a file without decoding it."""

import io
import os
import stat
import struct

from PIL import Image, UnidentifiedImageError, features

from flax_densenet.data import dicom, other_files
from flax_densenet.errors import UserError

# Not Pillow's complete list: some of the others start other programs (EPS) or hold no
# photographs. The JPEG reader also takes the stereo files (MPO) that some cameras write
# as .jpg.
_ALWAYS = ('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF', 'PPM', 'ICO', 'QOI', 'SGI')
_ENDINGS = {
    'JPEG': ('.jpg', '.jpeg', '.jpe', '.jfif', '.mpo'),
    'PNG': ('.png', '.apng'),
    'GIF': ('.gif',),
    'WEBP': ('.webp',),
    'BMP': ('.bmp', '.dib'),
    'TIFF': ('.tif', '.tiff'),
    'PPM': ('.ppm', '.pgm', '.pbm', '.pnm', '.pfm'),
    'ICO': ('.ico',),
    'QOI': ('.qoi',),
    'SGI': ('.sgi',),
    'TGA': ('.tga', '.vda', '.icb', '.vst'),
    'AVIF': ('.avif', '.avifs'),
    'JPEG2000': ('.jp2', '.j2k', '.j2c', '.jpc', '.jpx', '.jpf'),
    'HEIF': ('.heic', '.heif', '.hif', '.heics'),
    'DICOM': dicom.ENDINGS,
}
_MODULES = {'AVIF': 'avif', 'JPEG2000': 'jpg_2000'}
# Pixels, for formats with decoders that take 12 or more bytes per pixel; others take 4.
_MOST = dict.fromkeys(('AVIF', 'JPEG2000', 'HEIF', 'DICOM'), 60 * 10**6)
_MOST_DEEP_COLOR = 60 * 10**6  # pixels, of which two images are made
_PNG_START = b'\x89PNG\r\n\x1a\n'
_MOST_PNG_TEXT = 2**20
_MOST_ICONS = 64


def _has_heif():
    """Whether HEIF can be read; registers its reader with Pillow."""
    try:
        import pillow_heif
    except (ImportError, OSError):  # not installed, or a wheel for another machine
        return False
    pillow_heif.register_heif_opener(thumbnails=False)
    return True


FORMATS = (
    *_ALWAYS,
    *(name for name, module in _MODULES.items() if features.check(module)),
    *(['HEIF'] if _has_heif() else []),
    *(['DICOM'] if dicom.is_installed() else []),
    'TGA',  # last, since its files have no magic number
)
EXTENSIONS = frozenset(ending for name in FORMATS for ending in _ENDINGS[name])
_PILLOW = tuple(name for name in FORMATS if name != 'DICOM')


class OtherTiffError(UserError):
    """A TIFF of a kind that Pillow does not support."""


def open_file(file: str | bytes) -> Image.Image:
    """Opens an image and reads only its header.

    Raises:
      UserError: it is not a file. Pillow's errors: it is not an image.
    """
    if not isinstance(file, bytes) and not stat.S_ISREG(os.stat(file).st_mode):
        raise UserError('is not a file')  # opening a named pipe would wait forever
    start = read_start(file, dicom.MARKED)
    if dicom.has_mark(start):
        return dicom.DicomImage(file)
    formats = _PILLOW if _may_be_tga(start[:18]) else _PILLOW[:-1]
    opened = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        image = Image.open(opened, 'r', formats)
    except UnidentifiedImageError:
        if start.startswith((b'II*\0', b'MM\0*')):
            raise OtherTiffError(_OTHER_TIFF) from None
        reason = other_files.describe(start, FORMATS)
        if reason is None:
            raise
        raise UserError(reason) from None
    if image.format == 'TIFF':
        _check_tiff(image)
    return image


_OTHER_TIFF = (
    'is a damaged TIFF, or one of an unsupported kind (such as color in floats, 64-bit '
    'numbers or more than 4 channels); save it with 8 or 16 bits, or set data.channels '
    'to keep its bands'
)


def _check_tiff(image):
    """Raises for kinds of TIFF that Pillow reads as something else."""
    tags = image.tag_v2
    bits, planes = tags.get(258, (1,)), tags.get(284, 1)
    if planes == 2 and isinstance(bits, tuple) and len(bits) > 1 and bits[0] > 8:
        raise OtherTiffError(
            'is a 16-bit color TIFF with a plane for each channel, which is not '
            'supported; save it with interleaved channels'
        )
    kinds = tags.get(339, (1,))
    if image.mode == 'L' and isinstance(kinds, tuple) and kinds[0] == 2:
        raise OtherTiffError(
            'is a TIFF of signed 8-bit values, which is not supported; save it with 16 '
            'bits'
        )


def read_start(file: str | bytes, count: int) -> bytes:
    """The first bytes of a file."""
    if isinstance(file, bytes):
        return file[:count]
    with open(file, 'rb') as opened:
        return opened.read(count)


def read_all(file: str | bytes) -> bytes:
    """All bytes of a file."""
    if isinstance(file, bytes):
        return file
    with open(file, 'rb') as opened:
        return opened.read()


def count_pixels(image: Image.Image, file: str | bytes) -> int:
    """The maximum number of pixels from decoding an open file."""
    if image.format != 'ICO':
        return image.width * image.height
    return max(image.width * image.height, _count_icon_pixels(file))


def most_pixels(image: Image.Image) -> int:
    """The number of pixels decoded from an image of this format."""
    if is_deep_color(image):
        return _MOST_DEEP_COLOR
    return _MOST.get(image.format or '', 2 * (Image.MAX_IMAGE_PIXELS or 2**62))


def raw_mode(image: Image.Image) -> str:
    """The raw mode of an undecoded file in Pillow's terms.

    Empty if its decoder does not specify it.
    """
    tiles = getattr(image, 'tile', None)
    args = tiles[0].args if tiles else ''
    raw = args[0] if isinstance(args, tuple) and args else args
    return raw if isinstance(raw, str) else ''


def is_deep_color(image: Image.Image) -> bool:
    """Whether an undecoded file is in color with 16 bits per channel.

    Only for formats and modes of which `deep_color` reads all bits.
    """
    tiles = getattr(image, 'tile', None)
    if image.format == 'PPM' and image.mode == 'RGB' and tiles:
        tile = tiles[0]
        return tile.codec_name == 'ppm' and tile.args[-1] > 255
    return image.format in ('PNG', 'TIFF') and raw_mode(image).startswith(
        ('RGB;16', 'RGBA;16', 'RGBa;16', 'LA;16')
    )


def is_deep(image: Image.Image) -> bool:
    """Whether an open file has more than 8 bits, all of which can be read."""
    return image.mode.startswith('I') or image.mode == 'F' or is_deep_color(image)


def has_more_than_8_bits(file: str | bytes) -> bool:
    """`is_deep` for a file that can be read."""
    with open_file(file) as image:
        return is_deep(image)


def is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white in a gray image of more than 8 bits (TIFF)."""
    tags = getattr(image, 'tag_v2', None)
    return tags is not None and image.mode != 'RGB' and tags.get(262) == 0


def _may_be_tga(start):
    """Whether a file has an unmistakable header."""
    if len(start) < 18:
        return False
    _, has_map, kind, first, length, depth, _, _, wide, high, bits, more = (
        struct.unpack('<BBBHHBHHHHBB', start)
    )
    if kind not in (1, 2, 3, 9, 10, 11) or not wide or not high or more & 0xC0:
        return False
    if kind in (1, 9):
        return has_map == 1 and bits == 8 and depth in (16, 24, 32) and length > 0
    return (has_map, first, length, depth) == (0, 0, 0, 0) and bits in (8, 16, 24, 32)


def _count_icon_pixels(file):
    """The most pixels that an image of an icon states, whatever the icon's list."""
    content, most = read_all(file), 0
    count = struct.unpack_from('<H', content, 4)[0]
    for place in range(6, 6 + 16 * min(count, _MOST_ICONS), 16):
        if place + 16 > len(content):
            break
        offset = struct.unpack_from('<I', content, place + 12)[0]
        inside = content[offset : offset + 26]
        if len(inside) < 26:
            continue
        form, start = ('>II', 16) if inside.startswith(_PNG_START) else ('<ii', 4)
        wide, high = struct.unpack_from(form, inside, start)
        most = max(most, abs(wide) * abs(high))
    return most


def is_text_limit(error: Exception) -> bool:
    """Whether Pillow rejected a PNG because of data other than its pixels."""
    message = str(error)
    return 'PngImagePlugin.MAX_TEXT' in message or 'used in text chunks' in message


def without_text(file: str | bytes) -> bytes:
    """A PNG without its texts and color profile; other content is unchanged.

    The orientation may be in an uncompressed text (XMP), which is kept if it is short.
    """
    content = read_all(file)
    if not content.startswith(_PNG_START):
        return content
    kept, place, text = [_PNG_START], len(_PNG_START), 0
    while place + 8 <= len(content):
        size, kind = struct.unpack_from('>I4s', content, place)
        end = place + 12 + size
        is_short = kind == b'iTXt' and text + size < _MOST_PNG_TEXT
        packed = b'\0\1' in content[place + 8 : place + 8 + min(size, 82)]
        if kind not in (b'iCCP', b'zTXt', b'tEXt', b'iTXt') or (
            is_short and not packed
        ):
            kept.append(content[place:end])
            text += size if kind == b'iTXt' else 0
        place = end
    return b''.join(kept)
