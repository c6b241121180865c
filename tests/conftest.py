"""Four fake CPU devices, strict JAX, and the formula weights of the references."""

import os
import pathlib
import signal
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=4'
    # Compiling takes most of the tests' time; their arrays are small.
    ' --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
)

# Many tests compile the same small programs; the workers share what was compiled, and
# with a folder of one's own (make has one) so do all runs.
if 'FLAX_DENSENET_TEST_CACHE' not in os.environ:
    _cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ['FLAX_DENSENET_TEST_CACHE'] = _cache.name
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ['FLAX_DENSENET_TEST_CACHE']
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

# What a shell starts in the background ignores Ctrl-C, and so would the programs that
# tests start to interrupt them.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from configs import base
from flax_densenet import create_model, init_variables
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.report import plots
from flax_densenet.weights import trained as trained_lib

jax.config.update('jax_numpy_rank_promotion', 'raise')

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = pathlib.Path(os.environ.get('FLAX_DENSENET_SHARED', ROOT.parent / 'shared'))


@pytest.fixture(autouse=True)
def _without_pictures(request, monkeypatch):
    """Drawing takes a third of a small run; those marked `drawn` do it."""
    if request.node.get_closest_marker('drawn'):
        return

    def save_samples(workdir, *_, **__):
        Image.new('RGB', (1, 1)).save(os.path.join(workdir, 'samples.png'))

    monkeypatch.setattr(plots, 'save_samples', save_samples)
    monkeypatch.setattr(plots, 'save_curves', lambda workdir, records: None)


def shared(path):
    """A file or folder beside the repository; the test is skipped where absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f'{path} is not here (FLAX_DENSENET_SHARED names its folder)')
    return found


_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}


def torch_key(path):
    """('denseblock1', 'denselayer1', 'conv1', 'kernel') -> torchvision's key."""
    prefix = '' if path[0] == 'classifier' else 'features.'
    return prefix + '.'.join((*path[:-1], _LEAVES[path[-1]]))


def from_torch_layout(array):
    """O, I, H, W -> H, W, I, O; O, I -> I, O."""
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])


def _formula(key, shape, generator):
    if key.endswith('running_mean'):
        return 0.1 * generator.standard_normal(shape)
    if key.endswith('running_var'):
        return generator.uniform(0.5, 1.5, shape)
    if len(shape) == 4:
        return generator.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    if len(shape) == 2:
        return generator.standard_normal(shape) * np.sqrt(1 / shape[1])
    if 'norm' in key and key.endswith('weight'):
        return generator.uniform(0.5, 1.5, shape)
    return 0.1 * generator.standard_normal(shape)


def formula_variables(variables):
    """The weights that the reference outputs were made with, in our tree."""
    by_key, made = {}, {'params': {}, 'batch_stats': {}}
    for collection in made:
        for path, leaf in traverse_util.flatten_dict(variables[collection]).items():
            by_key[torch_key(path)] = (collection, path, leaf.shape)
    for place, key in enumerate(sorted(by_key)):
        collection, path, shape = by_key[key]
        torch_shape = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(shape)]
        values = _formula(
            key, tuple(shape[i] for i in torch_shape), np.random.default_rng(place)
        )
        made[collection][path] = from_torch_layout(values.astype(np.float32))
    return {name: traverse_util.unflatten_dict(tree) for name, tree in made.items()}


def write_images(root, counts, *, size=(40, 30), seed=0):
    """JPEGs in `root/CLASS/N.jpg`, `counts` of each class; a class has its color."""
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(0, 80, (size[1], size[0], 3), np.uint8)
            pixels[..., number % 3] += 150
            Image.fromarray(pixels).save(root / name / f'{index:03}.jpg')
    return root


def plain(config):
    """A config as `fit` takes it: dicts."""
    return {
        name: value.to_dict() if hasattr(value, 'to_dict') else value
        for name, value in config.items()
    }


def tiny_config(**overrides):
    """configs/base.py with a network that compiles in seconds, on 8x8 digits."""
    config = base.get_config()
    config.model.variant = 'BC-L10k4'
    config.data.image_size = 8
    config.data.batch_size = 128
    config.optimizer.learning_rate = 3e-3
    config.train.epochs = 2
    config.train.tensorboard = False
    config.train.report = False
    config.update_from_flattened_dict(overrides)
    return plain(config)


def tiny_trained(source, *, seed=0, **metadata):
    """An `trained.Trained` with first parameters, as if trained on `source`."""
    mesh = mesh_lib.make_mesh()
    module = create_model('BC-L10k4', num_classes=len(source.class_names))
    return trained_lib.Trained(
        module=module,
        variables=mesh_lib.replicate(init_variables(module, seed), mesh),
        metadata={
            'model': {'variant': 'BC-L10k4'},
            'class_names': list(source.class_names),
            'image_size': source.train.image_size,
            'mean': [0.5, 0.4, 0.3],
            'std': [0.2, 0.25, 0.3],
            'data': {'source': source.name},
            'multi_label': source.multi_label,
            'epoch': 3,
        }
        | metadata,
        metrics={},
        step=7,
        mesh=mesh,
    )


def make_weights(path, *, classes=3, scale=1.0, **metadata):
    """A file of ours with a network that nobody trained."""
    from flax_densenet.export import formats

    module = create_model('BC-L10k4', num_classes=classes)
    variables = jax.tree.map(lambda x: x * scale, init_variables(module, 0))
    metadata = {
        'model': {'variant': 'BC-L10k4'},
        'class_names': [f'class {n}' for n in range(classes)],
        'image_size': 12,
        'mean': [0.5] * 3,
        'std': [0.2] * 3,
        'data': {'mean': [0.5] * 3, 'std': [0.2] * 3, 'channels': 3},
    } | metadata
    mesh = mesh_lib.make_mesh()
    trained = trained_lib.Trained(module, variables, metadata, {}, None, mesh)
    formats.save(str(path), trained, 'safetensors')
    return str(path)
