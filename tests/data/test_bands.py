"""Images of 2, 4 and more channels, which keep those of their files."""

import io

import numpy as np
import pytest
from PIL import Image

from flax_densenet import UserError
from flax_densenet.data import bands, dataset, images, pipeline
from flax_densenet.inference import overlay
from helpers import lazy

tifffile = lazy.module('tifffile')

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 12, 7), np.uint8)


def how(channels, **fields):
    return images.Preparation(**{'size': 0, 'channels': channels, **fields})


def encode(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{'photometric': 'minisblack', **options})
    return file.getvalue()


@pytest.mark.parametrize(('count', 'mode'), [(2, 'LA'), (4, 'RGBA')])
def test_transparency_is_a_channel(count, mode):
    """Nothing is composited over white, and hidden colors stay."""
    pixels = PIXELS[..., :count]
    content = encode(Image.fromarray(pixels, mode))
    assert (images.load_image(content, how(count)) == pixels).all()
    white = images.load_image(content, how(3))
    assert (white != pixels[..., [0, 0, 0] if count == 2 else [0, 1, 2]]).any()


def test_a_palette_with_transparency_is_rgba():
    image = Image.fromarray(PIXELS[..., :3]).quantize(16)
    content = encode(image, transparency=3)
    found = images.load_image(content, how(4))
    assert set(np.unique(found[..., 3])) == {0, 255}
    with pytest.raises(UserError, match=r'has 3 channels \(P\), not the 4 of data.ch'):
        images.load_image(encode(image), how(4))


@pytest.mark.parametrize(
    'write',
    [
        lambda array: tiff(array, planarconfig='contig'),
        lambda array: tiff(np.moveaxis(array, -1, 0), planarconfig='separate'),
        lambda array: tiff(np.moveaxis(array, -1, 0)),  # a page for each band
        lambda array: tiff(array, planarconfig='contig', compression='zlib'),
    ],
)
@pytest.mark.parametrize('count', [2, 4, 5, 7])
def test_bands_of_a_tiff(write, count, tmp_path):
    array = PIXELS[..., :count]
    content = write(array)
    assert (images.load_image(content, how(count)) == array).all()
    path = tmp_path / 'x.tif'
    path.write_bytes(content)
    assert images.check_image(str(path), decode=False, channels=count) is None
    assert images.check_image(str(path), decode=True, channels=count) is None
    wrong = images.check_image(str(path), decode=False, channels=6)
    assert wrong.startswith(f'has {count} channels (')
    assert images.check_image(content[:60], decode=True, channels=count)


def test_each_channel_is_resized_by_itself():
    """A transparent pixel's colors count like those of others."""
    found = images.prepare_array(PIXELS, how(7, size=(4, 6)))
    one = Image.fromarray(PIXELS[..., 5]).resize((6, 4), Image.Resampling.BILINEAR)
    assert found.shape == (4, 6, 7) and (found[..., 5] == np.asarray(one)).all()
    rgb = images.prepare_array(PIXELS[..., :3], how(3, size=4, resize='crop'))
    own = images.prepare_array(PIXELS, how(7, size=4, resize='crop'))
    assert (own[..., :3] == rgb).all()


def test_more_than_8_bits_need_a_window():
    deep = PIXELS[..., :5].astype(np.uint16) * 257
    content = tiff(deep, planarconfig='contig')
    with pytest.raises(UserError, match='has uint16 values: set data.window'):
        images.load_image(content, how(5))
    found = images.load_image(content, how(5, window=(0, 65535)))
    assert (found == PIXELS[..., :5]).all()
    found = images.load_image(content, how(5, bit_depth=16))
    assert found.dtype == np.uint16 and (found == deep).all()
    with pytest.raises(UserError, match='has float32 values: set data.window'):
        images.prepare_array(np.ones((2, 2, 5), np.float32), how(5, bit_depth=16))


