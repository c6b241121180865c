"""Formats beside the usual ones, and PNG files with much beside their pixels."""

import io
import itertools
import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from flax_densenet import UserError
from flax_densenet.data import dataset, images, other_files
from helpers.marks import exhaustive_after
from helpers.paths import ROOT

GRID = np.kron(
    np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8),
    np.ones((8, 8, 1), np.uint8),
)
SAME = images.Preparation(0)


def encode(image, name, **options):
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def with_text(count=2_000_000, **options):
    info = PngImagePlugin.PngInfo()
    info.add_text('notes', 'x' * count, **options)
    return info


FILES = {
    '.ppm': lambda i: encode(i, 'PPM'),
    '.pgm': lambda i: encode(i.convert('L'), 'PPM'),
    '.pbm': lambda i: encode(i.convert('1'), 'PPM'),
    '.ico': lambda i: encode(i.resize((32, 32)), 'ICO', sizes=[(32, 32)]),
    '.qoi': lambda i: encode(i, 'QOI'),
    '.sgi': lambda i: encode(i, 'SGI'),
    '.tga': lambda i: encode(i, 'TGA'),
    '.icb': lambda i: encode(i, 'TGA', compression='tga_rle'),
    '.vst': lambda i: encode(i.convert('P'), 'TGA')[:-26],
    '.avif': lambda i: encode(i, 'AVIF', quality=100),
    '.jp2': lambda i: encode(i, 'JPEG2000'),
    '.j2k': lambda i: encode(i, 'JPEG2000', no_jp2=True),
}


def readable(ending):
    kind = {'.avif': 'avif', '.jp2': 'jpg_2000', '.j2k': 'jpg_2000'}.get(ending)
    return kind is None or features.check(kind)


@pytest.mark.parametrize('ending', FILES)
def test_formats(ending, tmp_path):
    assert (ending in images.EXTENSIONS) == readable(ending)
    if not readable(ending):
        return
    picture = Image.fromarray(GRID)
    content = FILES[ending](picture)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image.convert('RGB'))
    np.testing.assert_array_equal(images.load_image(content, SAME), expected)
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        for n in range(3):
            (tmp_path / name / f'{n}{ending.upper()}').write_bytes(content)
    source = dataset.load_source(
        f'folder:{tmp_path}', image_size=8, duplicates='ignore'
    )
    assert source.train[0]['image'].shape == (8, 8, 3)


@pytest.mark.parametrize('ending', FILES)
def test_damaged_files_of_these_formats(ending):
    """A result or one reason, whatever is cut off or changed."""
    if not readable(ending):
        return
    content, noise = FILES[ending](Image.fromarray(GRID)), random.Random(0)
    for _ in range(60):
        broken = bytearray(content[: noise.randrange(1, len(content) + 1)])
        for _ in range(noise.randrange(4)):
            broken[noise.randrange(len(broken))] = noise.randrange(256)
        try:
            assert images.load_image(bytes(broken), images.Preparation(8)).shape
        except UserError as error:
            assert '\n' not in str(error)


def test_what_is_no_tga():
    """Its files have no mark, so other bytes are not to be taken for one."""
    noise = random.Random(0)
    for content in (
        b'\0' * 500,
        b'some text\n' * 50,
        *map(noise.randbytes, [500] * 500),
    ):
        with pytest.raises(UserError, match='is not an image'):
            images.load_image(content, SAME)


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_an_icon_that_hides_a_bomb():
    """The list of an icon tells of 32 pixels a side, the image in it of many more."""
    big = encode(Image.new('L', (3000, 3000)), 'PNG')
    head = struct.pack('<HHHBBBBHHII', 0, 1, 1, 32, 32, 0, 0, 1, 32, len(big), 22)
    with pytest.raises(images.TooManyPixels, match='9 million pixels; at most 1 mill'):
        images.load_image(head + big, SAME, max_pixels=10**6)
    assert images.load_image(head + big, images.Preparation(8)).shape == (8, 8, 3)


def test_formats_that_take_more_memory():
    if features.check('jpg_2000'):
        content = bytearray(encode(Image.new('L', (64, 64)), 'JPEG2000', no_jp2=True))
        place = content.index(b'\xff\x51')
        struct.pack_into('>II', content, place + 6, 8000, 8000)
        with pytest.raises(images.TooManyPixels, match='64 million.*60 million are'):
            images.load_image(bytes(content), images.Preparation(8))


MODES = ('RGB', 'L', 'P', 'RGBA', 'I;16')
SIDES = {
    'a color profile': lambda: {'icc_profile': bytes(2_000_000)},
    'packed text': lambda: {'pnginfo': with_text(zip=True)},
    'several texts': lambda: {'pnginfo': with_text(900_000, zip=True)},
}


