"""Predictions for files: order, errors, memory of batches."""

import numpy as np
import pytest
from conftest import tiny_config, write_images

from flax_densenet import evaluate, images, predict, train


@pytest.fixture(scope='module')
def predictor(tmp_path_factory):
    folder = tmp_path_factory.mktemp('predict')
    photos = write_images(folder / 'photos', {'ants': 60, 'bees': 60})
    config = tiny_config(
        **{
            'data.source': f'folder:{photos}', 'data.batch_size': 32,
            'data.image_size': 12, 'optimizer.learning_rate': 1e-2, 'train.epochs': 4,
        }
    )  # fmt: skip
    train.fit(config, str(folder / 'run'))
    trained = evaluate.load_trained(str(folder / 'run'))
    return predict.Predictor(trained, batch_size=8), photos


def files_of(photos, count):
    return sorted(str(path) for path in photos.rglob('*.jpg'))[:count]


def test_predictions(predictor):
    model, photos = predictor
    files = files_of(photos, 120)[50:71]  # both classes, and no multiple of a batch
    found = list(model.stream(files, features=True, cams=True))
    assert [f.path for f in found] == files
    metadata = model.trained.metadata
    pixels = np.stack([images.load_image(f, model.preparation) for f in files])
    assert pixels.shape == (21, 12, 12, 3)
    normalised = evaluate.normalise(pixels, mean=metadata['mean'], std=metadata['std'])
    logits = model.trained.module.apply(model.trained.variables, normalised)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    probabilities = np.stack([f.probabilities for f in found])
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    names = [model.class_names[p.argmax()] for p in probabilities]
    assert np.mean([n in f.path for n, f in zip(names, found, strict=True)]) > 0.9
    assert found[0].features.shape == (36 // 2,) or found[0].features.ndim == 1
    assert found[0].image.shape == (12, 12, 3) and found[0].cam.ndim == 2


def test_a_bad_file_is_a_row(predictor, tmp_path):
    model, photos = predictor
    bad = tmp_path / 'bad.jpg'
    bad.write_text('no image')
    files = [str(bad), *files_of(photos, 9), str(tmp_path / 'none.jpg'), str(bad)]
    found = list(model.stream(iter(files)))
    assert [f.path for f in found] == files
    assert [f.error is not None for f in found] == [True] + [False] * 9 + [True] * 2
    assert 'is not an image' in found[0].error
    assert 'is not there' in found[10].error
    assert list(model.stream([])) == []
    assert [f.error is None for f in model.stream([str(bad)])] == [False]


def test_files_are_read_as_they_are_needed(predictor):
    """Of a stream without end no more than a few batches are in memory."""
    model, photos = predictor
    taken = 0
    path = files_of(photos, 1)[0]

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield path

    stream = model.stream(endless())
    for _ in range(20):
        next(stream)
    assert taken <= 20 + 3 * 8
    stream.close()
