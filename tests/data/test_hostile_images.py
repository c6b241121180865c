"""Images from strangers: a result or one reason, in little memory, without noise."""

import io
import os
import random
import resource
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from flax_densenet import UserError
from flax_densenet.data import images, upright
from helpers.marks import exhaustive_after
from helpers.paths import ROOT

GRID = np.kron(
    np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8),
    np.ones((8, 8, 1), np.uint8),
)
PREPARATION = images.Preparation(16)


def encode(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def load(file, size=16):
    return images.load_image(file, images.Preparation(size))


def reason(content, tmp_path):
    """Why an image is bad; training, the check of `skip` and the quick one agree."""
    path = tmp_path / 'x.jpg'
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load(str(path))
    found = {images.check_image(str(path), decode=decode) for decode in (True, False)}
    assert found == {str(raised.value)}
    return str(raised.value)


def png_chunk(kind, content):
    check = struct.pack('>I', zlib.crc32(kind + content))
    return struct.pack('>I', len(content)) + kind + content + check


def png_bomb(width, height):
    """A PNG of some kilobytes that tells of any number of black pixels."""
    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    row = zlib.compress(bytes(1 + min(width, 10**6)), 9)
    return (
        b'\x89PNG\r\n\x1a\n'
        + png_chunk(b'IHDR', header)
        + png_chunk(b'IDAT', row)
        + png_chunk(b'IEND', b'')
    )


def with_size(content, place, form, width, height):
    """A whole file whose header tells of another size."""
    return content[:place] + struct.pack(form, width, height) + content[place + 4 :]


BOMBS = {
    'PNG': png_bomb(65_000, 65_000),
    'GIF': with_size(encode(Image.fromarray(GRID), 'GIF'), 6, '<HH', 65_000, 65_000),
    'BMP': (lambda b: b[:18] + struct.pack('<ii', 65_000, 65_000) + b[26:])(
        encode(Image.fromarray(GRID), 'BMP')
    ),
    'JPEG': (
        lambda b: (
            b[: b.index(b'\xff\xc0') + 5]
            + struct.pack('>HH', 65_000, 65_000)
            + b[b.index(b'\xff\xc0') + 9 :]
        )
    )(encode(Image.fromarray(GRID), 'JPEG')),
}


@pytest.mark.parametrize('name', BOMBS)
def test_bombs_are_refused_by_their_header(name, tmp_path):
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF)
    found = reason(BOMBS[name], tmp_path)
    assert found == 'has too many pixels; at most 179 million are read'
    assert time.process_time() - start < 1  # a thousandth of it is usual
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 50_000  # kB


def test_a_limit_of_the_caller():
    file = encode(Image.fromarray(GRID), 'PNG')
    assert images.load_image(file, PREPARATION, max_pixels=48 * 32).shape
    with pytest.raises(images.TooManyPixels, match='0.00154 million pixels; at most'):
        images.load_image(file, PREPARATION, max_pixels=48 * 32 - 1)


@pytest.mark.parametrize('name', ['PNG', 'JPEG', 'GIF', 'BMP', 'TIFF'])
@pytest.mark.parametrize('size', [(65_000, 1), (1, 65_000)])
def test_very_long_images(name, size):
    file = encode(Image.new('RGB', size, (255, 0, 0)), name)
    for resize in images.RESIZES:
        found = images.load_image(file, images.Preparation(8, resize)).astype(int)
        assert np.abs(found - [255, 0, 0]).max() < 4


@pytest.mark.parametrize('name', ['GIF', 'WEBP', 'PNG', 'TIFF'])
def test_first_frame_of_an_animation(name, tmp_path):
    frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue', 'lime')]
    options = {'lossless': True} if name == 'WEBP' else {}
    file = encode(frames[0], name, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(file)) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(load(file, 8), np.full((8, 8, 3), [255, 0, 0]))
    path = tmp_path / 'x.png'
    path.write_bytes(file)
    assert images.check_image(str(path), decode=False) is None


