"""Reads heads of several layers in PyTorch files.

A state dict has the names and the arrays of layers. ReLU and Dropout have no arrays,
but gaps in numbered names (`classifier.0`, `classifier.3`) show that a layer exists,
and pickled modules show which one. Guesses are reported in one line.
"""

import dataclasses
import itertools
import re
from typing import Any

import numpy as np

from flax_densenet.weights import head_layers, torch_layers, torch_matcher
from flax_densenet.weights.head_layers import RELU, Linear, Norm, Unreadable

_EPSILON = torch_layers.EPSILON
_NORM = {'weight', 'bias', 'running_mean', 'running_var'}
_NOTHING = {'Dropout', 'AlphaDropout', 'Identity', 'Flatten', 'Sequential'}
_LAST = {'Sigmoid', 'Softmax', 'LogSoftmax', 'Dropout', 'Identity', 'Flatten'}


@dataclasses.dataclass(frozen=True)
class Head:
    """The layers of a head.

    Attributes:
      arrays: `{our name: array}`.
      fields: fields of `DenseNet`.
      guess: describes what was guessed; '' for nothing.
    """

    arrays: dict[str, np.ndarray]
    fields: dict[str, Any]
    guess: str = ''


def read(
    arrays: dict[str, np.ndarray],
    *,
    width: int | None,
    body: str,
    layers: torch_layers.Layers | None = None,
) -> Head:
    """Reads the head of a network.

    Args:
      arrays: `{name: array}` of the head, with the names in the file but without the
        names of wrappers.
      width: number of features of the body; None if unknown.
      body: prefix of the names of the body, such as `0.0.`.
      layers: the layers of a pickled network; None for other files.

    Raises:
      Unreadable: the head computes something else, or it is unclear what it computes.
    """
    places = _layers_by_place(arrays)
    parents = {place.rpartition('.')[0] for place in places}
    if len(parents) > 1:
        raise Unreadable(f'{" and ".join(sorted(places)[:2])} are in different modules')
    parent = parents.pop()
    prefix = f'{parent}.' if parent else ''
    found = {place.removeprefix(prefix): layer for place, layer in places.items()}
    if layers is not None:
        parts, guesses = _of_pickle(found, prefix, layers), []
    elif all(name.isdecimal() for name in found):
        by_number = {int(name): layer for name, layer in found.items()}
        parts, guesses = _of_numbers(dict(sorted(by_number.items())))
    else:
        parts, guesses = _of_names(found, width)
    fields, more = _front(parts, width, body, prefix, found, layers)
    guesses += more
    linear = [name for name, layer in found.items() if isinstance(layer, Linear)]
    without = [name for name in linear if found[name].bias is None]
    if without == list(found) and prefix + without[0] not in torch_matcher.HEADS:
        raise Unreadable(
            f'{prefix}{without[0]} has no bias, as layers that compare directions'
        )
    if without:
        guesses.append(f'no bias in {", ".join(prefix + name for name in without)}')
    if any(isinstance(part, Norm) for part in parts) and layers is None:
        guesses.append(f'epsilon is {_EPSILON:g}')
    reduced = head_layers.reduce(parts)
    guess = '; '.join(guesses)
    if guess:
        guess = f'its head is assumed to be {head_layers.describe(parts)}: {guess}'
    hidden = tuple(kernel.shape[1] for kernel, _ in reduced[:-1])
    fields |= {'hidden': hidden} if hidden else {}
    return Head(head_layers.arrays_of(reduced), fields, guess)


def read_front(
    place: str, body: str, layers: torch_layers.Layers | None = None
) -> Head:
    """Reads what comes between the body and a single Linear layer at `place`.

    Raises:
      Unreadable: there is something that our networks do not have.
    """
    if layers is not None:
        return Head({}, torch_layers.read_front(layers, body, place) or {})
    parent, _, name = place.rpartition('.')
    prefix = f'{parent}.' if parent else ''
    child = _child_of(body, prefix)
    if not child:
        return Head({}, {})
    fields, guesses = _beside_body(child, {name: None})
    guess = f'its head is assumed to be one Linear: {guesses[0]}' if guesses else ''
    return Head({}, fields, guess)


def _layers_by_place(arrays):
    places: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        place, _, leaf = name.rpartition('.')
        if leaf != 'num_batches_tracked':
            places.setdefault(place, {})[leaf] = array
    return {place: _layer(place, leaves) for place, leaves in places.items()}


def _layer(place, leaves):
    ranks = {leaf: array.ndim for leaf, array in leaves.items()}
    floats = all(array.dtype.kind in 'fV' for array in leaves.values())
    if ranks in ({'weight': 2}, {'weight': 2, 'bias': 1}) and floats:
        weight = np.asarray(leaves['weight'], np.float64)
        return Linear(weight.T, leaves.get('bias'))
    if ranks == dict.fromkeys(_NORM, 1) and floats:
        parts = [
            np.asarray(leaves[leaf], np.float64)
            for leaf in ('weight', 'bias', 'running_mean', 'running_var')
        ]
        return Norm(*parts, _EPSILON)
    raise Unreadable(f'{place} is neither a Linear nor a BatchNorm')


