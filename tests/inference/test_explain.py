"""Explanations match their definitions; `test_explain_torch` compares with PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.inference import cams, explain, multi_process, perturbation
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.weights import trained as trained_lib
from helpers.networks import compiled


def shake(variables):
    """Nothing simple; of both signs."""
    rng = np.random.default_rng(0)

    def change(path, leaf):
        noise = 0.3 * rng.standard_normal(leaf.shape)
        return (leaf + (np.abs(noise) if path[-1].key == 'var' else noise)).astype('f4')

    return jax.tree_util.tree_map_with_path(change, variables)


def make(*, variant='BC-L10k4', channels=3, size=(8, 12), multi_label=False, **fields):
    """A `Predictor` with random weights on four devices."""
    fields = {'block_sizes': (1, 1)} | fields
    module = create_model(variant, num_classes=3, **fields)
    variables = shake(init_variables(module, 0, channels=channels))
    mesh = mesh_lib.make_mesh()
    metadata = {
        'model': {'variant': variant},
        'class_names': ['ants', 'bees', 'wasps'],
        'image_size': size,
        'mean': [0.5] * channels,
        'std': [0.2] * channels,
        'data': {'channels': channels},
        'channels': channels,
        'multi_label': multi_label,
    }
    trained = trained_lib.Trained(
        module, mesh_lib.replicate(variables, mesh), metadata, {}, 3, mesh
    )
    return predictor_lib.Predictor(trained, batch_size=4)


RDNET = dict(
    variant='rdnet_tiny', block_sizes=(1, 1, 1), growth_rates=(8, 8, 8),
    halvings=(1,), squeeze_blocks=(3,), stem_features=8, patch_size=2,
)  # fmt: skip


def pixels_of(model, count=2):
    shape = (*model.preparation.shape, model.preparation.channels)
    return np.random.default_rng(1).integers(0, 256, (count, *shape), np.uint8)


def normalized(model, pixels):
    options = {name: model.trained.metadata[name] for name in ('mean', 'std')}
    return trained_lib.normalize(pixels, **options)


@pytest.fixture(scope='module')
def model():
    return make()


@pytest.mark.slow
def test_maps_of_the_last_layer_by_hand(model):
    """Behind them are a ReLU, a mean and a linear layer, so gradients are known."""
    pixels, classes = pixels_of(model), np.array([2, 0])
    module, variables = model.trained.module, jax.device_get(model.trained.variables)
    images = normalized(model, pixels)
    features = np.asarray(compiled(module, method='features')(variables, images))
    rectified = np.maximum(features, 0)
    area = features.shape[1] * features.shape[2]
    weights = variables['params']['classifier']['kernel'].T[classes][:, None, None]
    cam = np.maximum((weights * rectified / area).sum(-1), 0)
    positive = np.maximum(weights, 0)
    mean = rectified.mean((1, 2), keepdims=True)
    plus = (positive / (2 + positive * mean) * rectified).sum(-1)
    for method, expected in (('hirescam', cam), ('gradcam++', plus)):
        found = model.cams(pixels, classes, explain.make(method))
        assert expected.max() > 0.01 and (expected[0] != expected[1]).any()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    likely = model.compute(pixels)[0].argmax(-1)
    for method in ('hirescam', 'occlusion'):
        how = explain.make(method)
        best = model.cams(pixels, None, how)
        np.testing.assert_array_equal(best, model.cams(pixels, likely, how))
        other = model.cams(pixels, (likely + 1) % 3, how)
        assert np.abs(other - best).max() > 1e-3 * best.max() > 0, method


@pytest.mark.slow
@pytest.mark.parametrize(
    'fields, at',
    [
        ({}, 'transition1'),
        pytest.param(RDNET, 'denseblock1', marks=pytest.mark.exhaustive),
    ],
)
def test_layer_cam_is_of_the_layer_before_the_last_halving(fields, at):
    """Beside the gradient of what is added there, in the plain network."""
    model = make(**fields)
    module, pixels = model.trained.module.plain(), pixels_of(model)
    variables, images = model.trained.variables, normalized(model, pixels)
    inside, classes = [], jnp.array([2, 0])

    def logits(added):
        def change(function, args, kwargs, context):
            of = context.module
            if at.startswith('transition') and of.path == (at, 'conv') and args:
                inside.append(args[0])
                args = (args[0] + added, *args[1:])
            if of.name == at == 'denseblock1':
                found = function(*args, **kwargs)
                inside.append(found)
                return found + added
            return function(*args, **kwargs)

        with nn.intercept_methods(change):
            found = module.apply(variables, images)
        return jnp.take_along_axis(found, classes[:, None], 1).sum(), inside[-1]

    nothing = jnp.zeros(jax.eval_shape(logits, 0.0)[1].shape)
    gradient, layer = jax.jit(jax.grad(logits, has_aux=True))(nothing)
    expected = np.maximum((np.maximum(gradient, 0) * layer).sum(-1), 0)
    found = model.cams(pixels, classes, explain.make('layercam'))
    smaller = model.cams(pixels, classes)
    assert found.shape[1] == 2 * smaller.shape[1] and expected.max() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max())


@pytest.mark.slow
@pytest.mark.parametrize(
    'fields',
    [
        {'channels': 4, 'size': (20, 9), 'dtype': 'bfloat16', 'multi_label': True},
        pytest.param({}, marks=pytest.mark.exhaustive),
        pytest.param(RDNET | {'channels': 1}, marks=pytest.mark.exhaustive),
    ],
)
def test_slow_methods(fields):
    """What pixels add is what the logit gains; a hidden pixel costs its own part."""
    model = make(**fields)
    (image,) = pixels_of(model, 1)
    module, variables = model.trained.module, model.trained.variables
    given = normalized(model, image[None])
    side = -(-min(image.shape[:2]) // 2)
    hidden = np.array(given)
    hidden[:, :side, :side] = 0
    three = np.concatenate([given, hidden, 0 * given])
    all_of_it, without, nothing = np.asarray(compiled(module)(variables, three))
    near = 0.3 if fields.get('dtype') else 0.03
    for chosen in range(3):
        how = explain.make('integrated_gradients', steps=32)
        found = model.perturbations.integrate(image, chosen, how)
        assert found.shape == image.shape[:2]
        gained = all_of_it[chosen] - nothing[chosen]
        assert found.sum() == pytest.approx(
            gained, abs=float(near * np.abs(found).sum())
        )
    how = explain.make('occlusion', patches=2)
    found = model.perturbations.occlusion(image, 1, how)
    # The corner is covered by one patch alone.
    assert found[0, 0] == pytest.approx(all_of_it[1] - without[1], abs=0.1 * near)
    assert found.std() > 0.01


def test_explanations_name_their_method(model, tmp_path):
    path = tmp_path / 'x.png'
    shown = np.random.default_rng(2).integers(0, 256, (30, 30, 3), np.uint8)
    Image.fromarray(shown).save(path)
    (found,) = model.explain(path, 'bees', method='Integrated-Gradients', steps=3)
    assert found.method == 'Integrated gradients with 3 steps'
    assert found.cam.shape == (8, 12) and found.cam.min() == 0 < found.cam.max()
    assert found.class_name == 'bees'
    np.testing.assert_array_equal(found.original, shown)
    assert found.box == (0, 0, 30, 30)


@pytest.mark.slow
def test_the_map_lies_on_the_part_that_is_seen(model):
    """Of a cropped photograph; the rest is darkened."""
    preparation = dataclasses.replace(model.preparation, resize='crop')
    cropping = make()
    cropping.preparation = preparation
    photo = np.full((60, 120, 3), 200, np.uint8)
    (found,) = cropping.explain(photo)
    assert found.box == pytest.approx((15, 0, 105, 60))
    picture = np.asarray(found.picture)[30:]
    scale = picture.shape[0] // 60
    left, right = np.split(picture[:, : 240 * scale + 6], [120 * scale], 1)
    right = right[:, 6:]
    assert (left == 200).all()
    seen = np.s_[:, 15 * scale : 105 * scale]
    assert (right[seen] != 90).any(-1).all()
    right = right.copy()
    right[seen] = 90
    assert (right == 90).all()


def test_other_processes_send_originals_of_any_size(model):
    rng = np.random.default_rng(3)
    photos = [rng.integers(0, 256, (9, side, 3), np.uint8) for side in (20, 31)]
    rows = list(model.stream([photos[0], b'no image', photos[1]], cams=True))
    packed = multi_process._pack(rows)
    found = list(multi_process._unpack(packed, model))
    assert [one.error is None for one in found] == [True, False, True]
    for one, other, photo in zip(found[::2], rows[::2], photos, strict=True):
        np.testing.assert_array_equal(one.original, photo)
        assert (one.box, one.method) == (other.box, 'Grad-CAM')
        np.testing.assert_array_equal(
            one.explanation.picture, other.explanation.picture
        )


@pytest.mark.parametrize(
    'options, message',
    [
        ({'method': 'layer'}, 'method=layer is not known; did you mean layercam'),
        ({'method': 'x'}, 'use gradcam, gradcam\\+\\+, hirescam, layercam, occlusion'),
        ({'steps': 8}, 'steps=8 needs method=integrated_gradients, not gradcam'),
        ({'method': 'ig', 'patches': 8}, 'patches=8 needs method=occlusion'),
        ({'method': 'ig', 'steps': 1}, 'steps=1 must be from 2 to 1000'),
        ({'method': 'occlusion', 'patches': 65}, 'patches=65 must be from 2 to 64'),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        explain.make(**options)


def test_names():
    assert explain.make().method == 'gradcam'
    for text in ('Grad-CAM++', 'gradcampp', 'GradCAM++'):
        assert explain.make(text).method == 'gradcam++'
    assert set(cams._COMBINE) | {'gradcam', *explain.SLOW} == set(explain.METHODS)


def test_several_methods():
    found = explain.make_several(['gradcam, layer-cam', 'ig,gradcam'], steps=9)
    assert [one.method for one in found] == [
        'gradcam',
        'layercam',
        'integrated_gradients',
    ]
    assert [one.steps for one in found] == [32, 32, 9]
    assert explain.make_several([]) == (explain.DEFAULT,)
    with pytest.raises(
        UserError, match='patches=9 needs method=occlusion, not gradcam'
    ):
        explain.make_several([], patches=9)


def test_patches_cover_every_pixel():
    for length in range(1, 40):
        for side in range(1, length + 1):
            stride = max(1, side // 2)
            starts = perturbation._starts(length, side, stride)
            covered = {n for start in starts for n in range(start, start + side)}
            assert covered >= set(range(length)), (length, side)
            assert max(starts) < length
