"""Reads what a Keras model computes after the network: the pooling and the head.

The configuration lists all layers with their activations and their order. A file with
arrays only (`.weights.h5`) has no configuration; a ReLU after each Dense layer except
the last is then a guess.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from flax_densenet.settings import sizes
from flax_densenet.weights import (
    head_layers,
    keras_body,
    keras_head,
    keras_layers,
    keras_pooling,
)
from flax_densenet.weights.head_layers import RELU, Linear, Norm, Unreadable

_NOTHING = {*keras_head.SILENT, 'InputLayer', 'Flatten', 'SpatialDropout2D'}
_ENDS = ('softmax', 'sigmoid')


@dataclasses.dataclass(frozen=True)
class Tail:
    """The layers after the network.

    Attributes:
      arrays: `{our name: array}` of the classifier; empty if there is none.
      fields: fields of `DenseNet`.
      layers: names of the layers of a head that cannot be read.
      reason: why it cannot be read.
      guess: describes what was guessed; '' for nothing.
      size_note: what differs at other image sizes; '' for nothing.
    """

    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: tuple[str, ...] = ()
    reason: str = ''
    guess: str = ''
    size_note: str = ''


def read(
    parts: keras_body.Parts,
    layers: list[keras_layers.Layer],
    arrays: dict[str, np.ndarray],
    width: int | None,
    size: sizes.Size | None = None,
) -> Tail:
    """The head of a model.

    Args:
      parts: the layers of the configuration.
      layers: layers of the file outside the network's body, in the order of the file.
      arrays: `{path in the file: array}`.
      width: number of features of the network.
      size: the size of the images that the network takes, if known.
    """
    names = tuple(layer.name.rpartition('/')[2] for layer in layers)
    try:
        if parts.behind is None:
            return _of_arrays(layers, arrays, width) if layers else Tail()
        return _of_config(parts, layers, arrays, width, size)
    except Unreadable as error:
        return Tail(layers=names or ('its last layer',), reason=str(error))


def _of_config(parts, layers, arrays, width, size):
    behind = parts.behind
    places = _place(behind, layers)
    unused = [one.name for one in layers if one not in places.values()]
    if unused:
        raise Unreadable(f'{unused[0]} is not in its configuration')
    sequence, fields, before = [], {'last_relu': False}, parts.last
    pooling = keras_pooling.Pooling(parts.map_size(size))
    for number, (kind, settings) in enumerate(behind):
        name = settings.get('name')
        inputs = settings.get('inputs')
        if before and inputs and inputs != [before]:
            raise Unreadable(f'{name} takes {", ".join(inputs)}, not {before}')
        before = name
        activation = keras_head.activation_name(settings)
        if kind in keras_pooling.KINDS and not sequence:
            pooling.add(kind, settings)
        elif kind in ('Activation', 'ReLU', 'Softmax'):
            _activate(kind, activation, sequence, fields, settings, pooling.kind)
        elif kind in ('Dense', 'BatchNormalization'):
            if not pooling.is_complete:
                raise Unreadable(f'{name} comes before the pooling')
            layer = _layer(kind, settings, places.get(number), arrays)
            sequence += [layer]
            if kind == 'Dense' and activation != 'linear':
                _activate(kind, activation, sequence, fields, settings, pooling.kind)
        elif kind not in _NOTHING or (kind == 'Flatten' and not pooling.is_complete):
            raise Unreadable(f'{name or kind} is a {kind}')
    if pooling.is_complete:
        fields['pooling'] = pooling.kind
    if not sequence:
        return Tail(fields=_unusual(fields))
    made = _made(sequence, fields, width)
    return dataclasses.replace(made, size_note=pooling.size_note)


def _unusual(fields):
    usual = {'last_relu': True, 'pooling': 'mean'}
    return {k: v for k, v in fields.items() if usual.get(k) != v}


def _activate(kind, activation, sequence, fields, settings, pooled):
    kind = {'ReLU': 'relu', 'Softmax': 'softmax'}.get(kind, activation)
    odd = keras_head.has_unusual_slope(settings)
    if odd or (kind not in ('relu', 'linear', *_ENDS)):
        raise Unreadable(f'{settings.get("name")} is an unusual {kind}')
    if sequence and sequence[-1] in _ENDS:
        raise Unreadable(f'a {kind} after a {sequence[-1]}')
    if kind in _ENDS:
        sequence.append(kind)
    elif kind == 'relu' and sequence:
        sequence.append(RELU)
    elif kind == 'relu' and not fields['last_relu']:
        # The ReLU of a maximum is the maximum after a ReLU.
        if pooled == 'mean':
            raise Unreadable(f'{settings.get("name")} is a ReLU after the mean')
        fields['last_relu'] = True


def _made(sequence, fields, width, guess=''):
    if sequence[-1] in _ENDS:
        sequence = sequence[:-1]
    if any(layer in _ENDS for layer in sequence):
        raise Unreadable('a softmax or sigmoid comes before a layer')
    first = sequence[0]
    inputs = first.kernel.shape[0] if isinstance(first, Linear) else len(first.mean)
    if width is not None and inputs != width:
        raise Unreadable(f'it takes {inputs} inputs, the network has {width} features')
    reduced = head_layers.reduce(sequence)
    hidden = tuple(kernel.shape[1] for kernel, _ in reduced[:-1])
    fields = _unusual(fields) | ({'hidden': hidden} if hidden else {})
    if guess:
        guess = f'its head is assumed to be {head_layers.describe(sequence)}: {guess}'
    return Tail(head_layers.arrays_of(reduced), fields, guess=guess)


def _place(behind, layers):
    """Matches layers of the configuration with the file, by name, else by order."""
    wanted = [
        (n, kind, settings.get('name'))
        for n, (kind, settings) in enumerate(behind)
        if kind in ('Dense', 'BatchNormalization')
    ]
    by_name = {layer.name.rpartition('/')[2]: layer for layer in layers}
    if all(name in by_name for _, _, name in wanted):
        return {n: by_name[name] for n, _, name in wanted}
    # Before 3.6, Keras 3 numbers layers of a class in the order of the model.
    placed = {}
    for kind in ('Dense', 'BatchNormalization'):
        numbers = [n for n, one, _ in wanted if one == kind]
        ours = [one for one in layers if ('kernel' in one.keys) == (kind == 'Dense')]
        if len(numbers) != len(ours):
            raise Unreadable('its layers have other names than their arrays')
        placed |= dict(zip(numbers, ours, strict=True))
    return placed


def _layer(kind, settings, layer, arrays):
    if layer is None:
        raise Unreadable(f'{settings.get("name")} has no arrays')
    found = {role: arrays[key] for role, key in layer.keys.items()}
    if kind == 'Dense':
        wanted = {'kernel', 'bias'} if settings.get('use_bias', True) else {'kernel'}
        if found.keys() != wanted or found['kernel'].ndim != 2:
            raise Unreadable(f'{layer.name} has arrays {", ".join(sorted(found))}')
        return Linear(found['kernel'], found.get('bias'))
    return _norm(layer.name, found, float(settings.get('epsilon', 1e-3)))


def _norm(name, found, epsilon):
    if found.keys() != set(keras_layers.NORM):
        raise Unreadable(f'{name} has arrays {", ".join(sorted(found))}')
    return Norm(*(found[role] for role in keras_layers.NORM), epsilon)


def _of_arrays(layers, arrays, width):
    """Without a configuration: Dense layers, ordered by their widths."""
    if not all('kernel' in layer.keys for layer in layers):
        names = ', '.join(layer.name for layer in layers)
        raise Unreadable(f'the order of {names} is unclear')
    found = {
        layer.name.rpartition('/')[2]: _layer(
            'Dense', {'use_bias': 'bias' in layer.keys}, layer, arrays
        )
        for layer in layers
    }
    order = head_layers.find_order(found, width)
    sequence = []
    for name in order:
        sequence += [RELU, found[name]] if sequence else [found[name]]
    pairs = ', '.join(' and '.join(pair) for pair in itertools.pairwise(order))
    return _made(sequence, {}, width, f'a ReLU between {pairs}')
