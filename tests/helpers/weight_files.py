"""Small models as weight files."""

import numpy as np
from flax import traverse_util

from flax_densenet import create_model, init_variables
from flax_densenet.export import formats
from flax_densenet.weights import trained as trained_lib

TINY = dict(growth_rate=4, block_sizes=(2, 3), stem_features=8, bottleneck=2)


def tiny(num_classes=5, channels=3, **fields):
    """A small DenseNet with the ImageNet stem and random variables."""
    module = create_model('densenet121', num_classes=num_classes, **TINY | fields)
    rng = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(init_variables(module, 0, channels=channels))
    for path, leaf in flat.items():
        noise = rng.uniform(0.5, 1.5, leaf.shape)
        flat[path] = (leaf + 0.1 * noise).astype(np.float32)
    return module, traverse_util.unflatten_dict(flat)


def trained_of(module, variables, **metadata):
    names = [f'class {n}' for n in range(module.num_classes)]
    known = module.architecture_fields
    fields = {name: getattr(module, name) for name in known}
    fields |= {'variant': 'densenet121', 'epsilon': module.epsilon}
    metadata = {
        'model': fields,
        'class_names': names,
        'image_size': 48,
        'mean': [0.5] * 3,
        'std': [0.25] * 3,
        'data': {'mean': [0.5] * 3, 'std': [0.25] * 3, 'resize': 'crop'},
    } | metadata
    return trained_lib.Trained(module, variables, metadata, {}, 1, None)


def flat(variables):
    return traverse_util.flatten_dict(variables, sep='/')


def assert_same(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def write_safetensors(path, arrays, metadata=None):
    from safetensors import numpy as safetensors

    safetensors.save_file(arrays, str(path), metadata)
    return str(path)


def state_dict(**fields):
    return formats.torch_arrays(*tiny(**fields))
