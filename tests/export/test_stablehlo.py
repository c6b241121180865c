"""A program in a file computes what the model does, where this package is not."""

import dataclasses
import json
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.data import dataset
from flax_densenet.data import images as images_lib
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.export import stablehlo
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.weights import trained
from helpers.decided import decide
from helpers.networks import compiled
from helpers.paths import shared
from helpers.runs import tiny_trained, write_images

pytest.importorskip('flatbuffers', reason='flatbuffers is not installed')


@pytest.fixture(scope='module')
def model():
    return tiny_trained(dataset.load_source('digits', image_size=12))


@pytest.fixture(scope='module')
def photos(model, tmp_path_factory):
    """Real files, read as the model wants them: uint8 [7, 12, 12, 3]."""
    folder = write_images(tmp_path_factory.mktemp('photos'), {'a': 4, 'b': 3})
    preparation = trained.preparation_of(model.metadata)
    files = sorted(folder.rglob('*.jpg'))
    return np.stack([images_lib.load_image(str(f), preparation) for f in files])


ALONE = """
import json, sys, zipfile
import numpy as np
from jax import export
images, out, *paths = sys.argv[1:]
images, found = np.load(images), []
for path in paths:
    program = export.deserialize(bytearray(open(path, 'rb').read()))
    found += [np.asarray(program.call(images[:n])) for n in (2, len(images))]
    names = json.loads(zipfile.ZipFile(path).read('metadata.json'))['class_names']
    print(names, any(name.startswith('flax_densenet') for name in sys.modules))
np.savez(out, *found)
"""


def run_alone(paths, images, folder, python=sys.executable):
    """In one process; for each file, of two and of all images, and what it prints."""
    np.save(folder / 'images.npy', images)
    command = [python, '-c', ALONE, folder / 'images.npy', folder / 'out.npz', *paths]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / 'out.npz') as found:
        arrays = [found[f'arr_{n}'] for n in range(2 * len(paths))]
    return [arrays[n : n + 2] for n in range(0, len(arrays), 2)], done.stdout


@pytest.mark.slow
def test_a_fresh_process_agrees(model, photos, tmp_path):
    models = [model.with_tta(tta) for tta in ('none', 'flip')]
    paths = [tmp_path / f'{n}.stablehlo' for n in range(len(models))]
    for one, path in zip(models, paths, strict=True):
        stablehlo.save(str(path), one)
    found, said = run_alone(paths, photos, tmp_path)
    assert said == f'{model.metadata["class_names"]} False\n' * 2
    for one, pair in zip(models, found, strict=True):
        expected = predictor_lib.Predictor(one, 8).compute(photos)[0]
        assert np.ptp(expected, 0).max() > 1e-3
        for rows in pair:
            assert rows.dtype == np.float32
            wanted = expected[: len(rows)]
            np.testing.assert_allclose(rows, wanted, rtol=1e-4, atol=1e-6)


def test_load(model, photos, tmp_path):
    path = str(tmp_path / 'x.stablehlo')
    if cpu_kernels.load() is None:  # which no other machine has
        native = model.module.clone(kernel='native')
        model = dataclasses.replace(model, module=native)
    stablehlo.save(path, model, inputs='normalized')
    function, metadata = stablehlo.load(path)
    assert metadata['class_names'] == model.metadata['class_names']
    assert metadata['written_with_jax'] == jax.__version__
    assert (metadata['inputs'], metadata['precision']) == ('normalized', 'float32')
    assert '6 months' in metadata['compatibility']
    assert trained.preparation_of(metadata) == trained.preparation_of(model.metadata)
    pixels = trained.normalize(photos, mean=metadata['mean'], std=metadata['std'])
    expected = compiled(model.module)(jax.device_get(model.variables), pixels)
    for count in (1, 7):
        found = function(pixels[:count])
        np.testing.assert_allclose(found, expected[:count], rtol=1e-4, atol=1e-5)
    from jax import export

    content = bytearray((tmp_path / 'x.stablehlo').read_bytes())
    program = export.deserialize(content)
    assert program.platforms == stablehlo.PLATFORMS
    # No kernel of ours, and no folder of this machine.
    assert 'flax_densenet' not in program.mlir_module()
    assert b'folded.py' not in content and b'site-packages' not in content


@pytest.mark.slow
def test_score_of_unusual_images(model, photos, tmp_path):
    """A second result, of images and of normalized ones; metadata names it."""
    plain = predictor_lib.Predictor(model, 8).programs(photos)
    made = decide(plain.features, np.log(plain.probabilities), classes=10)
    model = dataclasses.replace(model, decisions=made)
    wanted = made.unusual.score(plain.features, None)
    assert np.ptp(wanted) > 0.1
    path = str(tmp_path / 'x.stablehlo')
    for inputs, results in (('images', 'probabilities'), ('normalized', 'logits')):
        stablehlo.save(path, model, inputs=inputs)
        function, metadata = stablehlo.load(path)
        assert metadata['results'] == [results, 'unusual']
        assert set(metadata['set_thresholds']) >= {'0.9', '0.99'}
        given = photos
        if inputs == 'normalized':
            ways = {name: metadata[name] for name in ('mean', 'std')}
            given = trained.normalize(photos, **ways)
        first, score = function(given)
        assert first.shape == (7, 10)
        np.testing.assert_allclose(score, wanted, atol=1e-3 * np.ptp(wanted) + 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['bfloat16', 'float16'])
