"""Array names and layouts: torchvision's to ours and back.

features.denseblock1.denselayer1.norm1.weight    torchvision
params/denseblock1/denselayer1/norm1/scale       ours
"""

import math
import re

import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.weights import rdnet_names

_HEADS = ('classifier', 'classifier.0', 'classifier.1', 'fc', 'head', 'head.fc')
_OLD_NAMES = re.compile(r'(denselayer\d+\.(?:norm|conv))\.(\d)(?=\.)')
_LEAVES = {
    'weight': {
        4: ('params', 'kernel'),
        2: ('params', 'kernel'),
        1: ('params', 'scale'),
    },
    'bias': {1: ('params', 'bias')},
    'running_mean': {1: ('batch_stats', 'mean')},
    'running_var': {1: ('batch_stats', 'var')},
}
_TORCH_LEAVES = {ours: k for k, ranks in _LEAVES.items() for ours in ranks.values()}


def rename(arrays):
    """Renames and transposes torchvision's arrays; unknown ones keep their names.

    Takes the arrays out of `arrays`, so that none is in memory twice.

    Returns:
      The arrays by our names, and facts that the file has besides them.
    """
    if (prefix := rdnet_names.find_prefix(arrays)) is not None:
        return rdnet_names.rename(arrays, prefix), {}
    prefix = next(
        (k[: -len('features.conv0.weight')] for k in arrays
         if k.endswith('features.conv0.weight')),
        '',
    )  # fmt: skip
    renamed, extra, heads = {}, {}, []
    for key in list(arrays):
        array = arrays.pop(key)
        name = _OLD_NAMES.sub(r'\1\2', key.removeprefix(prefix))
        place, _, leaf = name.rpartition('.')
        if leaf == 'num_batches_tracked':
            continue
        if name == 'op_threshs':  # torchxrayvision's operating points
            extra['operating_points'] = [
                None if math.isnan(x) else x for x in np.ravel(array).tolist()
            ]
            continue
        target = _LEAVES.get(leaf, {}).get(array.ndim)
        if place in _HEADS and target:
            heads.append(place)
            place = 'classifier'
        elif not name.startswith('features.') or not target:
            renamed[key] = array
            continue
        collection, leaf = target
        parts = place.removeprefix('features.').split('.')
        renamed['/'.join((collection, *parts, leaf))] = from_torch_layout(array)
    if len(set(heads)) > 1:
        raise UserError(f'the weights have two heads: {", ".join(sorted(set(heads)))}')
    return renamed, extra


def torch_key(name: str) -> str:
    """Our name of an array to torchvision's key; other names stay as they are."""
    collection, *place, leaf = name.split('/') if name.count('/') else ('', name)
    if (collection, leaf) not in _TORCH_LEAVES:
        return name
    prefix = [] if place == ['classifier'] else ['features']
    return '.'.join([*prefix, *place, _TORCH_LEAVES[collection, leaf]])


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """O, I, H, W -> H, W, I, O; O, I -> I, O; a contiguous array."""
    return np.ascontiguousarray(
        array.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])
    )


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """H, W, I, O -> O, I, H, W; I, O -> O, I; a contiguous array."""
    return np.ascontiguousarray(
        array.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim])
    )
