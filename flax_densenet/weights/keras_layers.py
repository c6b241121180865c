"""Matches the layers in Keras files with the submodules of a DenseNet.

Layers are recognized by their names in keras.applications and keras-hub. If Keras
numbered them automatically, they are recognized by the order of the kernels.

>>> from flax_densenet.weights import keras_layers
>>> keras_layers.module_of('conv2_block1_0_bn')
'denseblock1/denselayer1/norm1'
>>> keras_layers.module_of('stack1_block1_1_bn')
'denseblock1/denselayer1/norm1'
"""

import dataclasses
import itertools
import re

import numpy as np

# keras.applications counts the stem as the first of five stages; keras-hub counts dense
# blocks as we do.
_DENSE_LAYER = re.compile(r'(conv|stack)(\d+)_block(\d+)_(\d_(?:bn|conv))')
_TRANSITION = re.compile(r'(pool|transition)(\d+)_(bn|conv)')
_PARTS = {
    'conv': {'0_bn': 'norm1', '1_conv': 'conv1', '1_bn': 'norm2', '2_conv': 'conv2'},
    'stack': {'1_bn': 'norm1', '1_conv': 'conv1', '2_bn': 'norm2', '2_conv': 'conv2'},
}
_OTHERS = {
    'conv1_conv': 'conv0',
    'conv1_bn': 'norm0',
    'bn': 'norm5',
    'predictions': 'classifier',
    'fc1000': 'classifier',
}
_LEAVES = {
    'gamma': ('params', 'scale'),
    'beta': ('params', 'bias'),
    'moving_mean': ('batch_stats', 'mean'),
    'moving_variance': ('batch_stats', 'var'),
    'kernel': ('params', 'kernel'),
    'bias': ('params', 'bias'),
}
# The variables of a layer, in the order of Keras.
NORM = ('gamma', 'beta', 'moving_mean', 'moving_variance')
WEIGHTS = ('kernel', 'bias')


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer in a file.

    Attributes:
      place: path in the file.
      name: name of the layer.
      keys: `{role: path of the array}`. A role is the name of a variable in Keras, such
        as `kernel` or `moving_mean`, or another name that the file uses.
    """

    place: str
    name: str
    keys: dict[str, str]

    @property
    def scope(self) -> str:
        """The model that contains the layer; '' in files from before Keras 3."""
        parts = self.place.split('/')
        return '/'.join(parts[:-2]) if parts[-1] == 'vars' else ''


def module_of(name: str) -> str | None:
    """The path of our submodule for a layer name in Keras; None if there is none."""
    # Older files call the stem `conv1/conv`. Models come before the last slash.
    name = re.sub(r'(?:^|.*/)conv1/(conv|bn)$', r'conv1_\1', name).rpartition('/')[2]
    if match := _DENSE_LAYER.fullmatch(name):
        kind, block, layer, part = match.groups()
        part = _PARTS[kind].get(part)
        block = int(block) - (kind == 'conv')
        return part and f'denseblock{block}/denselayer{layer}/{part}'
    if match := _TRANSITION.fullmatch(name):
        kind, number, part = match.groups()
        part = {'bn': 'norm', 'conv': 'conv'}[part]
        return f'transition{int(number) - (kind == "pool")}/{part}'
    return _OTHERS.get(name)


def is_of_hub(name: str) -> bool:
    """Whether a layer name is from keras-hub rather than keras.applications."""
    return bool(re.match(r'(.*/)?(stack\d+_block|transition\d+_)', name))


def path_of(module: str, role: str) -> str | None:
    """`params/conv0/kernel` for `conv0`, `kernel`; None for an unknown role."""
    if role not in _LEAVES:
        return None
    collection, leaf = _LEAVES[role]
    return f'{collection}/{module}/{leaf}'


def list_layers(arrays: dict[str, np.ndarray], groups) -> list[Layer]:
    """The layers of a file, in the order of the network if the file tells it.

    Args:
      arrays: `{path in the file: array}`.
      groups: `{path: h5py.Group}`; `''` is the file itself.
    """
    places: dict[str, list[str]] = {}
    for key in arrays:
        place, _, leaf = key.rpartition('/')
        places.setdefault(place, []).append(leaf)
    layers = []
    for place, leaves in places.items():
        name, roles = place, [leaf.removesuffix(':0') for leaf in leaves]
        if place.endswith('vars') and all(leaf.isdigit() for leaf in leaves):
            # Keras 3 numbers the variables; since 3.6 the group has the layer's name.
            leaves = sorted(leaves, key=int)
            roles = _roles([arrays[f'{place}/{leaf}'].ndim for leaf in leaves])
            roles = roles or leaves
            name = groups[place].attrs.get('name', place.removesuffix('/vars'))
        keys = {r: f'{place}/{leaf}' for r, leaf in zip(roles, leaves, strict=True)}
        layers.append(Layer(place, str(name), keys))
    return sorted(layers, key=_order(groups))


def _roles(dims):
    """The roles of numbered variables, by their ranks; None if none fit."""
    if dims == [1, 1, 1, 1]:
        return NORM
    if dims in ([4], [2], [4, 1], [2, 1]):
        return WEIGHTS[: len(dims)]
    return None


def _order(groups):
    """Sort key: the file's list of layers, then numbers (conv2d_2 before conv2d_10)."""
    root = 'model_weights' if 'model_weights' in groups else ''
    names = _attribute(groups[root], 'layer_names')
    position = {f'{root}/{n}' if root else n: i for i, n in enumerate(names)}

    def key(layer):
        parts = layer.place.split('/')
        starts = ('/'.join(parts[:n]) for n in range(1, len(parts) + 1))
        listed = [position[start] for start in starts if start in position]
        split = re.split(r'(\d+)', layer.place)
        numbers = [int(s) if n % 2 else s for n, s in enumerate(split)]
        return min(listed, default=len(position)), numbers

    return key


