"""ONNX files against the plain layers: all kinds of networks, halves and integers."""

import functools
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from scipy import special

from flax_densenet import create_model, init_variables
from flax_densenet.data import dataset
from flax_densenet.errors import UserError
from flax_densenet.export import formats, onnx_int8, onnx_network
from flax_densenet.weights import trained as trained_lib
from helpers.marks import exhaustive_after
from helpers.runs import tiny_trained

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NETWORKS = {
    'imagenet': ('densenet121', dict(block_sizes=(2, 2), growth_rate=8)),
    'same': ('densenet121', dict(block_sizes=(1, 1), growth_rate=8, padding='same')),
    'odd': ('densenet121', dict(block_sizes=(1, 1), growth_rate=5, compression=0.7)),
    'deep': ('densenet264d', dict(block_sizes=(1, 1), growth_rate=8)),
    'blur': ('densenetblur121d', dict(block_sizes=(1, 1), growth_rate=8)),
    'plain': ('L40k12', dict(block_sizes=(2, 1), growth_rate=8)),
    'cifar': ('BC-L100k12', dict(block_sizes=(1, 1, 2))),
    'rdnet': (
        'rdnet_tiny',
        dict(
            block_sizes=(1, 2),
            growth_rates=(8, 16),
            halvings=(1,),
            squeeze_blocks=(2,),
            stem_features=16,
        ),
    ),
    'rdnet_without_scale': (
        'rdnet_tiny',
        dict(
            block_sizes=(1, 1),
            growth_rates=(8, 8),
            halvings=(),
            squeeze_blocks=(1,),
            layer_scale=0,
        ),
    ),
}
QUICK = ('plain',)
SLOW = ('odd', 'same', 'deep', 'rdnet')


def make(kind, *, falling=False, channels=3, seed=0):
    """A network with all variables drawn, statistics as well."""
    variant, fields = NETWORKS[kind]
    module = create_model(variant, num_classes=5, **fields)
    flat = traverse_util.flatten_dict(init_variables(module, 0, channels=channels))
    rng = np.random.default_rng(seed)
    for path, value in flat.items():
        drawn = rng.standard_normal(value.shape)
        if path[-1] in ('var', 'scale', 'gamma'):
            drawn = rng.uniform(0.5, 1.5, value.shape)
            if path[-1] == 'scale' and falling:
                drawn *= rng.choice((-1, 0, 1, 1), value.shape)
        elif path[-1] in ('mean', 'bias'):
            drawn *= 0.2
        else:
            continue
        flat[path] = drawn.astype(np.float32)
    return module, traverse_util.unflatten_dict(flat)


def metadata_of(kind, **more):
    return {
        'model': {'variant': NETWORKS[kind][0]},
        'class_names': list('abcde'),
        'image_size': 32,
        'mean': MEAN,
        'std': STD,
        'data': {'resize': 'crop', 'crop_fraction': 0.875},
    } | more