def test_precision(model, photos, tmp_path, precision):
    whole, half = str(tmp_path / 'x.stablehlo'), str(tmp_path / 'y.stablehlo')
    stablehlo.save(whole, model)
    stablehlo.save(half, model, precision=precision)
    expected, found = (stablehlo.load(p)[0](photos) for p in (whole, half))
    difference = np.abs(np.asarray(expected) - np.asarray(found)).max()
    assert 1e-7 < difference < 0.02
    text = stablehlo._export(model, 'images', precision).mlir_module()
    assert ('bf16' if precision == 'bfloat16' else 'f16') in text


@pytest.mark.slow
def test_any_size(model, tmp_path):
    path = str(tmp_path / 'x.stablehlo')
    stablehlo.save(path, model, inputs='normalized', any_size=True)
    function, metadata = stablehlo.load(path)
    assert metadata['any_size']
    for shape in ((2, 12, 12, 3), (1, 17, 9, 3)):
        pixels = np.random.default_rng(0).standard_normal(shape, np.float32)
        expected = compiled(model.module)(jax.device_get(model.variables), pixels)
        np.testing.assert_allclose(function(pixels), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='shapes'):
        function(np.zeros((1, 1, 9, 3), np.float32))


def test_what_float16_cannot_hold(model, tmp_path):
    large = jax.tree.map(lambda x: x * 1e6, jax.device_get(model.variables))
    model = dataclasses.replace(model, variables=large)
    with pytest.raises(UserError, match='precision=float16: a kernel has values above'):
        stablehlo.save(str(tmp_path / 'x.stablehlo'), model, precision='float16')
    assert not list(tmp_path.iterdir())


def test_mistakes(model, tmp_path, monkeypatch):
    path = tmp_path / 'x.stablehlo'
    with pytest.raises(UserError, match='inputs=pixels is not known; use images'):
        stablehlo.save(str(path), model, inputs='pixels')
    with pytest.raises(UserError, match='precision=int8 is not known; use float32'):
        stablehlo.save(str(path), model, precision='int8')
    with pytest.raises(UserError, match='there is no such file'):
        stablehlo.load(str(path))
    path.write_bytes(b'no program')
    with pytest.raises(UserError, match='is not a valid file of --format=stablehlo'):
        stablehlo.load(str(path))
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('metadata.json', json.dumps({'written_with_jax': '9.9'}))
    with pytest.raises(UserError, match='was written with JAX 9.9, and is read by'):
        stablehlo.load(str(path))
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('metadata.json', '[]')
    with pytest.raises(UserError, match='metadata.json is not an object'):
        stablehlo.load(str(path))
    monkeypatch.setitem(sys.modules, 'flatbuffers', None)
    for call in (stablehlo.load, lambda path: stablehlo.save(path, model)):
        with pytest.raises(UserError, match=r"pip install 'flax_densenet\[export\]'"):
            call(str(path))


def test_cut_short(model, tmp_path):
    path = tmp_path / 'x.stablehlo'
    stablehlo.save(str(path), model)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match='is not a valid file'):
        stablehlo.load(str(path))


@pytest.mark.slow
def test_densenet121(tmp_path):
    """The reference weights on real photographs."""
    photos = sorted(shared('data/hymenoptera').rglob('*.jpg'))[:5]
    module, mesh = create_model('densenet121', num_classes=1000), mesh_lib.make_mesh()
    metadata = {
        'model': {'variant': 'densenet121'},
        'class_names': [f'class {n}' for n in range(1000)],
        'image_size': 224,
        'mean': [0.485, 0.456, 0.406],
        'std': [0.229, 0.224, 0.225],
        'data': {},
    }
    variables = mesh_lib.replicate(init_variables(module, 0), mesh)
    model = trained.Trained(module, variables, metadata, {}, None, mesh)
    predictor = predictor_lib.Predictor(model, 4)
    images = np.stack([predictor.load(str(photo)) for photo in photos])
    stablehlo.save(str(tmp_path / 'x.stablehlo'), model)
    (found,), _ = run_alone([tmp_path / 'x.stablehlo'], images, tmp_path)
    expected = predictor.compute(images)[0]
    for rows in found:
        np.testing.assert_allclose(rows, expected[: len(rows)], rtol=1e-3, atol=1e-6)
