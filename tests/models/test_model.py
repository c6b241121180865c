"""Parameter counts, shapes, choices and bad fields of the model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from flax_densenet import VARIANTS, UserError, create_model, init_variables
from flax_densenet.models import factory, initialization, layers
from helpers.marks import slow_after
from helpers.networks import compiled

# Of the paper's and torchvision's models; 1000 classes, the CIFAR ones 10.
PARAMETERS = {
    'densenet121': 7_978_856,
    'densenet161': 28_681_000,
    'densenet169': 14_149_480,
    'densenet201': 20_013_928,
    'densenet264': 33_337_704,
    # timm's.
    'densenetblur121d': 7_998_088,
    'densenet264d': 72_736_216,
    'rdnet_tiny': 23_863_008,
    'rdnet_small': 50_436_448,
    'rdnet_base': 87_451_096,
    'rdnet_large': 186_269_632,
    'L40k12': 1_019_722,
    'L100k12': 6_979_642,
    'L100k24': 27_249_082,
    'BC-L100k12': 769_162,
    'BC-L250k24': 15_324_406,
    'BC-L190k40': 25_624_430,
}
TINY = dict(growth_rate=4, block_sizes=(2, 2), stem_features=8, bottleneck=2)


def tiny(**fields):
    return create_model('densenet121', **({'num_classes': 5} | TINY | fields))


def test_every_variant_has_a_count():
    assert PARAMETERS.keys() == VARIANTS.keys()


# Those of hundreds of layers take seconds each to lay out, others are of the same kind.
LARGE = ('densenet161', 'densenet264', 'densenet264d', 'BC-L250k24', 'BC-L190k40')
LARGE += ('densenet169', 'densenet201', 'L100k12', 'L100k24')
LARGE += ('rdnet_tiny', 'rdnet_small', 'rdnet_base', 'rdnet_large')


@pytest.mark.parametrize(
    'variant',
    [
        pytest.param(
            name,
            marks=pytest.mark.exhaustive
            if name in LARGE
            else (() if name == 'densenet121' else pytest.mark.slow),
        )
        for name in VARIANTS
    ],
)
def test_parameter_count(variant):
    classes = 10 if 'L' in variant else 1000
    module = create_model(variant, num_classes=classes)
    shapes = initialization.variable_shapes(module)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes['params']))
    assert count == module.count_parameters() == PARAMETERS[variant]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['', 'B-', 'C-', 'BC-'])
def test_cifar_kinds(kind):
    module = create_model(f'{kind}L16k4', num_classes=3)
    assert module.bottleneck == (4 if 'B' in kind else 0)
    assert module.compression == (0.5 if 'C' in kind else 1.0)
    assert module.stem_features == (8 if kind == 'BC-' else 16)
    assert module.block_sizes == ((2,) * 3 if 'B' in kind else (4,) * 3)
    images = jnp.zeros((2, 8, 12, 3))
    logits = jax.eval_shape(module.apply, init_variables(module, 0), images)
    assert logits.shape == (2, 3)


def test_init_variables_is_what_linen_makes():
    module = tiny(initializer='glorot_normal')
    ours = init_variables(module, 0, channels=1)
    theirs = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert jax.tree.map(np.shape, ours) == jax.tree.map(lambda x: x.shape, theirs)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {np.dtype('float32')}


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=pytest.mark.exhaustive if n else ())
        for n, name in enumerate(factory.INITIALIZERS)
    ],
)
def test_initial_spread(name):
    module = create_model(
        'densenet121', num_classes=300, block_sizes=(3, 3), initializer=name
    )
    ours = traverse_util.flatten_dict(init_variables(module, 3)['params'])
    for path, values in ours.items():
        rule = factory.INITIALIZERS[name]
        if path[0] == 'classifier':
            rule = (1 / 3, 'fan_in', 'uniform')  # torch's nn.Linear
        linens = jax.nn.initializers.variance_scaling(*rule)
        if path[-1] == 'kernel':
            leaf = jax.jit(linens, static_argnums=1)(jax.random.key(3), values.shape)
            assert ours[path].std() == pytest.approx(float(leaf.std()), rel=0.03)
            assert abs(ours[path].mean()) < 0.03 * leaf.std()
            # Tails tell a cut normal from a whole one.
            ratio = np.abs(ours[path]).max() / float(np.abs(leaf).max())
            assert 0.7 < ratio < 1.5
        else:
            np.testing.assert_array_equal(values, float(path[-1] == 'scale'))


def test_seeds_and_paths_differ():
    module = tiny()
    one, same, other = (init_variables(module, seed) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    block = one['params']['denseblock1']
    kernel = block['denselayer1']['conv2']['kernel']
    assert not np.array_equal(kernel, block['denselayer2']['conv2']['kernel'])
    elsewhere = other['params']['denseblock1']['denselayer1']['conv2']['kernel']
    assert not np.array_equal(kernel, elsewhere)


@pytest.mark.parametrize(
    ('variant', 'sizes'), [('densenet121', (1, 1, 1, 1)), ('BC-L100k12', (2, 2, 2))]
)
def test_smallest_image(variant, sizes):
    module = create_model(variant, num_classes=4, block_sizes=sizes)
    whole = create_model(variant, num_classes=4)
    assert module.smallest_image_size() == whole.smallest_image_size()
    size = module.smallest_image_size()
    shape = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x)[0],
        jnp.zeros((1, size, size + 9, 3)),
    )
    assert shape.shape == (1, 4)
    with pytest.raises(UserError, match=f'at least {size}x{size}'):
        jax.eval_shape(
            lambda x: module.init(jax.random.key(0), x),
            jnp.zeros((1, size + 9, size - 1, 3)),
        )


def test_features_head_and_pyramid():
    module = tiny()
    variables = init_variables(module, 0)
    images = jax.random.normal(jax.random.key(1), (2, 37, 50, 3))

    @jax.jit
    def parts(images):
        features = module.apply(variables, images, method='features')
        return {
            'logits': module.apply(variables, images),
            'features': features,
            'head': module.apply(variables, features, method='head'),
            'pyramid': module.apply(variables, images, method='pyramid'),
        }

    found = parts(images)
    features, pyramid = found['features'], found['pyramid']
    np.testing.assert_array_equal(found['head'], found['logits'])
    assert [level.shape for level in pyramid] == [(2, 10, 13, 16), (2, 5, 6, 16)]
    np.testing.assert_array_equal(pyramid[-1], features)
    bare = tiny(num_classes=0)
    pooled = compiled(bare, mutable=False)(variables, images)
    np.testing.assert_allclose(
        pooled, np.maximum(features, 0).mean((1, 2)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_paddings_differ_only_in_place():
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = init_variables(tiny(), 0)
    torch, same = (
        compiled(tiny(padding=name))(variables, images) for name in ('torch', 'same')
    )
    assert torch.shape == same.shape
    assert not np.allclose(torch, same)


@pytest.mark.slow
def test_same_padding_is_xlas():
    module = tiny(padding='same')
    variables = init_variables(module, 0)
    images = jax.random.normal(jax.random.key(1), (1, 33, 40, 3))
    kernel = variables['params']['conv0']['kernel']
    dimensions = ('NHWC', 'HWIO', 'NHWC')
    expected = jax.lax.conv_general_dilated(
        images, kernel, (2, 2), 'SAME', dimension_numbers=dimensions
    )
    _, inside = compiled(module, capture_intermediates=lambda m, _: m.name == 'conv0')(
        variables, images
    )
    (found,) = inside['intermediates']['conv0']['__call__']
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_dtype_bfloat16():
    module = tiny(dtype='bfloat16')
    variables = init_variables(module, 0)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    features = compiled(module, method='features')(variables, images)
    training = dict(train=True, mutable=['batch_stats'])
    logits, updated = compiled(module, **training)(variables, images)
    assert features.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    leaves = jax.tree.leaves((variables, updated))
    assert {leaf.dtype for leaf in leaves} == {np.dtype('float32')}
    exact = compiled(tiny(), **training)(variables, images)[0]
    assert not np.array_equal(logits, exact)
    np.testing.assert_allclose(logits, exact, atol=0.1)


@pytest.mark.slow
def test_dropout_acts_in_training_only():
    module = tiny(dropout_rate=0.5)
    variables = init_variables(module, 0)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))

    @jax.jit
    def run(key):
        return module.apply(
            variables,
            images,
            train=True,
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(key)},
        )[0]

    np.testing.assert_array_equal(run(1), run(1))
    assert not np.allclose(run(1), run(2))
    np.testing.assert_array_equal(
        compiled(module)(variables, images), compiled(tiny())(variables, images)
    )


@pytest.mark.parametrize('unbiased', slow_after(1, [True, False]))
def test_running_statistics(unbiased):
    module = layers.BatchNorm(momentum=0.9, unbiased=unbiased)
    # A mean far from zero: a one-pass variance in float32 would be lost here.
    x = 1000 + jax.random.normal(jax.random.key(0), (3, 4, 5, 6))
    variables = module.init(jax.random.key(0), x)
    training = dict(train=True, mutable=['batch_stats'])
    y, updated = compiled(module, **training)(variables, x)
    exact = np.asarray(x, np.float64).reshape(-1, 6)
    var = exact.var(0, ddof=int(unbiased))
    statistics = updated['batch_stats']
    np.testing.assert_allclose(statistics['mean'], 0.1 * exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics['var'], 0.9 + 0.1 * var, rtol=1e-5)
    normal = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(np.reshape(y, (-1, 6)), normal, atol=2e-4)


@pytest.mark.parametrize(
    ('variant', 'fields', 'message'),
    [
        ('densenet122', {}, 'use one of densenet121, densenet161'),
        ('L41k12', {}, 'use L40 or L43'),
        ('BC-L5k12', {}, 'use L10 or L16'),
        ('densenet121', {'depth': 3}, 'model.depth is not a field'),
        ('densenet121', {'growth_rate': 0}, 'model.growth_rate=0'),
        ('densenet121', {'compression': 1.5}, 'model.compression=1.5'),
        ('densenet121', {'dropout_rate': 1.0}, 'model.dropout_rate=1.0'),
        ('densenet121', {'drop_path_rate': 1.0}, 'model.drop_path_rate=1.0'),
        ('densenet121', {'block_sizes': (6, 0)}, 'model.block_sizes'),
        ('densenet121', {'stem': 'big'}, 'use imagenet, deep, cifar'),
        ('densenet121', {'dtype': 'int8'}, 'use float32, bfloat16'),
        ('densenet121', {'padding': 'valid'}, 'use torch, same'),
        ('densenet121', {'initializer': 'zeros'}, 'use he_fan_in'),
        ('densenet121', {'dtype': 'float64'}, 'JAX_ENABLE_X64'),
    ],
)
def test_bad_fields(variant, fields, message):
    with pytest.raises(UserError, match=message):
        create_model(variant, num_classes=2, **fields)
