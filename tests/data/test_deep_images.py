"""Images of more than 8 bits keep their levels; window and depth are found and kept."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from flax_densenet import UserError
from flax_densenet.data import dataset, deep, deep_picture, images, pipeline, upright
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.weights import trained
from helpers import deep_images, runs

DEEP = images.Preparation(bit_depth=16)


def write(folder, low, high, dtype, ending='png'):
    """Ramps from low to high, brighter in one class, as files."""
    for number, name in enumerate('ab'):
        (folder / name).mkdir(parents=True)
        for n in range(6):
            ramp = np.linspace(low, high - (1 - number) * (high - low) / 4, 64)
            pixels = (ramp.reshape(8, 8) + 0 * n).astype(dtype)
            Image.fromarray(pixels).save(folder / name / f'{n}.{ending}')
    return f'folder:{folder}'


def load(source, **fields):
    fields = {'image_size': 8, 'duplicates': 'ignore', **fields}
    return dataset.load_source(source, **fields)


def noise(*shape, seed=0, dtype=np.uint16):
    return np.random.default_rng(seed).integers(0, 65536, shape).astype(dtype)


@pytest.mark.parametrize(
    ('low', 'high', 'dtype', 'ending', 'window', 'bits'),
    [
        (0, 4000, 'uint16', 'png', (0, 4095), 16),
        (100, 1000, 'uint16', 'tif', (0, 1023), 16),
        (0, 16000, 'uint16', 'png', (0, 16383), 16),
        (0, 255, 'uint16', 'png', (0, 255), 16),
        (0, 60_000, 'uint16', 'png', None, 16),
        (-1000, 3000, 'int32', 'tif', (-1000, 3000), 16),
        (0, 4095, 'float32', 'tif', (0, 4095), 16),
        (-1, 1, 'float32', 'tif', (-1, 1), 16),
        (0, 1, 'float32', 'tif', (0, 1), 16),
        (0, 255, 'float32', 'tif', (0, 255), 16),
        (0, 255, 'uint8', 'png', None, 8),
    ],
)
def test_what_is_found(low, high, dtype, ending, window, bits, tmp_path, capsys):
    source = load(write(tmp_path / 'x', low, high, dtype, ending))
    preparation, said = source.train.preparation, capsys.readouterr().out
    assert preparation.bit_depth == bits
    assert ('data.window=' in said) == (window is not None)
    # A window's line says enough.
    assert ('data.bit_depth=16' in said) == (bits == 16 and window is None)
    if window is None:
        assert preparation.window is None
    else:
        assert preparation.window == pytest.approx(window, abs=(high - low) * 0.01)
    example = source.train[0]['image']
    assert example.dtype == (np.uint16 if bits == 16 else np.uint8)
    if bits == 16:
        levels = {
            v for i in range(len(source.train)) for v in source.train[i]['image'].flat
        }
        assert max(levels) - min(levels) > 40_000
    kept = trained.preparation_of(
        {
            'image_size': 8,
            'mean': [0] * 3,
            'data': {'window': list(window or ()), 'bit_depth': bits},
        }
    )
    if window and dtype == 'uint16':  # others are found as percentiles
        index = int(source.train.indices[0])
        np.testing.assert_array_equal(
            images.load_image(source.train.reader[index], kept), example
        )


def test_what_is_given(tmp_path, capsys):
    source = write(tmp_path / 'x', 0, 4000, 'uint16')
    shown = load(source, window=(0, 2000)).train.preparation
    assert (shown.window, shown.bit_depth) == ((0, 2000), 16)
    by_bits = load(source, bit_depth=14).train.preparation
    assert (by_bits.window, by_bits.bit_depth) == ((0, 2**14 - 1), 14)
    whole = load(source, bit_depth=16).train
    assert whole.preparation.window is None
    assert whole[0]['image'].max() == 3000
    assert 'data.window' not in capsys.readouterr().out
    # As of runs from before 16 bits were kept.
    before = load(source, window=(), bit_depth=8).train
    assert before.preparation.window is None
    assert before[0]['image'].max() == 4000 * 0.75 // 257
    reduced = load(source, bit_depth=8).train
    assert reduced.preparation.window == (0, 4095)
    assert reduced[0]['image'].dtype == np.uint8
    for wrong in ((1,), (5, 5), (3, 1), ('a', 2), 7, (0, np.inf)):
        with pytest.raises(UserError, match='must be two numbers'):
            deep.check(wrong)
    for wrong in (7, 17, -1, 32):
        with pytest.raises(UserError, match='data.bit_depth=.* must be from 8 to 16'):
            load(source, bit_depth=wrong)


def test_a_window_for_images_of_8_bits_is_reported(tmp_path, capsys):
    source = write(tmp_path / 'x', 0, 255, 'uint8')
    assert load(source, window=(0, 100)).train.preparation.bit_depth == 8
    assert 'data.window=(0,100) changes nothing' in capsys.readouterr().out


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_all_bits_of_tiff_are_kept(channels, order, packed):
    values = noise(13, 17, channels)
    file = deep_images.tiff(values, order=order, packed=packed)
    wanted = values[..., :3].astype(float)
    if channels == 4:
        opacity = values[..., 3:] / 65535
        wanted = wanted * opacity + 65535 * (1 - opacity)
    found = images.load_image(file, DEEP)
    assert np.abs(found - wanted).max() <= 0.51


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_all_bits_of_png_are_kept(channels, tmp_path):
    values = noise(13, 17, channels)
    wanted = values[..., : 1 if channels < 3 else 3].astype(float)
    if channels in (2, 4):
        opacity = values[..., -1:] / 65535
        wanted = wanted * opacity + 65535 * (1 - opacity)
    path = tmp_path / 'x.png'
    path.write_bytes(deep_images.png(values))
    for file in (str(path), path.read_bytes()):
        assert np.abs(images.load_image(file, DEEP) - wanted).max() <= 0.51
    # As before, where 8 bits are asked for; gray is rounded down.
    reduced = images.load_image(str(path), images.Preparation())
    assert reduced.dtype == np.uint8 and np.abs(reduced - wanted / 257).max() < 2


def test_16_bits_of_a_color_ppm():
    values = noise(5, 7, 3)
    for most in (65535, 4095):
        stored = np.minimum(values, most)
        head = b'P6\n7 5\n%d\n' % most
        found = images.load_image(head + stored.astype('>u2').tobytes(), DEEP)
        assert np.abs(found - stored * (65535 / most)).max() <= 0.51
    with pytest.raises(UserError, match='truncated'):
        images.load_image(head + stored.astype('>u2').tobytes()[:-1], DEEP)


def test_white_is_zero():
    values = noise(3, 4, 1)
    file = deep_images.tiff(values, white_is_0=True)
    np.testing.assert_array_equal(
        images.load_image(file, DEEP), np.repeat(65535 - values, 3, -1)
    )


@pytest.mark.parametrize(
    ('file', 'reason'),
    [
        (deep_images.tiff(noise(4, 5, 3), planar=2), 'a plane for each channel'),
        (deep_images.tiff(noise(4, 5, 1, dtype=np.int8)), 'signed 8-bit'),
        (deep_images.tiff(noise(4, 5, 3, dtype=np.float32)), 'color in floats'),
        (deep_images.tiff(noise(4, 5, 1, dtype=np.float64)), '64-bit'),
    ],
    ids=['planes', 'int8', 'float color', 'float64'],
)
def test_what_would_be_read_wrongly_is_refused(file, reason):
    for preparation in (DEEP, images.Preparation(8)):
        with pytest.raises(UserError, match=reason):
            images.load_image(file, preparation)
    for decode in (False, True):
        assert reason in images.check_image(file, decode=decode)


def test_8_bit_images_among_deep_ones_have_the_same_scale():
    gray = noise(9, 8, 1) >> 8
    out = io.BytesIO()
    Image.fromarray(gray[..., 0].astype(np.uint8)).save(out, 'PNG')
    found = images.load_image(out.getvalue(), DEEP)
    np.testing.assert_array_equal(found, np.repeat(gray * 257, 3, -1))


@pytest.mark.parametrize('resize', images.RESIZES)
@pytest.mark.parametrize('channels', [1, 3])
def test_resizing_keeps_levels_and_agrees_with_8_bits(resize, channels):
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64, 1)
    values = np.rint(values * [1, 0.5, 0.25]).astype(np.uint16)
    file = deep_images.png(values)
    options = dict(resize=resize, crop_fraction=0.875, channels=channels)
    found = images.load_image(file, images.Preparation(16, bit_depth=16, **options))
    reduced = images.load_image(file, images.Preparation(16, **options))
    assert found.shape == reduced.shape == (16, 16, channels)
    assert np.abs(found / 257 - reduced).max() < 2
    assert len(np.unique(found)) > 2 * len(np.unique(reduced))


def test_large_images_and_packing(tmp_path, monkeypatch):
    pixels = np.tile(np.arange(64, dtype=np.uint16) * 64, (64, 1))
    files = [deep_images.png(p) for p in (pixels[..., None], noise(64, 64, 3) // 16)]
    wanted = images.Preparation(8, window=(0, 4095), bit_depth=12)
    whole = [images.load_image(file, wanted).astype(int) for file in files]
    monkeypatch.setattr(upright, 'LARGE', 100)
    monkeypatch.setattr(upright, 'STRIP', 300)
    for file, expected in zip(files, whole, strict=True):
        found = images.load_image(file, wanted).astype(int)
        assert np.ptp(found) > 5000 and np.abs(found - expected).max() < 1500
        assert images.make_smaller(file, 8, quality=90) == file


def test_augmented_batches_keep_16_bits(tmp_path):
    for seed in range(12):
        folder = tmp_path / 'ab'[seed % 2]
        folder.mkdir(exist_ok=True)
        file = deep_images.png(noise(12, 12, 3, seed=seed) // 4)
        (folder / f'{seed}.png').write_bytes(file)
    for cache in ('none', 'memory'):
        source = load(f'folder:{tmp_path}', cache=cache)
        batches = pipeline.train_batches(
            source.train,
            batch_size=4,
            seed=0,
            augment='crop_flip',
            color_jitter=(0.2, 0.2, 0.2, 0.1),
            policy='randaugment',
        )
        batch = next(batches)['image']
        batches.close()
        assert batch.dtype == np.uint16
        assert (batch % 257 != 0).mean() > 0.5  # no levels of 8 bits


def test_tiffs_of_several_pages_are_reported(tmp_path, capsys):
    source = write(tmp_path / 'x', 0, 255, 'uint8', 'tif')
    load(source)
    assert 'several pages' not in capsys.readouterr().out
    pages = [Image.new('L', (8, 8), n) for n in (10, 200)]
    pages[0].save(
        tmp_path / 'x' / 'a' / '0.tif', save_all=True, append_images=pages[1:]
    )
    train = load(source).train
    assert '1 of 9 inspected images are TIFF' in capsys.readouterr().out
    places = [i for i in range(len(train)) if train.name(i).endswith('a/0.tif')]
    assert (train[places[0]]['image'] == 10).all()


def test_predictions_of_dark_images_are_reported_once(tmp_path, caplog):
    """Weights of 8-bit images, which see 12 bits as black; a window helps."""
    weights = runs.make_weights(tmp_path / 'x.safetensors')
    values = noise(12, 12, 1) // 20
    paths = [tmp_path / f'{n}.png' for n in range(3)]
    for path in paths[:2]:
        path.write_bytes(deep_images.png(values))
    Image.new('RGB', (12, 12), (9, 9, 9)).save(paths[2])  # dark, of 8 bits
    model = predictor_lib.Predictor(trained.load_trained(weights), 4)
    assert model.load(str(paths[2])).max() == 9 and not caplog.text
    for path in paths:
        assert model.load(str(path)).max() < 20
    assert caplog.text.count('nearly black') == 1 and '0.png' in caplog.text
    shown = dataclasses.replace(model.preparation, window=(0, 4095))
    assert images.load_image(str(paths[0]), shown).max() > 150


def test_uint8_of_uint16_for_display():
    values = np.array([0, 128, 129, 257, 65535, 65406], np.uint16)
    assert deep_picture.to_uint8(values).tolist() == [0, 0, 1, 1, 255, 254]
    assert deep_picture.to_uint8(values.astype(np.uint8)).dtype == np.uint8