def _attribute(group, name):
    """A list of names; Keras splits lists above 64 KB into name0, name1, ..."""
    numbered = (f'{name}{number}' for number in itertools.count())
    chunks = itertools.takewhile(lambda chunk: chunk in group.attrs, numbered)
    chunks = [name] if name in group.attrs else list(chunks)
    values = (value for chunk in chunks for value in group.attrs[chunk])
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values]


def find_modules(layers: list[Layer], arrays: dict[str, np.ndarray]):
    """Our submodule for each layer; None for layers that DenseNet does not have.

    The only Dense layer is the classifier, whatever its name.
    """
    modules = [module_of(layer.name) for layer in layers]
    if not any(module and module.startswith('denseblock') for module in modules):
        modules = _modules_by_order(layers, arrays)
    dense = [i for i, layer in enumerate(layers) if len(_kernel(layer, arrays)) == 2]
    if len(dense) == 1:
        modules[dense[0]] = 'classifier'
    return modules


def _kernel(layer, arrays):
    return arrays[layer.keys['kernel']].shape if 'kernel' in layer.keys else ()


def _modules_by_order(layers, arrays):
    """1x1 then 3x3 is a dense layer, a lone 1x1 a transition; otherwise all None."""
    by_layer = [None] * len(layers)
    convs = [i for i, layer in enumerate(layers) if len(_kernel(layer, arrays)) == 4]
    # A batch norm in the head of an enclosing model comes first in its file.
    inside = layers[convs[0]].scope if convs else ''
    convs = [i for i in convs if layers[i].scope == inside]
    norms = [
        i
        for i, layer in enumerate(layers)
        if layer.scope == inside and 'moving_mean' in layer.keys
    ]
    names = _names_by_size([_kernel(layers[i], arrays)[:2] for i in convs])
    if names is None or len(norms) < len(names[1]):
        return by_layer
    for places, modules in zip((convs, norms), names, strict=True):
        for place, module in zip(places, modules, strict=False):
            by_layer[place] = module
    return by_layer


def _names_by_size(sizes):
    """The submodules of all convolutions and norms; None for other networks."""
    convs, norms, block, number = ['conv0'], ['norm0'], 1, 0
    while len(convs) < len(sizes):
        following = sizes[len(convs) : len(convs) + 2]
        if following == [(1, 1), (3, 3)]:
            number += 1
            prefix = f'denseblock{block}/denselayer{number}'
            convs += [f'{prefix}/conv1', f'{prefix}/conv2']
            norms += [f'{prefix}/norm1', f'{prefix}/norm2']
        elif following[0] == (1, 1):
            convs.append(f'transition{block}/conv')
            norms.append(f'transition{block}/norm')
            block, number = block + 1, 0
        else:
            return None
    return (convs, [*norms, 'norm5']) if number else None