@functools.cache
def make_images(count=4, size=32, channels=3, seed=3):
    """Smooth ones, as photographs are, that differ."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 5, 5, channels), np.uint8)
    wide = jax.image.resize(small.astype('f4'), (count, size, size, channels), 'cubic')
    return np.clip(np.asarray(wide), 0, 255).astype(np.uint8)


def logits_of(module, variables, images, metadata):
    plain, ways = module.plain(), {name: metadata[name] for name in ('mean', 'std')}

    @jax.jit
    def compute(variables, images):
        return plain.apply(variables, trained_lib.normalize(images, **ways))

    return np.asarray(compute(variables, images))


def run(made, images):
    onnx.checker.check_model(made, full_check=True)
    options = {'providers': ['CPUExecutionProvider']}
    session = onnxruntime.InferenceSession(made.SerializeToString(), **options)
    name = session.get_inputs()[0].name
    return session.run(None, {name: images})[0]


@pytest.mark.parametrize(
    'kind',
    [
        *QUICK,
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
        *exhaustive_after(0, sorted(NETWORKS.keys() - {*QUICK, *SLOW})),
    ],
)
def test_equal(kind):
    """Probabilities of images and logits of floats, of two sizes and batches."""
    module, variables = make(kind)
    metadata = metadata_of(kind)
    as_images = onnx_network.make(module, variables, metadata)
    as_floats = onnx_network.make(module, variables, metadata, inputs='normalized')
    for count, size in ((4, 32), (1, 45)):
        images = make_images(count, size)
        logits = logits_of(module, variables, images, metadata)
        assert logits.std() > 0.05
        found = run(as_images, images)
        assert np.abs(found - special.softmax(logits, axis=-1)).max() < 2e-6
        given = (images / 255 - MEAN) / np.array(STD)
        given = given.transpose(0, 3, 1, 2).astype(np.float32)
        found = run(as_floats, given)
        assert np.abs(found - logits).max() < 5e-6 * max(1, np.abs(logits).max())


@pytest.mark.slow
def test_gray_and_several_labels():
    module, variables = make('cifar', channels=1)
    metadata = metadata_of('cifar', mean=[0.3], std=[0.2], multi_label=True)
    images = make_images(channels=1)
    found = run(onnx_network.make(module, variables, metadata), images)
    logits = logits_of(module, variables, images, metadata)
    assert np.abs(found - special.expit(logits)).max() < 2e-6


def test_what_the_file_says():
    module, variables = make('imagenet')
    made = onnx_network.make(module, variables, metadata_of('imagenet'))
    said = {entry.key: entry.value for entry in made.metadata_props}
    assert json.loads(said['labels']) == list('abcde')
    assert said['image_size'] == '32' and said['resize'] == 'crop'
    assert said['crop_fraction'] == '0.875' and said['interpolation'] == 'bilinear'
    assert json.loads(said['mean']) == MEAN and said['multi_label'] == 'false'
    assert made.opset_import[0].version == 17


def test_batch_norm_is_folded():
    """Left are those in front of a ReLU: a layer's first, of transitions, the last."""
    module, variables = make('imagenet')
    made = onnx_network.make(module, variables, metadata_of('imagenet'))
    kinds = [node.op_type for node in made.graph.node]
    assert kinds.count('BatchNormalization') == 4 + 1 + 1
    # The transition pools before it multiplies.
    assert kinds[kinds.index('AveragePool') + 1] == 'Conv'


@pytest.mark.parametrize('precision, bound', [('float16', 1e-3), ('bfloat16', 1e-2)])
@pytest.mark.parametrize('kind', ['imagenet', 'rdnet'])
def test_half(kind, precision, bound):
    module, variables = make(kind)
    whole = onnx_network.make(module, variables, metadata_of(kind))
    made = onnx_network.make(module, variables, metadata_of(kind), precision=precision)
    assert made.ByteSize() < 0.85 * whole.ByteSize()
    images = make_images()
    away = np.abs(run(made, images) - run(whole, images)).max()
    assert 1e-7 < away < bound


@pytest.mark.slow
@pytest.mark.parametrize('falling', [False, True])
@pytest.mark.parametrize(
    'kind', exhaustive_after(1, ['deep', 'imagenet', 'same', 'blur', 'cifar'])
)
def test_integers(kind, falling):
    """Images differ from each other as they do in floats."""
    module, variables = make(kind, falling=falling)
    metadata = metadata_of(kind)
    images = make_images(24)
    batches = [images[:16], images[16:]]
    logits = logits_of(module, variables, images, metadata)
    probabilities = special.softmax(logits, axis=-1)
    for inputs in onnx_network.INPUTS:
        made = onnx_int8.make(module, variables, metadata, batches, inputs=inputs)
        # Convolutions are of integers, but for the blur, which is each map by itself.
        dims = [(w.data_type, tuple(w.dims)) for w in made.graph.initializer]
        kinds = {kind for kind, shape in dims if len(shape) == 4 and min(shape[:2]) > 1}
        assert kinds == {onnx.TensorProto.INT8}
        if inputs == 'normalized':
            given = (images / 255 - MEAN) / np.array(STD)
            given = given.transpose(0, 3, 1, 2).astype(np.float32)
            found, wanted = run(made, given), logits
        else:
            found, wanted = run(made, images), probabilities
        differ = found - found.mean(0), wanted - wanted.mean(0)
        assert 0.99 < np.corrcoef(*map(np.ravel, differ))[0, 1] < 0.9999999
        shift = np.abs(found.mean(0) - wanted.mean(0)).max()
        assert shift < 0.01 * np.ptp(wanted)


def test_integers_need_a_bottleneck():
    module, variables = make('plain')
    with pytest.raises(UserError, match='L40k12 has no bottleneck; use float16'):
        onnx_int8.make(module, variables, metadata_of('plain'), [])


def test_values_too_large_for_float16(tmp_path):
    source = dataset.load_source('digits', image_size=16)
    trained = tiny_trained(source)
    trained.variables['params']['classifier']['kernel'] *= 1e6
    path = str(tmp_path / 'x.safetensors')
    options = formats.Options(precision='float16')
    with pytest.raises(UserError, match='--precision=float16: classifier.weight'):
        formats.save(path, trained, 'safetensors', options)
