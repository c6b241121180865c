"""Every kind of image file becomes the right RGB pixels, or one clear reason."""

import io

import numpy as np
import pytest
from PIL import Image

from flax_densenet import UserError
from flax_densenet.data import images
from helpers.paths import shared

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
GRAY = RGB[..., 0]


def encode(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def load_image(file, size, resize='stretch', **fields):
    preparation = images.Preparation(size, resize, **fields)
    return images.load_image(file, preparation)


def load(image, image_format='PNG', **options):
    return load_image(encode(image, image_format, **options), 0)


@pytest.mark.parametrize('name', ['PNG', 'BMP', 'TIFF', 'WEBP', 'GIF', 'JPEG'])
def test_formats(name):
    options = {'WEBP': {'lossless': True}, 'JPEG': {'quality': 100, 'subsampling': 0}}
    smooth = np.linspace(0, 255, 6 * 9 * 3).reshape(6, 9, 3).astype(np.uint8)
    # A GIF holds 256 colors: enough for this image's 54 pixels.
    found = load(Image.fromarray(smooth), name, **options.get(name, {}))
    bound = {'JPEG': 8}.get(name, 0)
    assert np.abs(found.astype(int) - smooth).max() <= bound


def test_gray():
    expected = np.repeat(GRAY[..., None], 3, -1)
    np.testing.assert_array_equal(load(Image.fromarray(GRAY)), expected)


@pytest.mark.parametrize('name', ['PNG', 'TIFF'])
def test_16_bit_gray_keeps_its_range(name):
    deep = GRAY.astype(np.uint16) * 257
    expected = np.repeat(GRAY[..., None], 3, -1)
    np.testing.assert_array_equal(load(Image.fromarray(deep), name), expected)


def test_float_tiff():
    expected = np.repeat(GRAY[..., None], 3, -1)
    unit = Image.fromarray((GRAY / 255).astype(np.float32))
    np.testing.assert_array_equal(load(unit, 'TIFF'), expected)
    np.testing.assert_array_equal(
        load(Image.fromarray(GRAY.astype(np.float32)), 'TIFF'), expected
    )


def test_alpha_lies_over_white():
    alpha = np.zeros((6, 9, 1), np.uint8)
    alpha[:3] = 255
    found = load(Image.fromarray(np.concatenate([RGB, alpha], -1)))
    np.testing.assert_array_equal(found[:3], RGB[:3])
    assert (found[3:] == 255).all()
    gray = load(Image.fromarray(np.concatenate([GRAY[..., None], alpha], -1)))
    np.testing.assert_array_equal(gray[:3, :, 1], GRAY[:3])
    assert (gray[3:] == 255).all()


def test_palette_with_a_transparent_color():
    image = Image.fromarray((GRAY > 127).astype(np.uint8), 'L').convert('P')
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    found = load(image, 'PNG', transparency=0)
    expected = np.where((GRAY > 127)[..., None], [200, 100, 50], 255)
    np.testing.assert_array_equal(found, expected)
    found = load(image, 'PNG')
    expected = np.where((GRAY > 127)[..., None], [200, 100, 50], [10, 20, 30])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('name', ['JPEG', 'TIFF'])
def test_cmyk(name):
    red = Image.new('CMYK', (16, 16), (0, 255, 255, 0))
    found = load(red, name).astype(int)
    assert np.abs(found - [255, 0, 0]).max() <= 4


def test_1_bit():
    found = load(Image.fromarray(GRAY > 127))
    np.testing.assert_array_equal(found[..., 2], (GRAY > 127) * 255)


def test_first_frame_of_a_gif():
    frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue')]
    found = load(frames[0], 'GIF', save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(found, np.broadcast_to([255, 0, 0], (8, 8, 3)))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(orientation):
    upright = Image.fromarray(np.kron(RGB[:4, :5], np.ones((8, 8, 1), np.uint8)))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = load(stored, 'PNG', exif=exif)
    np.testing.assert_array_equal(found, np.asarray(upright))


def test_resize_stretches_or_crops():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 200  # the central square
    file = encode(Image.fromarray(image), 'PNG')
    stretched = load_image(file, 10)
    assert stretched.shape == (10, 10, 3)
    assert stretched[:, :2].max() == 0 and stretched[:, 5].min() == 200
    assert load_image(file, 10, 'crop').min() > 150


@pytest.mark.slow
@pytest.mark.parametrize('size', [(640, 427), (333, 501), (100, 300), (256, 256)])
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_crop_is_resize_and_crop(size, interpolation):
    """torchvision's Resize(256) and CenterCrop(224), by its own arithmetic."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(size)
    short = min(size)
    shape = [256 if n == short else int(256 * n / short) for n in size]
    resized = image.resize(shape, images.INTERPOLATIONS[interpolation])
    left, top = (int(round((n - 224) / 2.0)) for n in shape)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    fields = dict(crop_fraction=0.875, interpolation=interpolation)
    found = load_image(encode(image, 'PNG'), 224, 'crop', **fields)
    assert np.abs(found.astype(int) - expected).max() <= 2
    off = load_image(encode(image, 'PNG'), 224, 'crop')  # crops nothing else
    assert np.abs(off.astype(int) - expected).max() > 20


def test_one_channel():
    gray = load_image(encode(Image.fromarray(RGB), 'PNG'), 0, channels=1)
    assert gray.shape == (*RGB.shape[:2], 1)
    expected = Image.fromarray(RGB).convert('L')
    np.testing.assert_array_equal(gray[..., 0], expected)


def test_resize_equals_pillows_with_antialiasing():
    image = Image.fromarray(np.kron(RGB, np.ones((9, 9, 1), np.uint8)))
    expected = image.resize((16, 16), Image.Resampling.BILINEAR)
    found = load_image(encode(image, 'PNG'), 16)
    np.testing.assert_array_equal(found, expected)


def test_large_photographs_are_decoded_small_with_little_change():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    file = encode(smooth.resize((1600, 1200), Image.Resampling.BICUBIC), 'JPEG')
    full = Image.open(io.BytesIO(file)).resize((64, 64), Image.Resampling.BILINEAR)
    found = load_image(file, 64).astype(int)
    difference = np.abs(found - np.asarray(full))
    assert difference.max() > 0 and difference.mean() < 1.5


def test_a_real_photograph():
    path = next(shared('data/hymenoptera/val/bees').glob('*.jpg'))
    with Image.open(path) as image:
        full = image.convert('RGB').resize((224, 224), Image.Resampling.BILINEAR)
    difference = load_image(str(path), 224).astype(int) - np.asarray(full)
    assert np.abs(difference).mean() < 1


BAD = {
    'text': (b'this is a text file, called .jpg', 'is not an image'),
    'empty': (b'', 'is not an image'),
    'postscript': (b'%!PS-Adobe-3.0 EPSF-3.0\n', 'is not an image'),
    'cut JPEG': (encode(Image.fromarray(RGB), 'JPEG')[:-20], 'cannot be decoded'),
    'cut PNG': (encode(Image.fromarray(RGB), 'PNG')[:-30], 'cannot be decoded'),
    'cut GIF': (encode(Image.fromarray(RGB), 'GIF')[:-40], 'cannot be decoded'),
    'cut BMP': (encode(Image.fromarray(RGB), 'BMP')[:-30], 'cannot be decoded'),
    'cut WebP': (
        encode(Image.fromarray(RGB), 'WEBP')[:-20],
        'is not an image|cannot be decoded',
    ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_files(name, tmp_path):
    content, reason = BAD[name]
    path = tmp_path / 'bad.jpg'
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        load_image(str(path), 16)
    assert images.check_image(str(path), decode=True) is not None
    # The quick look finds a file cut short in every format.
    assert images.check_image(str(path), decode=False) is not None


@pytest.mark.parametrize('name', ['PNG', 'BMP', 'TIFF', 'WEBP', 'GIF', 'JPEG'])
@pytest.mark.parametrize('tail', [b'', b'\0\0camera notes'])
def test_whole_files_pass_the_check(name, tail, tmp_path):
    path = tmp_path / 'good'
    path.write_bytes(encode(Image.fromarray(RGB), name) + tail)
    assert images.check_image(str(path), decode=False) is None
    assert images.check_image(str(path), decode=True) is None


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match='not there'):
        load_image(str(tmp_path / 'none.jpg'), 16)


def test_too_many_pixels_are_not_decoded(tmp_path, monkeypatch):
    """The header tells; also where Pillow itself would warn or refuse."""
    file = encode(Image.fromarray(RGB), 'PNG')
    preparation = images.Preparation(4)
    whole = images.load_image(file, preparation, max_pixels=54)
    np.testing.assert_array_equal(whole, images.load_image(file, preparation))
    # Cut behind the header, so that decoding it would be another error.
    cut = tmp_path / 'cut.png'
    cut.write_bytes(file[:60])
    with pytest.raises(images.TooManyPixels, match='has 5.4e-05 million pixels; at'):
        images.load_image(str(cut), preparation, max_pixels=53)
    for own in (40, 20):  # a warning, here an error, from 40 on; an error from 2 * 20
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', own)
        for most in (None, 10):
            with pytest.raises(images.TooManyPixels, match='has too many pixels; at'):
                images.load_image(file, preparation, max_pixels=most)


@pytest.mark.parametrize(
    ('image_format', 'size', 'decoded'),
    [
        ('JPEG', 32, (100, 75)),  # an eighth, 75 being twice the wanted size and more
        ('JPEG', 64, (200, 150)),
        ('JPEG', 112, (400, 300)),
        ('JPEG', 224, (800, 600)),
        ('PNG', 32, (800, 600)),
    ],
)
def test_jpegs_are_decoded_at_a_fraction_of_their_size(
    image_format, size, decoded, monkeypatch
):
    """Not below twice the wanted size, and close to what the whole image gives."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    image = Image.fromarray(noise).resize((800, 600), Image.Resampling.BICUBIC)
    file = encode(image, image_format)
    sizes, upright = [], images._render

    def spy(image, *arguments):
        sizes.append(image.size)
        return upright(image, *arguments)

    monkeypatch.setattr(images, '_render', spy)
    found = load_image(file, size).astype(int)
    assert sizes == [decoded]
    with Image.open(io.BytesIO(file)) as image:
        whole = images.prepare_image(image, images.Preparation(size)).astype(int)
    difference = np.abs(found - whole)
    assert (difference.max() > 0) == (decoded != (800, 600))
    assert difference.mean() < 2
