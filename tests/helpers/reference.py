"""The weights of the reference outputs, by a formula, and their names in PyTorch."""

import numpy as np
from flax import traverse_util

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
    """The weights that produced the reference outputs, in our tree."""
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
