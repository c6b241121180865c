"""Converts array names and layouts of RDNet between timm and this package.

    dense_stages.1.2.dense_block0.layers.layers.2.weight    block 2, layer 1, `conv2`
    dense_stages.1.0.bias                                   the norm before it

Files from the authors of the paper have `stem.stem.` instead of `stem.`.
"""

import re
from typing import Any

import numpy as np

from flax_densenet.errors import UserError

EPSILON = 1e-6  # of layer norm in timm; not stored in files
_MARK = re.compile(r'(.*?)dense_stages\.0\.0\.dense_block0\.layers\.layers\.0\.weight')
_LAYER = re.compile(
    r'dense_stages\.(\d{1,4})\.([02])\.dense_block(\d{1,4})\.(gamma|layers\.layers\..+)'
)
_TRANSITION = re.compile(r'dense_stages\.(\d{1,4})\.([01])')
_OUR_LAYER = re.compile(r'denseblock(\d{1,4})/denselayer(\d{1,4})(?:/(.+))?')
_OUR_TRANSITION = re.compile(r'transition(\d{1,4})/(norm|conv)')
_INSIDE = {
    'layers.layers.0': 'conv1',
    'layers.layers.1': 'norm1',
    'layers.layers.2': 'conv2',
    'layers.layers.4': 'conv3',
    'layers.layers.5.fc': 'gate',
}
_ENDS = {
    'stem.0': 'conv0',
    'stem.1': 'norm0',
    'head.norm': 'norm',
    'head.fc': 'classifier',
}
_LAYOUTS = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}  # O, I, H, W -> H, W, I, O
_LAYOUTS_BACK = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


def find_prefix(arrays) -> str | None:
    """The prefix of timm's names, often ''; None if this is not an RDNet."""
    return next((found[1] for key in arrays if (found := _MARK.fullmatch(key))), None)


def is_rdnet(arrays) -> bool:
    """Whether arrays with our names belong to an RDNet."""
    names = ('conv3/kernel', 'conv3/bias', 'gamma')
    return any(f'params/denseblock1/denselayer1/{name}' in arrays for name in names)


