"""DenseNets of Keras with random weights, to compare with ours."""

import jax
import numpy as np
from flax import traverse_util

from flax_densenet import create_model
from flax_densenet.models.initialization import variable_shapes

# Two layers in some blocks; with 16 kernels, conv2d_10 sorts before conv2d_2 as text.
BLOCKS = (1, 2, 1, 2)
KERAS_FIELDS = dict(
    epsilon=1.001e-5, momentum=0.99, unbiased_variance=False, padding='torch'
)
ENDINGS = ('.weights.h5', '.keras', '.h5')


def make_keras(keras, blocks=BLOCKS, *, classes=5, size=None, **fields):
    from keras.src.applications.densenet import DenseNet

    return scramble(
        DenseNet(
            list(blocks),
            weights=None,
            include_top=classes > 0,
            classes=classes or 1000,
            classifier_activation=None,
            input_tensor=keras.Input((size, size, 3)),
            **fields,
        )
    )


def scramble(network, seed=0):
    """Random weights and statistics that preserve the scale of activations."""
    rng = np.random.default_rng(seed)

    def draw(variable):
        shape, name = tuple(variable.shape), variable.path.rpartition('/')[2]
        if name == 'kernel':
            return rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
        if name in ('gamma', 'moving_variance'):
            return rng.uniform(0.5, 1.5, shape)
        return 0.2 * rng.standard_normal(shape)

    network.set_weights([draw(v).astype(np.float32) for v in network.weights])
    return network


def images(height=97, width=131, channels=3):
    shape = (2, height, width, channels)
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def run_keras(network, x):
    return np.asarray(jax.jit(lambda x: network(x, training=False))(x))


def run_ours(arrays, fields, x, *, blocks=BLOCKS):
    classes = arrays.get('params/classifier/bias', np.zeros(0)).size
    module = create_model(
        'densenet121', num_classes=classes, block_sizes=blocks, **fields
    )
    shapes = traverse_util.flatten_dict(variable_shapes(module), sep='/')
    assert {k: v.shape for k, v in arrays.items()} == {
        k: v.shape for k, v in shapes.items()
    }
    assert all(array.dtype == np.float32 for array in arrays.values())
    variables = traverse_util.unflatten_dict(arrays, sep='/')
    method = None if classes else 'features'
    return np.asarray(
        jax.jit(lambda v, x: module.apply(v, x, method=method))(variables, x)
    )


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert expected.std() > 0.01
    # Measured: at most 1e-6 of the spread, 2e-6 for the full-size networks.
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


def equal_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


def save(network, path):
    (network.save_weights if str(path).endswith('.weights.h5') else network.save)(path)
    return str(path)


def ours(num_classes=5, *, seed=0, channels=3, **fields):
    """A module and random variables for it, norms and statistics included."""
    fields = dict(block_sizes=BLOCKS, epsilon=1.001e-5) | fields
    module = create_model('densenet121', num_classes=num_classes, **fields)
    rng = np.random.default_rng(seed)
    shapes = traverse_util.flatten_dict(variable_shapes(module, channels=channels))
    flat = {}
    for path, leaf in shapes.items():
        draw = rng.standard_normal(leaf.shape)
        if path[-1] == 'kernel':
            flat[path] = draw * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            flat[path] = np.abs(draw) if path[-1] in ('scale', 'var') else 0.2 * draw
        flat[path] = flat[path].astype(np.float32)
    return module, traverse_util.unflatten_dict(flat)
