"""Predictions for files: order, errors, memory of batches; and as Python has them."""

import io
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import flax_densenet
from flax_densenet import UserError
from flax_densenet.data import images
from flax_densenet.inference import grad_cam, overlay
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.train import fit
from flax_densenet.weights import trained as trained_lib
from helpers.networks import compiled
from helpers.paths import ROOT
from helpers.runs import make_weights, tiny_config, write_images


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
    fit.fit(config, str(folder / 'run'))
    trained = trained_lib.load_trained(str(folder / 'run'))
    return predictor_lib.Predictor(trained, batch_size=8), photos


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
    normalized = trained_lib.normalize(
        pixels, mean=metadata['mean'], std=metadata['std']
    )
    logits = compiled(model.trained.module)(model.trained.variables, normalized)
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


def test_in_python(predictor):
    model, photos = predictor
    files = files_of(photos, 12)
    found = model.predict(files)
    assert [one.path for one in found] == files
    assert all(
        one.label == model.class_names[one.probabilities.argmax()] for one in found
    )
    assert found[3].probability == found[3].probabilities.max()
    assert repr(found[3]).startswith(f"<'{files[3]}': {found[3].label} ")
    first, second = found[3].top(9)  # of two classes
    assert first == (found[3].label, found[3].probability)
    assert second.probability == found[3].probabilities.min()
    assert {first.class_name, second.class_name} == {'ants', 'bees'}
    assert len(found[3].top(1)) == 1
    features = model.features(files)
    assert features.shape == (12, model.feature_size) and features.dtype == np.float32
    batch = np.stack([model.load(file) for file in files[:8]])
    probabilities, expected = model.compute(batch)
    np.testing.assert_allclose(features[:8], expected, atol=1e-6)
    rows = [one.probabilities for one in found[:8]]
    np.testing.assert_allclose(rows, probabilities, atol=1e-6)
    head = model.trained.variables['params']['classifier']
    logits = features @ np.asarray(head['kernel']) + np.asarray(head['bias'])[None]
    rows = [one.probabilities for one in found]
    np.testing.assert_allclose(jax.nn.softmax(logits), rows, atol=1e-5)
    assert model.features([]).shape == (0, model.feature_size)
    assert model.predict([]) == []


def test_kinds_of_images(predictor):
    """The same picture by any road gives the same; one alone is a list of one."""
    model, photos = predictor
    (path,) = files_of(photos, 1)
    with Image.open(path) as opened:
        pixels = np.asarray(opened)
        given = {
            'path': path,
            'pathlib': pathlib.Path(path),
            'bytes': pathlib.Path(path).read_bytes(),
            'Pillow': opened,
            'array': pixels,
            'batch': pixels[None],
        }
        found = {name: model.predict(image) for name, image in given.items()}
    expected = found['path'][0].probabilities
    for name, (one,) in found.items():
        np.testing.assert_allclose(one.probabilities, expected, atol=1e-6, err_msg=name)
        assert one.path == (path if name.startswith('path') else 'image 0')
    names = [one.path for one in model.predict([pixels, path, pixels])]
    assert names == ['image 0', path, 'image 2']
    gray = np.asarray(Image.open(path).convert('L'))
    expected = model.load(np.repeat(gray[..., None], 3, -1))
    np.testing.assert_array_equal(model.load(gray), expected)
    np.testing.assert_array_equal(model.load(gray[..., None]), expected)
    # A file's orientation counts for what Pillow opened, too.
    turned = Image.new('RGB', (4, 8), 'white')
    turned.putpixel((0, 0), 0)
    turned.getexif()[0x0112] = 3
    assert model.load(turned)[0, 0].min() > 200 > model.load(turned)[-1, -1].min()


def test_mistakes_in_python(predictor, tmp_path):
    model, photos = predictor
    good, bad = files_of(photos, 1)[0], str(tmp_path / 'bad.jpg')
    pathlib.Path(bad).write_text('no image')
    for call in (model.predict, model.explain, model.features):
        with pytest.raises(UserError, match='bad.jpg is not an image'):
            call([good, bad])
    found = model.predict([bad, good], errors='return')
    assert 'is not an image' in found[0].error and found[1].error is None
    assert (found[0].label, found[0].probability, found[0].top()) == (None, None, [])
    assert repr(found[0]).endswith(f': {found[0].error}>')
    found = model.explain([bad, good], errors='return')
    assert found[0] is None and found[1].path == good
    with pytest.raises(UserError, match='errors=skip is not known'):
        model.predict(good, errors='skip')
    with pytest.raises(UserError, match='class ant is none .* did you mean ants?'):
        model.explain(good, 'ant')
    for image, message in (
        (np.zeros((4, 4, 3), np.float32), 'image 0 is an array of float32'),
        (np.zeros((4, 4, 5), np.uint8), 'has 5 channels'),
        (np.zeros((4, 0, 3), np.uint8), r'uint8 \[4, 0, 3\]'),
        (b'bytes', 'image 0 is not an image'),
    ):
        with pytest.raises(UserError, match=message):
            model.predict(image)
    with pytest.raises(UserError, match='none: there is no such file or folder'):
        flax_densenet.load_trained(tmp_path / 'none')


