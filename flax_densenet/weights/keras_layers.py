"""Layers as Keras' files list them -> the modules of a DenseNet.

Layers are known by their names, those of keras.applications and of keras-hub; where
Keras numbered them automatically, by the order of the kernels.

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

# The first part of a layer's name: keras.applications counts the stem as the first of
# five stages, keras-hub counts dense blocks as we do.
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
# The variables of a layer in Keras' order.
NORM = ('gamma', 'beta', 'moving_mean', 'moving_variance')
WEIGHTS = ('kernel', 'bias')


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: where in the file, its name, and `{Keras' role: path of the array}`.

    A role is the name of a variable in Keras, such as `kernel` or `moving_mean`, or
    what the file calls it where it is none that we know.
    """

    place: str
    name: str
    keys: dict[str, str]

    @property
    def scope(self) -> str:
        """The model that the layer is in; '' for all in files of before Keras 3."""
        parts = self.place.split('/')
        return '/'.join(parts[:-2]) if parts[-1] == 'vars' else ''


def module_of(name: str) -> str | None:
    """A layer's name in Keras -> the path of our module, None where it has none."""
    # Older files call the stem `conv1/conv`; before the last slash stand models.
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
    """Whether a layer's name is one that keras-hub gives and keras.applications not."""
    return bool(re.match(r'(.*/)?(stack\d+_block|transition\d+_)', name))


def path_of(module: str, role: str) -> str | None:
    """('conv0', 'kernel') -> 'params/conv0/kernel'; None for a role we do not have."""
    if role not in _LEAVES:
        return None
    collection, leaf = _LEAVES[role]
    return f'{collection}/{module}/{leaf}'


def list_layers(arrays: dict[str, np.ndarray], groups) -> list[Layer]:
    """Layers of a file, in the order of the network as far as the file tells it.

    Args:
      arrays: by their paths in the file.
      groups: all `h5py.Group` of the file, by their paths; `''` is the file.
    """
    places = {}
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
    """Names for numbered variables, by their shapes; None where none fits."""
    if dims == [1, 1, 1, 1]:
        return NORM
    if dims in ([4], [2], [4, 1], [2, 1]):
        return WEIGHTS[: len(dims)]
    return None


def _order(groups):
    """Sort key: as the file lists its layers, then by number: conv2d_2, conv2d_10."""
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
    """A list of names; Keras cuts one above 64 KB into name0, name1, ..."""
    numbered = (f'{name}{number}' for number in itertools.count())
    chunks = itertools.takewhile(lambda chunk: chunk in group.attrs, numbered)
    chunks = [name] if name in group.attrs else list(chunks)
    values = (value for chunk in chunks for value in group.attrs[chunk])
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values]


def find_modules(layers: list[Layer], arrays: dict[str, np.ndarray]):
    """Our module for each layer, None for those that DenseNet does not have.

    A Dense layer that is the only one is the classifier, whatever its name is.
    """
    found = [module_of(layer.name) for layer in layers]
    if not any(module and module.startswith('denseblock') for module in found):
        found = _modules_by_order(layers, arrays)
    dense = [i for i, layer in enumerate(layers) if len(_kernel(layer, arrays)) == 2]
    if len(dense) == 1:
        found[dense[0]] = 'classifier'
    return found


def _kernel(layer, arrays):
    return arrays[layer.keys['kernel']].shape if 'kernel' in layer.keys else ()


def _modules_by_order(layers, arrays):
    """1x1 then 3x3 is a dense layer, 1x1 alone a transition; all None otherwise."""
    found = [None] * len(layers)
    convs = [i for i, layer in enumerate(layers) if len(_kernel(layer, arrays)) == 4]
    # A batch norm in the head of a model around the network comes first in its file.
    inside = layers[convs[0]].scope if convs else ''
    convs = [i for i in convs if layers[i].scope == inside]
    norms = [
        i
        for i, layer in enumerate(layers)
        if layer.scope == inside and 'moving_mean' in layer.keys
    ]
    names = _names_by_size([_kernel(layers[i], arrays)[:2] for i in convs])
    if names is None or len(norms) < len(names[1]):
        return found
    for places, modules in zip((convs, norms), names, strict=True):
        for place, module in zip(places, modules, strict=False):
            found[place] = module
    return found


def _names_by_size(sizes):
    """Modules of all convolutions and of all norms; None for another network."""
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
