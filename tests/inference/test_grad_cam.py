"""Grad-CAM against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_densenet import create_model, init_variables
from flax_densenet.inference import grad_cam, overlay
from helpers.networks import compiled


@pytest.fixture(scope='module')
def case():
    module = create_model('BC-L10k4', num_classes=3)
    variables = init_variables(module, 0)
    # Nothing simple; maps of both signs, so that gradients differ by position.
    rng = np.random.default_rng(0)

    def shake(path, leaf):
        noise = 0.3 * rng.standard_normal(leaf.shape)
        return (leaf + (np.abs(noise) if path[-1].key == 'var' else noise)).astype('f4')

    variables = jax.tree_util.tree_map_with_path(shake, variables)
    return module, variables, rng.standard_normal((2, 16, 16, 3)).astype(np.float32)


@pytest.mark.slow
def test_by_finite_differences(case):
    """Weights: what a class's logit gains when a feature map rises everywhere."""
    module, variables, images = case
    cams = []
    for chosen in range(3):
        classes = np.full(2, chosen, np.int32)
        logits, found = grad_cam.grad_cam(variables, images, classes, module=module)
        cams.append(np.asarray(found))
    np.testing.assert_allclose(logits, compiled(module)(variables, images), rtol=1e-5)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
        wide = module.clone(dtype='float64', kernel='xla')
        images = jnp.asarray(images)
        features = compiled(wide, method='features')(double, images)
        head = compiled(wide, method='head')
        _, height, width, channels = features.shape
        weights, step = [], 1e-6
        for k in range(channels):
            up, down = (
                head(double, features.at[..., k].add(sign * step)) for sign in (1, -1)
            )
            weights.append((up - down) / (2 * step * height * width))
        weights = jnp.stack(weights, -1)  # [N, classes, channels]
        expected = jax.nn.relu(jnp.einsum('nck,nhwk->cnhw', weights, features))
        expected = np.asarray(expected)
    assert expected.max() > 0.01
    assert 0.1 < (np.asarray(features) > 0).mean() < 0.9
    np.testing.assert_allclose(cams, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_most_likely_class_is_the_default(case):
    module, variables, images = case
    logits, cams = grad_cam.grad_cam(
        variables, images, np.array([-1, -1], np.int32), module=module
    )
    best = np.asarray(logits.argmax(-1), np.int32)
    _, same = grad_cam.grad_cam(variables, images, best, module=module)
    np.testing.assert_array_equal(cams, same)
    _, other = grad_cam.grad_cam(variables, images, (best + 1) % 3, module=module)
    assert np.abs(cams - other).max() > 1e-3


def test_overlay():
    image = np.full((8, 8, 3), 100, np.uint8)
    cam = np.zeros((2, 2))
    cam[0, 0] = 5
    found = overlay.overlay(image, cam)
    assert found.shape == (8, 8, 3) and found.dtype == np.uint8
    assert np.abs(found[7, 7].astype(int) - 100).max() <= 2  # nothing there
    assert np.abs(found[0, 0].astype(int) - 100).max() > 40
    gray = overlay.overlay(image[..., :1], np.zeros((2, 2)))
    np.testing.assert_array_equal(gray, image)


def test_layer_is_the_overlay_taken_apart():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (9, 12, 3), np.uint8)
    cam = rng.random((3, 4))
    layer = overlay.layer(cam, (9, 12), strength=0.6)
    assert layer.shape == (9, 12, 4) and layer.dtype == np.uint8
    alpha = layer[..., 3:] / 255
    assert alpha.max() == pytest.approx(0.6, abs=0.01)
    expected = overlay.overlay(image, cam, strength=0.6)
    found = image * (1 - alpha) + layer[..., :3] * alpha
    assert np.abs(found - expected).max() < 1.5
    assert not overlay.layer(np.zeros((2, 2)), (4, 4))[..., 3].any()