@pytest.mark.slow
def test_explanations(predictor, tmp_path):
    model, photos = predictor
    files = files_of(photos, 120)[::40]
    likely, bees = model.explain(files), model.explain(files, 'bees')
    predictions = model.predict(files)
    batch = np.stack([model.load(file) for file in files])
    place = model.class_names.index('bees')
    for index, one in enumerate(likely):
        assert one.class_name == predictions[index].label
        assert one.probability == pytest.approx(predictions[index].probability)
        assert bees[index].class_name == 'bees'
        expected = predictions[index].probabilities[place]
        assert bees[index].probability == pytest.approx(expected)
        np.testing.assert_array_equal(one.image, batch[index])
    ants = model.explain(files, 'ants')
    options = {name: model.trained.metadata[name] for name in ('mean', 'std')}
    pixels = trained_lib.normalize(batch, **options)
    for found, index in ((likely, -1), (ants, 1 - place), (bees, place)):
        cams = np.stack([one.cam for one in found])
        again = model.cams(batch, None if index < 0 else index)
        np.testing.assert_allclose(cams, again, atol=1e-6)
        classes = np.full(len(files), index, np.int32)
        weights, module = model.trained.variables, model.trained.module
        _, expected = grad_cam.grad_cam(weights, pixels, classes, module=module)
        np.testing.assert_allclose(cams, expected, atol=1e-5 * np.max(expected))
    assert max(np.abs(a.cam - b.cam).max() for a, b in zip(ants, bees, strict=True)) > 0
    best = max(ants + bees, key=lambda one: one.cam.max())
    assert best.cam.max() > 0
    picture = best.picture
    assert picture.size == (2 * 320 + 6, 240 + 30)  # of the file, 8 times as large
    left = np.asarray(picture)[30:, :320]
    with Image.open(best.path) as photo:
        np.testing.assert_array_equal(left[::8, ::8], photo)
    right = np.asarray(picture)[30:, 326:]
    np.testing.assert_array_equal(right, overlay.overlay(left, best.cam))
    assert best.overlay.shape == (12, 12, 3)
    assert np.asarray(picture)[:30].min() < 100  # letters
    with Image.open(io.BytesIO(best._repr_png_())) as shown:
        np.testing.assert_array_equal(shown, picture)
    best.save(tmp_path / 'why.jpg')
    with Image.open(tmp_path / 'why.jpg') as saved:
        assert (saved.format, saved.size) == ('JPEG', picture.size)


@pytest.mark.slow
@pytest.mark.parametrize('multi_label', [True, False])
def test_several_labels(tmp_path, multi_label):
    """A file of weights knows whether its probabilities exclude each other."""
    path = make_weights(tmp_path / 'x.safetensors', multi_label=multi_label)
    model = flax_densenet.load_trained(path, batch_size=4)
    (found,) = model.predict(np.full((12, 12, 3), 200, np.uint8))
    batch = trained_lib.normalize(np.full((1, 12, 12, 3), 200, np.uint8), mean=[0.5] *
    3,
                               std=[0.2] * 3)  # fmt: skip
    logits = compiled(model.trained.module)(model.trained.variables, batch)[0]
    expected = jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    values = [one.probability for one in found.top(3)]
    assert values == sorted(values, reverse=True)
    assert (sum(values) == pytest.approx(1)) != multi_label


def test_no_number_is_an_error(tmp_path):
    path = make_weights(tmp_path / 'x.safetensors', scale=1e18)  # overflows
    model = flax_densenet.load_trained(path, batch_size=1)
    (found,) = model.predict(np.zeros((12, 12, 3), np.uint8), errors='return')
    assert 'no number' in found.error and found.label is None


@pytest.mark.slow
def test_the_package_is_light():
    """Whoever makes a model does not wait for checkpoints, readers and pictures,
    whoever predicts not for those of training, and nobody for what few need."""
    code = (
        'import sys, flax_densenet as f; '
        'print([n for n in ("orbax", "grain", "PIL", "tqdm") if n in sys.modules]); '
        'print(f.load_trained.__module__, "orbax" in sys.modules); '
        'import flax_densenet.inference.outputs; '
        'print([n for n in ("grain", "optax", "sklearn") if n in sys.modules]); '
        'import flax_densenet.sweeps.runner; '
        'heavy = {"torch", "keras", "tensorflow", "tensorflow_datasets", "sklearn", '
        '"matplotlib", "plotly", "jinja2", "tensorboardX", "optuna"}; '
        'print(sorted(heavy & set(sys.modules)))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT
    )
    expected = '[]\nflax_densenet.inference.predictor True\n[]\n[]\n'
    assert done.stdout == expected, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'loaded'"):
        flax_densenet.loaded()
