"""Images of more than 8 bits keep their gray levels; the window is found and kept."""

import numpy as np
import pytest
from PIL import Image

from flax_densenet import UserError
from flax_densenet.data import dataset, deep, images
from flax_densenet.weights import trained


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


@pytest.mark.parametrize(
    ('low', 'high', 'dtype', 'ending', 'window'),
    [
        (0, 4000, 'uint16', 'png', (0, 4095)),
        (100, 1000, 'uint16', 'tif', (0, 1023)),
        (0, 16000, 'uint16', 'png', (0, 16383)),
        (0, 255, 'uint16', 'png', (0, 255)),
        (0, 60_000, 'uint16', 'png', None),
        (-1000, 3000, 'int32', 'tif', (-1000, 3000)),
        (0, 4095, 'float32', 'tif', (0, 4095)),
        (-1, 1, 'float32', 'tif', (-1, 1)),
        (0, 1, 'float32', 'tif', None),
        (0, 255, 'float32', 'tif', None),
        (0, 255, 'uint8', 'png', None),
    ],
)
def test_windows_that_are_found(low, high, dtype, ending, window, tmp_path, capsys):
    source = load(write(tmp_path / 'x', low, high, dtype, ending))
    found, said = source.train.preparation.window, capsys.readouterr().out
    assert ('data.window=' in said) == (window is not None)
    if window is None:
        assert found is None
        return
    assert found == pytest.approx(window, abs=(high - low) * 0.01)
    levels = {
        v for i in range(len(source.train)) for v in source.train[i]['image'].flat
    }
    assert len(levels) > 50 and max(levels) - min(levels) > 200
    kept = trained.preparation_of(
        {'image_size': 8, 'mean': [0] * 3, 'data': {'window': list(found)}}
    )
    index = int(source.train.indices[0])
    np.testing.assert_array_equal(
        images.load_image(source.train.reader[index], kept), source.train[0]['image']
    )


def test_a_window_that_is_given(tmp_path, capsys):
    source = write(tmp_path / 'x', 0, 4000, 'uint16')
    found = load(source, window=(0, 2000))
    assert found.train.preparation.window == (0, 2000)
    before = load(source, window=())  # as of runs from before there were windows
    assert before.train.preparation.window is None
    assert before.train[0]['image'].max() == 4000 * 0.75 // 257
    assert 'data.window' not in capsys.readouterr().out
    for wrong in ((1,), (5, 5), (3, 1), ('a', 2), 7, (0, np.inf)):
        with pytest.raises(UserError, match='must be two numbers'):
            deep.check(wrong)


def test_large_images_and_packing(tmp_path, monkeypatch):
    monkeypatch.setattr(images, 'LARGE', 100)
    pixels = np.tile(np.arange(64, dtype=np.uint16) * 64, (64, 1))
    Image.fromarray(pixels).save(tmp_path / 'x.png')
    wanted = images.Preparation(8, window=(0, 4095))
    found = images.load_image(str(tmp_path / 'x.png'), wanted)
    assert np.ptp(found) > 200
    content = (tmp_path / 'x.png').read_bytes()
    assert images.make_smaller(content, 8, quality=90) == content