def broken_exif(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = 'maker' * 10
    content = exif.tobytes()
    return {
        'cut': content[:15],
        'noise': b'Exif\0\0' + random.Random(0).randbytes(60),
        'far': content.replace(b'MM\0*\0\0\0\x08', b'MM\0*\xff\xff\xff\xf0'),
        'type': content.replace(b'\x01\x12\0\x03', b'\x01\x12\0\x05'),
    }[kind]


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('kind', ['cut', 'noise', 'far', 'type'])
def test_broken_exif_beside_whole_pixels(name, kind, tmp_path):
    image, options = Image.fromarray(GRID), {'WEBP': {'lossless': True}}.get(name, {})
    plain = encode(image, name, **options)
    broken = encode(image, name, exif=broken_exif(kind), **options)
    assert len(broken) > len(plain)
    np.testing.assert_array_equal(load(broken), load(plain))
    path = tmp_path / 'x.jpg'
    path.write_bytes(broken)
    assert images.check_image(str(path), decode=True) is None


@pytest.mark.parametrize('name', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_broken_color_profiles(name):
    image, options = Image.fromarray(GRID), {'WEBP': {'lossless': True}}.get(name, {})
    noise = random.Random(1).randbytes(500)
    for profile in (noise, bytes(3), b'\xff\xff\xff\xff' + noise):
        broken = encode(image, name, icc_profile=profile, **options)
        np.testing.assert_array_equal(
            load(broken), load(encode(image, name, **options))
        )


def test_a_profile_that_cannot_be_unpacked():
    plain = encode(Image.fromarray(GRID), 'PNG')
    place = plain.index(b'IDAT') - 4
    chunk = png_chunk(b'iCCP', b'name\0\0' + b'no zlib stream')
    np.testing.assert_array_equal(
        load(plain[:place] + chunk + plain[place:]), load(plain)
    )


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe.jpg')  # to open it would wait for ever
    (tmp_path / 'folder.jpg').mkdir()
    (tmp_path / 'link.jpg').symlink_to(tmp_path / 'nowhere')
    for name, expected in (
        ('pipe.jpg', 'is not a file'),
        ('folder.jpg', 'is not a file'),
        ('link.jpg', 'is not there'),
    ):
        path = str(tmp_path / name)
        assert images.check_image(path, decode=False) == expected
        with pytest.raises(UserError, match=expected):
            load(path)


def test_a_file_that_must_not_be_read(tmp_path, monkeypatch):
    """By the system's word, not by its number; root may read all, hence the fake."""
    path = tmp_path / 'x.png'
    path.write_bytes(encode(Image.fromarray(GRID), 'PNG'))

    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(images.Image, 'open', refuse)
    assert images.check_image(str(path), decode=False) == (
        'cannot be read (Permission denied)'
    )


@pytest.mark.parametrize(
    'mode', ['L', 'RGB', 'RGBA', 'P', 'CMYK', '1', 'I;16', 'F', 'LA']
)
def test_very_large_images_are_made_smaller_first(mode, monkeypatch):
    """In strips as at once; a 16 megapixel image would take the suite's time."""
    smooth = Image.fromarray(GRID).resize((500, 331), Image.Resampling.BICUBIC)
    if mode == 'F':
        image = Image.fromarray(np.asarray(smooth.convert('L')).astype(np.float32))
    elif mode == 'I;16':
        deep = np.asarray(smooth.convert('L')).astype(np.uint16) * 257
        image = Image.fromarray(deep)
    else:
        image = smooth.convert(mode)
    file = encode(image, 'TIFF' if mode in ('CMYK', 'F') else 'PNG')
    whole = load(file).astype(int)
    monkeypatch.setattr(upright, 'LARGE', 1000)
    monkeypatch.setattr(upright, 'STRIP', 20_000)
    sizes = []
    apply = images.Preparation.apply
    monkeypatch.setattr(
        images.Preparation,
        'apply',
        lambda self, image: sizes.append(image.size) or apply(self, image),
    )
    found = load(file).astype(int)
    assert sizes == [(33, 33)]
    assert np.abs(found - whole).mean() < 4 and found.std() > 10


@pytest.mark.parametrize('turn', [1, 6], ids=['upright', 'turned'])
@pytest.mark.parametrize('resize', images.RESIZES)
def test_very_long_images_are_made_smaller_first(resize, turn, monkeypatch):
    """31 pixels by millions, which are legal, took seconds to be changed to RGB."""
    rows = np.linspace(0, 255, 1800)[:, None] * np.array([1, 0.5, 0])
    rows = rows[:, None] + np.linspace(0, 60, 31)[:, None] * np.array([0, 0, 1])
    image = Image.fromarray(rows.round().astype(np.uint8)).convert('CMYK')
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    file = encode(image, 'TIFF', exif=exif)
    preparation = images.Preparation(8, resize=resize)
    whole = images.load_image(file, preparation).astype(int)
    monkeypatch.setattr(upright, 'LARGE', 1000)
    seen, to_rgb = [], upright.to_rgb
    monkeypatch.setattr(
        upright,
        'to_rgb',
        lambda image, *w: seen.append(image.size) or to_rgb(image, *w),
    )
    found = images.load_image(file, preparation).astype(int)
    # Of `crop` the rest goes first, of `stretch` it is made smaller first.
    assert sorted(seen[-1]) == ([31, 124] if resize == 'crop' else [28, 31])
    assert np.abs(found - whole).max() <= 2 and found.std() > 10


def test_a_long_image_is_packed_as_it_is_where_no_jpeg_holds_it():
    file = encode(Image.new('RGB', (3, 65501)), 'PNG')
    assert images.make_smaller(file, 2, quality=90) is not file  # 2 by 43667
    longer = encode(Image.new('RGB', (3, 65501 * 3)), 'PNG')
    assert images.make_smaller(longer, 2, quality=90) is longer


# `import flax_densenet` alone imports JAX, which takes seconds.
NOISE = """
import sys, types
package = types.ModuleType('flax_densenet')
package.__path__ = ['flax_densenet']
sys.modules['flax_densenet'] = package
from flax_densenet.data import images
from flax_densenet.system import process
process.quiet_pillow()
for path in sys.argv[1:]:
    for decode in (False, True):
        images.check_image(path, decode=decode)
    try:
        images.load_image(path, images.Preparation(16))
    except images.UserError:
        pass
"""


@pytest.mark.slow
def test_no_noise(tmp_path):
    """Pillow's warnings and log lines, seen from outside: nothing on stderr."""
    tiff = encode(Image.fromarray(GRID), 'TIFF')
    files = {
        'exif.jpg': encode(Image.fromarray(GRID), 'JPEG', exif=broken_exif('far')),
        'bomb.png': png_bomb(10_000, 9_500),  # between Pillow's warning and its error
        'cut.tif': tiff[:-20],
        'tag.tif': tiff.replace(  # as many samples a pixel
            struct.pack('<HHII', 277, 3, 1, 3), struct.pack('<HHII', 277, 3, 1, 61_443)
        ),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in files]
    loud = subprocess.run(
        [sys.executable, '-c', LOUD, *paths], capture_output=True, text=True
    )
    for noise in ('DecompressionBombWarning', 'EXIF', 'More samples per pixel'):
        assert noise in loud.stderr
    done = subprocess.run(
        [sys.executable, '-c', NOISE, *paths],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


LOUD = """
import sys
from PIL import ExifTags, Image
for path in sys.argv[1:]:
    try:
        image = Image.open(path)
        image.getexif().get(1)
        image.load()
    except Exception:
        pass
"""


MEMORY = """
import resource, sys
from flax_densenet.data import images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = images.load_image(sys.argv[1], images.Preparation(224))
assert image.shape == (224, 224, 3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ('mode', 'name', 'most'),
    exhaustive_after(
        1, [('RGB', 'JPEG', 0.1), ('L', 'PNG', 0.25), ('RGBA', 'PNG', 0.78)]
    ),
)
def test_memory_of_the_largest_images(mode, name, most, tmp_path):
    """13,300 pixels square, just below the bound: decoded once, and little more."""
    path = tmp_path / 'x'
    with Image.new(mode, (13_300, 13_300), 'white') as image:
        image.save(path, name)
    done = subprocess.run(
        [sys.executable, '-c', MEMORY, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert int(done.stdout) * 1024 < most * 1e9


def damage(content, rng):
    content = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(content))
        if rng.random() < 0.6:
            content[place] = rng.randrange(256)
        elif rng.random() < 0.5:
            content[place : place + 4] = rng.choice([b'\xff' * 4, bytes(4), b'\x7f'])
        else:
            content = content[: place + 1]
    return bytes(content)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize(
    'count', [300, pytest.param(20_000, marks=pytest.mark.slow)], ids=str
)
def test_damaged_files(count):
    """Every one becomes an image or has a reason in one line."""
    image = Image.fromarray(GRID)
    seeds = [
        encode(image.convert(mode), name)
        for name, mode in (
            *(('JPEG', 'RGB'), ('PNG', 'P'), ('PNG', 'RGBA'), ('WEBP', 'RGB')),
            *(('TIFF', 'CMYK'), ('TIFF', 'L')),
        )
    ]
    seeds += [encode(image, 'GIF'), encode(image, 'BMP')]
    seeds += [
        encode(image, name, exif=broken_exif('noise')) for name in ('JPEG', 'PNG')
    ]
    rng, good = random.Random(0), 0
    for _ in range(count):
        try:
            good += load(damage(rng.choice(seeds), rng)).shape == (16, 16, 3)
        except UserError as error:
            assert '\n' not in str(error) and len(str(error)) < 200
    assert 0.05 * count < good < 0.8 * count