def test_a_source_of_more_than_8_bits(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        for number in range(6):
            deep = np.roll(PIXELS[..., :5], number, 0).astype(np.uint16)
            deep = deep * 16 + (name == 'a')
            content = tiff(deep, planarconfig='contig')
            (tmp_path / name / f'{number}.tif').write_bytes(content)
    fields = {'image_size': 8, 'channels': 5}
    with pytest.raises(UserError, match='the images have uint16 values: set data.win'):
        dataset.load_source(f'folder:{tmp_path}', **fields)
    for bit_depth, dtype in ((0, np.uint16), (8, np.uint8)):
        source = dataset.load_source(
            f'folder:{tmp_path}', window=(0, 4095), bit_depth=bit_depth, **fields
        )
        image = source.train[0]['image']
        assert image.dtype == dtype and image.max() > 0.9 * np.iinfo(dtype).max


def test_orientation_turns_all_channels():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(PIXELS[..., :4], 'RGBA')
    found = images.load_image(encode(image, exif=exif), how(4))
    assert (found == np.rot90(PIXELS[..., :4], -1)).all()


@pytest.mark.parametrize(
    ('image', 'channels', 'message'),
    [
        (Image.new('RGB', (4, 4)), 4, r'has 3 channels \(RGB\), not the 4'),
        (Image.new('L', (4, 4)), 2, r'has 1 channel \(L\), not the 2'),
        (Image.new('RGBA', (4, 4)), 2, r'has 4 channels \(RGBA\)'),
        (Image.new('RGBA', (4, 4)), 5, r'has 4 channels \(RGBA\)'),
    ],
)
def test_other_files_are_refused(image, channels, message):
    with pytest.raises(UserError, match=message):
        images.load_image(encode(image), how(channels))
    with pytest.raises(UserError, match=message):
        images.prepare_image(image, how(channels))
    deep = np.zeros((4, 4, 4), np.uint16)
    with pytest.raises(UserError, match=r'not the 5 of data.channels=5'):
        images.prepare_array(deep, how(5))
    inks = encode(Image.new('CMYK', (4, 4)), 'JPEG')
    with pytest.raises(UserError, match=r'has 4 channels \(CMYK\)'):
        images.load_image(inks, how(4))


@pytest.fixture
def rgba(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        for number in range(6):
            pixels = np.roll(PIXELS[..., :4], number, 0) ^ (128 * (name == 'a'))
            pixels = pixels.astype(np.uint8)
            Image.fromarray(pixels, 'RGBA').save(tmp_path / name / f'{number}.png')
    return tmp_path


@pytest.mark.parametrize('augment', ['none', 'shift_flip', 'crop_flip'])
def test_batches(rgba, augment):
    source = dataset.load_source(f'folder:{rgba}', image_size=8, channels=4)
    batches = pipeline.train_batches(
        source.train, batch_size=4, seed=0, augment=augment, threads=1
    )
    assert next(batches)['image'].shape == (4, 8, 8, 4)
    batches.close()


@pytest.mark.parametrize(
    ('change', 'value'), [('color_jitter', (0.1,)), ('policy', 'trivialaugment')]
)
def test_changes_of_color_are_refused(rgba, change, value):
    source = dataset.load_source(f'folder:{rgba}', image_size=8, channels=4)
    with pytest.raises(UserError, match=f'data.{change} needs images in color or gray'):
        pipeline.train_batches(source.train, batch_size=4, seed=0, **{change: value})


def test_files_are_checked_before_training(rgba):
    Image.new('RGB', (8, 8)).save(rgba / 'a' / '9.png')
    with pytest.raises(UserError, match=r'9.png has 3 channels \(RGB\), not the 4'):
        dataset.load_source(f'folder:{rgba}', image_size=8, channels=4)
    source = dataset.load_source(
        f'folder:{rgba}', image_size=8, channels=4, bad_images='skip'
    )
    assert len(source.skipped) == 1
    for channels in (0, 257, 2.0, True):
        with pytest.raises(UserError, match='data.channels=.* must be from 1 to 256'):
            dataset.load_source(f'folder:{rgba}', channels=channels)


def test_damaged_bands():
    """Each is read, or refused in one line."""
    rng, content = np.random.default_rng(0), tiff(PIXELS, planarconfig='contig')
    for _ in range(150):
        broken = bytearray(content)
        for place in rng.integers(0, 300, 3):
            broken[place] = rng.integers(256)
        try:
            images.load_image(bytes(broken), how(7))
        except UserError as error:
            assert '\n' not in str(error)


def test_a_tiff_of_bands_is_no_image_in_color():
    content = tiff(PIXELS, planarconfig='contig')
    with pytest.raises(UserError, match='set data.channels to keep its bands$'):
        images.load_image(content, how(3))


def test_what_is_shown_has_three_channels():
    for count in (1, 2, 3, 4, 7):
        picture = overlay.picture(PIXELS[..., :count], np.ones((2, 2)), 'x')
        assert picture.mode == 'RGB'
        shown = bands.to_visible(PIXELS[..., :count])
        expected = PIXELS[..., [0] * 3 if count < 3 else [0, 1, 2]]
        assert (shown == expected).all()
