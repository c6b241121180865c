"""Finds the network in a Keras configuration and checks that it is a DenseNet of ours.

Arrays do not show strides, activations, the kind of pooling or the order of layers. A
configuration does, and whatever it states is either computed or refused.

>>> layer = {'class_name': 'Activation', 'config': {'name': 'a', 'activation': 'relu'}}
>>> flatten({'layers': [layer]})
[('Activation', {'name': 'a', 'activation': 'relu', 'inputs': [], 'maps': None})]
"""

import dataclasses
from typing import Any

from flax_densenet.errors import UserError
from flax_densenet.settings import sizes
from flax_densenet.weights import keras_head

SEVERAL_OUTPUTS = 'model with several outputs'
_BACKBONE = 'DenseNetBackbone'
_IGNORED = {*keras_head.SILENT, 'InputLayer', 'SpatialDropout2D'}
# The order of layers: {after: {layer: where it leads}}. `trunk` is what a dense layer
# takes, and what its outputs are appended to.
_ORDER = {
    'start': {'padding': 'padded', '7x7': 'stem', '3x3': 'trunk'},
    'padded': {'7x7': 'padded stem'},
    'padded stem': {'norm': 'padded norm'},
    'padded norm': {'relu': 'padded relu'},
    'padded relu': {'padding': 'padded again'},
    'padded again': {'max': 'trunk'},
    'stem': {'norm': 'stem norm'},
    'stem norm': {'relu': 'stem relu'},
    'stem relu': {'max': 'trunk'},
    'trunk': {'norm': 'norm'},
    'norm': {'relu': 'relu'},
    'relu': {'1x1': 'narrow', '3x3': 'grown'},
    'narrow': {'mean': 'trunk', 'norm': 'narrow norm'},
    'narrow norm': {'relu': 'narrow relu'},
    'narrow relu': {'3x3': 'grown'},
    'grown': {'concatenation': 'trunk'},
}
_KINDS = {
    'ZeroPadding2D': 'padding',
    'BatchNormalization': 'norm',
    'MaxPooling2D': 'max',
    'AveragePooling2D': 'mean',
    'Concatenate': 'concatenation',
}
_TITLES = {part: kind for kind, part in _KINDS.items()} | {
    'relu': 'ReLU',
    **{size: f'{size} Conv2D' for size in ('7x7', '3x3', '1x1')},
}
# What Keras assumes about settings that a configuration does not list.
_DEFAULTS = {
    'strides': 1,
    'dilation_rate': 1,
    'padding': 'valid',
    'pool_size': 2,
    'use_bias': True,
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """The layers of a configuration, `(class, settings)` each.

    Attributes:
      body: up to the last norm of the network; empty if it does not show.
      behind: the layers after that norm; None if it does not show.
      last: the name of that norm, or None.
    """

    body: tuple[tuple[str, dict[str, Any]], ...] = ()
    behind: list[tuple[str, dict[str, Any]]] | None = None
    last: str | None = None

    def map_size(self, size: sizes.Size | None) -> tuple[int, int] | None:
        """Height and width of the last feature maps for images of `size`, if known."""
        kinds = [kind for kind, _ in self.body]
        halvings = kinds.count('AveragePooling2D')
        has_strides = 'MaxPooling2D' in kinds
        if _BACKBONE in kinds:
            repeats = self.body[0][1].get('stackwise_num_repeats')
            if not isinstance(repeats, list):
                return None
            halvings, has_strides = len(repeats) - 1, True
        if size is None or not kinds:
            return None
        height, width = (-(-n // 4) if has_strides else n for n in sizes.pair(size))
        return height >> halvings, width >> halvings


def split(settings: dict[str, Any]) -> Parts:
    """Finds the network in the configuration of the outermost model."""
    flat = flatten(settings)
    kinds = [kind for kind, _ in flat]
    if _BACKBONE in kinds:
        place = len(kinds) - 1 - kinds[::-1].index(_BACKBONE)
        return Parts((flat[place],), [('ReLU', {}), *flat[place + 1 :]])
    if not {'Conv2D', 'Concatenate'} <= set(kinds):
        return Parts()
    start = kinds.index('Conv2D')
    start -= start > 0 and kinds[start - 1] == 'ZeroPadding2D'
    last = len(kinds) - 1 - kinds[::-1].index('Conv2D')
    after = [n for n in range(last + 1, len(kinds)) if kinds[n] not in _IGNORED][:2]
    if [kinds[n] for n in after] != ['Concatenate', 'BatchNormalization']:
        return Parts(tuple(flat[start:]))
    end = after[1] + 1
    return Parts(tuple(flat[start:end]), flat[end:], flat[end - 1][1].get('name'))


def flatten(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """`(class, settings)` of all layers, also those of models in the model.

    The settings also have `inputs`, the names of the layers that feed the layer, and
    `maps`, height and width of its input if the configuration states them.
    """
    flat, layers = [], settings.get('layers')
    for layer in layers if isinstance(layers, list) else ():
        if not isinstance(layer, dict):
            continue
        kind, inner = keras_head.class_of(layer)
        if keras_head.inner_layers(layer) is not None:
            flat += flatten(inner)
            # Layers that take its outputs call them by the name of the model.
            kind = SEVERAL_OUTPUTS if _has_several_outputs(inner) else 'Identity'
            flat.append((kind, {'name': inner.get('name')}))
            continue
        tensors = _tensors(layer.get('inbound_nodes'))
        inputs = [name for name, _ in tensors]
        if 'BatchNormalization' in kind:  # SyncBatchNormalization, ...V1
            kind = 'BatchNormalization'
        maps = tensors[0][1] if tensors else None
        flat.append((kind, inner | {'inputs': inputs, 'maps': maps}))
    return flat


def _has_several_outputs(settings):
    outputs = settings.get('output_layers')
    if isinstance(outputs, list):
        return sum(isinstance(one, list) for one in outputs) > 1
    return isinstance(outputs, dict) and len(outputs) > 1


def _tensors(node):
    """(name of the layer, height and width or None) of the tensors a layer takes."""
    if isinstance(node, dict):
        inner = node.get('config')
        history = inner.get('keras_history') if isinstance(inner, dict) else None
        if isinstance(history, list) and history:
            shape = inner.get('shape')
            is_map = isinstance(shape, list) and len(shape) == 4
            maps = (
                tuple(shape[1:3]) if is_map and sizes.are_sides(*shape[1:3]) else None
            )
            return [(history[0], maps)]
        node = list(node.values())
    if not isinstance(node, list):
        return []
    if len(node) >= 3 and isinstance(node[0], str) and type(node[1]) is int:
        return [(node[0], None)]  # before Keras 3
    return [tensor for inner in node for tensor in _tensors(inner)]


def check(path: str, parts: Parts):
    """Raises `UserError` if the network computes something else than ours.

    Args:
      path: the file, for the message.
    """
    if not parts.body or parts.body[0][0] == _BACKBONE:
        return
    state, before, trunk = 'start', None, None
    for kind, settings in parts.body:
        name = settings.get('name')
        part = _part_of(kind, settings)
        takes = [trunk, before] if part == 'concatenation' else [before]
        reason = ''
        if kind not in _IGNORED:
            reason = _differs(kind, part, state, settings)
        if before and settings.get('inputs') and settings['inputs'] != takes:
            names = (', '.join(map(str, one)) for one in (settings['inputs'], takes))
            reason = reason or 'takes {}, not {}'.format(*names)
        if reason:
            raise UserError(
                f'{path}: its layer {name or kind} {reason}; use a network with the '
                'layers of keras.applications'
            )
        if kind not in _IGNORED:
            state = _ORDER[state][part]
        before = name
        trunk = name if state == 'trunk' else trunk


def _part_of(kind, settings):
    """A key of the values of `_ORDER`; another text for other layers."""
    if kind == 'Conv2D':
        return _show(pair(settings.get('kernel_size')))
    return 'relu' if keras_head.is_relu(kind, settings) else _KINDS.get(kind, kind)


def _differs(kind, part, state, settings):
    """How a layer differs from that of our network; '' if it does not."""
    activation = keras_head.activation_name(settings)
    if part not in _ORDER[state]:
        shown = {'Conv2D': f'{part} {kind}', 'Activation': activation}.get(kind, kind)
        places = ' or '.join(_TITLES.get(place, place) for place in _ORDER[state])
        return f'({shown}) stands where a DenseNet has: {places}'
    for key, wanted in _wanted(part, state).items():
        found = _value(settings, key)
        if found != wanted:
            return f'({kind}) has {key}={_show(found)}, not {_show(wanted)}'
    if kind == 'Conv2D' and activation != 'linear':
        return f'({kind}) has the activation {activation}'
    return ''


def _wanted(part, state):
    """The settings of a layer of our network."""
    if part == 'padding':
        return {'padding': (3, 3) if state == 'start' else (1, 1)}
    padding = 'valid' if state.startswith('padded') else 'same'
    if part == 'max':
        return {'strides': (2, 2), 'padding': padding, 'pool_size': (3, 3)}
    if part == 'mean':
        return {'strides': (2, 2), 'padding': 'valid', 'pool_size': (2, 2)}
    if part not in ('7x7', '3x3', '1x1'):
        return {}
    strides = (2, 2) if part == '7x7' else (1, 1)
    wanted = {'strides': strides, 'dilation_rate': (1, 1), 'use_bias': False}
    return wanted if part == '1x1' else wanted | {'padding': padding}


def _value(settings, key):
    """A setting, with pairs as tuples."""
    found = settings.get(key)
    if found is None:
        found = settings.get('pool_size') if key == 'strides' else None
    found = _DEFAULTS[key] if found is None else found
    if isinstance(found, str | bool):
        return found
    return pair(found) or found


def pair(value: Any) -> tuple[int, int] | None:
    """Height and width from `2`, `[2, 2]` or `[[2, 2], [2, 2]]`; None for others."""
    if type(value) is int:
        return value, value
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    sides = [side[0] if _is_even(side) else side for side in value]
    return (sides[0], sides[1]) if all(type(side) is int for side in sides) else None


def _is_even(side):
    return isinstance(side, list) and len(side) == 2 and side[0] == side[1]


def _show(value):
    return 'x'.join(map(str, value)) if isinstance(value, tuple) else str(value)