def _of_pickle(found, prefix, layers):
    """The layers of pickled modules, where nothing has to be guessed."""
    parts, left = [], dict(found)
    for name, kind in _children(prefix, layers):
        if name in left:
            part = left.pop(name)
            if isinstance(part, Norm):
                epsilon = layers.epsilon(f'{prefix}{name}')
                part = dataclasses.replace(part, epsilon=epsilon)
            parts.append(part)
        elif kind == 'ReLU' and parts:
            parts.append(RELU)
        elif parts and kind not in _NOTHING and (left or kind not in _LAST):
            raise Unreadable(f'{prefix}{name} is a {kind}')
    if left:
        raise Unreadable(f'{prefix}{next(iter(left))} is not among its modules')
    return parts


def _children(prefix, layers):
    """The names and classes of the direct children of a Sequential."""
    place = prefix.removesuffix('.')
    kind = layers.classes.get(place, 'module of unknown class')
    # A DenseNet, if its classifier is one layer.
    if not kind.endswith(('.Sequential', '.DenseNet')):
        raise Unreadable(f'{place or "it"} is a {kind}')
    for child in layers.children.get(place, []):
        yield child.removeprefix(prefix), layers.kind(child)


def _of_numbers(found):
    """The layers of a Sequential: a gap in the numbers is a layer without arrays."""
    layers, guesses = [], []
    linear = None  # number of the last Linear
    for number, layer in found.items():
        if isinstance(layer, Linear):
            if linear is not None:
                layers += _between(found, linear, number, guesses)
            else:
                layers += [one for n, one in found.items() if n < number]
            layers.append(layer)
            linear = number
    if linear is None:
        raise Unreadable('it has no Linear layer')
    behind = [n for n in found if n > linear]
    if behind and behind != [linear + 1]:
        raise Unreadable(f'it is unclear what is between {linear} and {behind[0]}')
    layers += [found[n] for n in behind]
    return layers, _say(guesses)


def _between(found, first, second, guesses):
    """The layers between two Linear layers: norms, and a ReLU if there is a gap."""
    norms = [n for n in found if first < n < second]
    if second - first - 1 == len(norms):
        return [found[n] for n in norms]
    guesses.append(f'{first} and {second}')
    if not norms:
        return [RELU]
    if len(norms) > 1:
        raise Unreadable(f'it is unclear where the ReLU between {guesses[-1]} is')
    before, after = norms[0] > first + 1, second > norms[0] + 1
    # fastai uses `Linear, ReLU, BatchNorm, Dropout, Linear`; its numbers start at the
    # pooling.
    if before and after and (min(found), first, norms[0], second) != (2, 4, 6, 8):
        raise Unreadable(f'it is unclear where the ReLU between {guesses[-1]} is')
    norm = found[norms[0]]
    return [RELU, norm] if before else [norm, RELU]


def _of_names(found, width):
    """Layers with individual names, ordered by their widths."""
    if any(isinstance(layer, Norm) for layer in found.values()):
        raise Unreadable('the order of its layers is unclear')
    order = head_layers.find_order(found, width)
    layers = []
    for name in order:
        layers += [RELU, found[name]] if layers else [found[name]]
    return layers, _say([' and '.join(pair) for pair in itertools.pairwise(order)])


def _say(pairs):
    return [f'a ReLU between {", ".join(pairs)}'] if pairs else []


def _front(parts, width, body, prefix, found, layers):
    """The fields of DenseNet about what comes before the head, and guesses."""
    first = parts[0]
    inputs = first.kernel.shape[0] if isinstance(first, Linear) else len(first.mean)
    # fastai cuts torchvision's network after the last norm, and its head starts with
    # the pooling and a Flatten.
    if (
        layers is None
        and re.fullmatch(r'(.*\.)?0\.(0\.)?', body)
        and prefix.split('.')[-2:-1] == ['1']
        and isinstance(found.get('2'), Norm)
        and inputs in (width, 2 * (width or 0))
    ):
        fields = {'last_relu': False}
        if inputs == width:
            return fields, ['as in fastai, no ReLU before the pooling']
        line = 'as in fastai, maximum and mean without a ReLU before the pooling'
        return fields | {'pooling': 'max_mean'}, [line]
    if width is not None and inputs != width:
        raise Unreadable(f'it takes {inputs} inputs, the network has {width} features')
    if layers is not None:
        place = next(name for name, _ in _children(prefix, layers) if name in found)
        return torch_layers.read_front(layers, body, prefix + place) or {}, []
    child = _child_of(body, prefix)
    return _beside_body(child, found) if child else ({}, [])


def _child_of(body, prefix):
    """The number of the body in a Sequential that also holds the head, or ''."""
    child = body.removeprefix(prefix).partition('.')[0]
    return child if body.startswith(prefix) and child.isdecimal() else ''


def _beside_body(child, found):
    """The same for a Sequential that holds the body and the head."""
    if not all(name.isdecimal() for name in found):
        return {}, []
    gap = min(map(int, found)) - int(child) - 1
    if gap == 2:
        return {'last_relu': False}, ['no ReLU between the last norm and the pooling']
    return {}, ['a ReLU between the last norm and the pooling']
