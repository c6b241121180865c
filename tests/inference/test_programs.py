"""Programs of a few batch sizes: which are compiled, and that all of them agree."""

import concurrent.futures
import dataclasses

import jax
import numpy as np
import pytest

from flax_densenet.data import dataset
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.evaluation import unusual
from flax_densenet.inference import grad_cam
from flax_densenet.inference import programs as programs_lib
from flax_densenet.weights import decisions, trained
from helpers.blocks import require_native
from helpers.networks import compiled
from helpers.runs import tiny_trained


@pytest.fixture(scope='module')
def model():
    return tiny_trained(dataset.load_source('digits', image_size=12))


def images_of(model, count):
    side = model.metadata['image_size']
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def expected(model, images):
    """Probabilities, features, maps of class 1, by the module itself."""
    options = {name: model.metadata[name] for name in ('mean', 'std')}
    pixels = trained.normalize(images, **options)
    module, variables = model.module, jax.device_get(model.variables)
    maps = compiled(module, method='features')(variables, pixels)
    pooled = compiled(module, method='pool')(variables, maps)
    ones = np.ones(len(images), np.int32)
    _, cams = grad_cam.grad_cam(variables, pixels, ones, module=module)
    logits = compiled(module)(variables, pixels)
    return jax.nn.softmax(logits), pooled, cams


def assert_same(found, wanted):
    assert len(found) >= len(wanted)
    for ours, theirs in zip(found[: len(wanted)], wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_split():
    for count in range(1, 70):
        sizes = programs_lib.split(count, (1, 4, 16))
        assert sum(sizes[:-1]) < count <= sum(sizes) <= 4 / 3 * count


@pytest.mark.slow
def test_sizes_agree(model):
    images = images_of(model, 11)
    wanted = expected(model, images)
    programs = programs_lib.Programs(model, 8)
    assert programs.sizes == (1, 4, 8)
    assert_same(programs(images, 1), wanted)
    found = programs(images)
    assert found.cams is None and found.unusual is None
    assert_same(found, wanted[:2])
    assert_same(programs(images[:1], [1]), [part[:1] for part in wanted])
    # The likeliest class, where none is named.
    likeliest = programs(images, wanted[0].argmax(-1))
    assert_same(programs(images, -1)[:3], likeliest[:3])


@pytest.mark.slow
def test_scores_of_unusual_images(model):
    """Those of the features, whatever batch they are computed in."""
    images = images_of(model, 5)
    features = programs_lib.Programs(model, 4)(images).features
    random = np.random.default_rng(1)
    train = features[0] + random.normal(size=(30, features.shape[1])) / 9
    score = unusual.fit(
        'mahalanobis',
        features=train,
        labels=np.arange(30) % 3,
        val_features=train[::2] + 0.1,
        val_logits=np.zeros((15, 10)),
    )
    made = decisions.Decisions(0, '', 10, 'digits', 'test', 15, unusual=score)
    scored = dataclasses.replace(model, decisions=made)
    found = programs_lib.Programs(scored, 4)(images)
    wanted = score.score(features, None)
    assert wanted.std() > 0.01
    np.testing.assert_allclose(found.unusual, wanted, rtol=1e-3, atol=1e-3)


def test_what_is_compiled_when(model, monkeypatch):
    """A size is compiled at once where nothing fits, else when it is wanted again."""
    made = []

    def compile_one(self, size, maps, shape):
        made.append((size, maps))
        return original(self, size, maps, shape)

    original = programs_lib.Programs._compile
    monkeypatch.setattr(programs_lib.Programs, '_compile', compile_one)
    programs = programs_lib.Programs(model, 8)
    images = images_of(model, 8)
    assert programs(images)[0].shape == (8, 10) and made == [(8, '')]
    first = programs(images[:1])  # filled up
    assert made == [(8, '')]
    again = programs(images[:1])
    assert made == [(8, ''), (1, '')]
    assert_same(first[:2], again[:2])
    programs(images[:3])
    assert len(made) == 2
    programs(images[:3], -1)  # with maps there is none to fill up
    assert made[2:] == [(4, 'gradcam')]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(programs, images[:4]) for _ in range(8)]
        for task in tasks:
            assert_same(task.result()[:2], [part[:4] for part in programs(images)[:2]])
    assert made.count((4, '')) == 1


@pytest.mark.slow
def test_other_sides(model):
    """A page can be of images of another size than those of the training."""
    images = images_of(model, 8).reshape(2, 24, 24, 3)
    assert_same(programs_lib.Programs(model, 4)(images, 1), expected(model, images))


@pytest.mark.slow
def test_one_device(model):
    """Rows of a batch need no second device, and the native kernel gives the same."""
    require_native()
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    images = images_of(model, 5)
    wanted = expected(model, images)
    for kernel in ('xla', 'native'):
        one = dataclasses.replace(
            model,
            mesh=mesh,
            module=model.module.clone(kernel=kernel),
            variables=mesh_lib.replicate(jax.device_get(model.variables), mesh),
        )
        assert_same(programs_lib.Programs(one, 4)(images, 1), wanted)