def rename(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Renames and transposes timm's arrays; unknown ones keep their names.

    Removes the arrays from `arrays`, so that none is in memory twice.
    """
    renamed = {}
    for key in list(arrays):
        array = arrays.pop(key)
        name = key.removeprefix(prefix).replace('stem.stem.', 'stem.')
        target = _our_name(name, array.ndim)
        if target is None or array.ndim not in _LAYOUTS:
            renamed[key] = array
        else:
            layout = _LAYOUTS[array.ndim]
            renamed[target] = np.ascontiguousarray(array.transpose(layout))
    return renamed


def _our_name(name, rank):
    if name.endswith('.gamma'):
        place, leaf = name, ''
    else:
        place, _, leaf = name.rpartition('.')
        leaf = {'weight': '/scale' if rank == 1 else '/kernel', 'bias': '/bias'}.get(
            leaf
        )
        if leaf is None:
            return None
    if place in _ENDS:
        return f'params/{_ENDS[place]}{leaf}'
    if match := _LAYER.fullmatch(place):
        stage, position, layer = map(int, match.groups()[:3])
        inside = _INSIDE.get(match[4], 'gamma' if match[4] == 'gamma' else None)
        if inside and position == (2 if stage else 0):
            place = f'denseblock{stage + 1}/denselayer{layer + 1}/{inside}'
            return f'params/{place}{leaf}'
    elif (match := _TRANSITION.fullmatch(place)) and int(match[1]):
        return (
            f'params/transition{int(match[1])}/{("norm", "conv")[int(match[2])]}{leaf}'
        )
    return None


def torch_key(name: str) -> str:
    """Converts our name of an array to timm's key; other names do not change."""
    place = name.removeprefix('params/')
    leaf = ''
    if not place.endswith('/gamma'):
        place, _, leaf = place.rpartition('/')
        leaf = {'kernel': '.weight', 'scale': '.weight', 'bias': '.bias'}.get(leaf, '')
        if not leaf:
            return name
    ends = {ours: theirs for theirs, ours in _ENDS.items()}
    if place in ends:
        return ends[place] + leaf
    if match := _OUR_TRANSITION.fullmatch(place):
        return f'dense_stages.{match[1]}.{("norm", "conv").index(match[2])}{leaf}'
    match = _OUR_LAYER.fullmatch(place)
    inside = {ours: theirs for theirs, ours in _INSIDE.items()} | {'gamma': 'gamma'}
    if not match or match[3] not in inside:
        return name
    stage, layer = int(match[1]) - 1, int(match[2]) - 1
    position = 2 if stage else 0
    return (
        f'dense_stages.{stage}.{position}.dense_block{layer}.{inside[match[3]]}{leaf}'
    )


def torch_arrays(module, flat: dict[str, Any]) -> dict[str, np.ndarray]:
    """The float32 `state_dict` for timm.

    Args:
      flat: `{'params/conv0/kernel': array, ...}`.

    Raises:
      UserError: epsilon differs from timm's, so timm would compute something else.
    """
    if module.epsilon != EPSILON:
        raise UserError(
            f"model.epsilon={module.epsilon:g}: timm's RDNet has {EPSILON:g}, so it "
            'would compute something else from these weights; keep the workdir'
        )
    renamed = {}
    for name, array in flat.items():
        array = np.asarray(array, np.float32)
        layout = _LAYOUTS_BACK[array.ndim]
        renamed[torch_key(name)] = np.ascontiguousarray(array.transpose(layout))
    return dict(sorted(renamed.items()))


def find_fields(path: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of `RDNet` that the shapes of its arrays determine.

    Args:
      path: the file, for error messages.
      arrays: `{our name: array}`.

    Raises:
      UserError: blocks, layers or kernels are missing.
    """
    layers: dict[int, int] = {}
    squeezed = set()
    for name in arrays:
        if match := _OUR_LAYER.fullmatch(name.removeprefix('params/')):
            block, layer = int(match[1]), int(match[2])
            layers[block] = max(layers.get(block, 0), layer)
            if match[3] == 'gate/kernel':
                squeezed.add(block)
    # At least five arrays per layer; otherwise one name could claim a million layers.
    blocks = [layers.get(number, 0) for number in range(1, len(layers) + 1)]
    if not all(blocks) or 5 * sum(blocks) > len(arrays):
        raise UserError(f'{path} holds an incomplete RDNet: blocks of {blocks} layers')
    first = _kernel(path, arrays, 'conv0')
    growth = [
        _kernel(path, arrays, f'denseblock{number}/denselayer1/conv3')[3]
        for number in range(1, len(blocks) + 1)
    ]
    transitions = [
        _kernel(path, arrays, f'transition{number}') for number in range(1, len(blocks))
    ]
    inner = _kernel(path, arrays, 'denseblock1/denselayer1/conv2')
    return dict(
        growth_rates=tuple(growth),
        block_sizes=tuple(blocks),
        halvings=tuple(n for n, k in enumerate(transitions, start=1) if k[0] == 2),
        squeeze_blocks=tuple(sorted(squeezed)),
        bottleneck=-(-inner[3] // inner[2]),
        compression=_find_compression(transitions),
        patch_size=first[0],
        stem_features=first[3],
    )


def _kernel(path, arrays, place):
    """The shape of the kernel of a convolution."""
    name = f'params/{place}{"/conv" if place.startswith("transition") else ""}/kernel'
    kernel = arrays.get(name)
    if kernel is None or kernel.ndim != 4 or not kernel.size:
        raise UserError(
            f'{path} holds an incomplete RDNet: {torch_key(name)} is missing'
        )
    return kernel.shape


def _find_compression(transitions):
    """The share of channels that all transitions keep, rounded to multiples of 8."""
    pairs = [(shape[2], shape[3]) for shape in transitions]
    for guess in (0.5, 1.0, *(n / 20 for n in range(1, 20))):
        if all(int(before * guess / 8) * 8 == after for before, after in pairs):
            return guess
    return 0.5