@pytest.mark.parametrize(
    ('beside', 'mode'),
    [
        *itertools.product(('a color profile', 'packed text'), MODES),
        # 64 MB of text are read again and again.
        *exhaustive_after(0, itertools.product(['several texts'], MODES)),
    ],
)
def test_png_beside_its_pixels(beside, mode, tmp_path):
    picture = Image.fromarray(GRID)
    if mode == 'I;16':
        picture = Image.fromarray(GRID[..., 0].astype(np.uint16) * 200)
    else:
        picture = picture.convert(mode)
    options = SIDES[beside]()
    content, plain = encode(picture, 'PNG', **options), encode(picture, 'PNG')
    if beside == 'several texts':  # 64 MB in all are the limit
        place = content.index(b'zTXt') - 4
        size = struct.unpack('>I', content[place : place + 4])[0] + 12
        chunk = content[place : place + size]
        content = content[:place] + chunk * 80 + content[place + size :]
    expected = images.load_image(plain, SAME)
    path = tmp_path / 'x.png'
    path.write_bytes(content)
    for file in (content, str(path)):
        np.testing.assert_array_equal(images.load_image(file, SAME), expected)
        assert images.check_image(file, decode=True) is None
        assert images.check_image(file, decode=False) is None
        for side in (8, 64):
            small = images.make_smaller(file, side, quality=90)
            assert images.load_image(small, images.Preparation(8)).shape == (8, 8, 3)
    cut = content[: len(content) - 40]
    assert 'cannot be decoded' in images.check_image(cut, decode=True) or (
        'truncated' in images.check_image(cut, decode=True)
    )


def test_a_bomb_in_a_text_of_a_png():
    """Two gigabytes of text in two megabytes: not unpacked, the pixels are read."""
    # What stands behind a full flush can be repeated as it is.
    packer = zlib.compressobj(9)
    head = packer.compress(b'') + packer.flush(zlib.Z_FULL_FLUSH)
    part = packer.compress(bytes(10**7)) + packer.flush(zlib.Z_FULL_FLUSH)
    count, end = 200 * 10**7, zlib.compressobj(9, wbits=-15).flush()
    sums = struct.pack('>I', count % 65521 << 16 | 1)  # Adler-32 of so many zeros
    text = head + 200 * part + end + sums
    content = encode(Image.fromarray(GRID), 'PNG')
    body = b'zTXt' + b'notes\0\0' + text
    chunk = (
        struct.pack('>I', len(body) - 4) + body + struct.pack('>I', zlib.crc32(body))
    )
    content = content[:33] + chunk + content[33:]
    np.testing.assert_array_equal(images.load_image(content, SAME), GRID)


HEIF = """
import io, numpy as np, pillow_heif
from PIL import Image
from flax_densenet.data import images
file = io.BytesIO()
pillow_heif.from_pillow(Image.new('RGB', (64, 48), (200, 30, 90))).save(file)
assert {'.heic', '.heif'} <= images.EXTENSIONS and 'HEIF' in images.FORMATS
found = images.load_image(file.getvalue(), images.Preparation(8))
assert np.abs(found.astype(int) - [200, 30, 90]).max() < 8
assert images.check_image(file.getvalue()[:300], decode=True)
print('read')
"""


def test_heif():
    """With its extra it is read; without, its endings are told to need it."""
    if 'HEIF' not in images.FORMATS:
        assert not {'.heic', '.heif'} & images.EXTENSIONS
        return
    made = subprocess.run(
        [sys.executable, '-c', HEIF],
        capture_output=True,
        text=True,
        env=os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert made.stdout == 'read\n', made.stderr


@pytest.mark.parametrize(
    ('start', 'reason'),
    [
        (b'%PDF-1.7', 'a PDF; convert it'),
        (b'8BPS\0\1', 'a Photoshop file'),
        (b'PK\3\4', 'a zip archive; unpack it'),
        (b'\0\0\0\x20ftypisom', 'a video; extract its frames'),
        (b'<!doctype HTML><html>', 'a web page'),
        (b'version https://git-lfs.github.com/spec/v1', 'git lfs pull'),
        (b'\x89HDF\r\n', 'an HDF5 file'),
    ],
)
def test_files_of_other_kinds_are_named(start, reason):
    """Whatever they are called: all say that they are not an image."""
    for decode in (False, True):
        told = images.check_image(start + bytes(200), decode=decode)
        assert told.startswith('is not an image but') and reason in told


def test_heic_without_its_extra_names_it():
    start = b'\0\0\0\x18ftypheic'
    told = other_files.describe(start, ('JPEG',))
    assert "pip install 'flax_densenet[heic]'" in told
    assert other_files.describe(start, ('JPEG', 'HEIF')) is None
