"""Finds the weights in a PyTorch file, and its class names and activations."""

import collections
import contextlib
import dataclasses
import json
import logging
import re
from typing import Any

import numpy as np

from flax_densenet.errors import UserError, list_first, printable
from flax_densenet.weights import (
    heads,
    torch_copies,
    torch_layers,
    torch_matcher,
    torch_pickle,
)

_LOGGER = logging.getLogger(__name__)
# The keys under which trainers keep the weights, the moving average first.
_AVERAGES = ('state_dict_ema', 'model_ema', 'ema_state_dict', 'ema')
_NESTED = (
    *_AVERAGES,
    *('state_dict', 'model_state_dict', 'model_state', 'model', 'net', 'network'),
    *('weights', 'params', 'module'),
)
_NAMES = (
    *('class_names', 'class_to_idx', 'idx_to_class', 'classes', 'CLASSES', 'labels'),
    *('label_names', 'idx_to_label', 'id2label', 'label2id', 'pathologies', 'targets'),
)
_CERTAIN = _NAMES[:5]  # never something else than names of classes
_SETTINGS = ('hyper_parameters', 'meta', 'args', 'config', 'cfg', 'hparams')
_ACTIVATIONS = {
    'Sigmoid': heads.SIGMOID,
    'Softmax': heads.SOFTMAX,
    'LogSoftmax': heads.SOFTMAX,
}
_MOST, _DEEPEST = 1000, 3  # of settings that are searched
_MOST_PARTS = 20_000  # of a file that are searched for networks
_BODY = re.compile(
    r'(^|\.)(features|denseblock\d+|transition\d+|(conv|norm|relu|pool)\d)(\.|$)'
)
_SILENT = ('Dropout', 'Identity', 'Flatten', 'Linear', *_ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class Content:
    """The weights in a PyTorch file.

    Attributes:
      arrays: `{key: array}`.
      class_names: lists of class names found next to the weights.
      outputs: one of `heads.OUTPUTS`; None if the file does not say.
      head: layers after the classifier that change its outputs in other ways.
      layers: its layers, if the file holds a complete model; else None.
      fields: fields of `DenseNet` that these layers determine.
      note: a line about the class names; '' for none.
    """

    arrays: dict[str, np.ndarray]
    class_names: tuple[tuple[str, ...], ...] = ()
    outputs: str | None = None
    head: tuple[str, ...] = ()
    layers: torch_layers.Layers | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ''


def find(path: str, saved: Any) -> Content:
    """Finds the weights in the result of `torch_pickle.read`.

    Args:
      path: the file, for messages.

    Raises:
      UserError: there are no weights, or they need unknown classes.
    """
    found = _choose(path, saved)
    saved, place, beside = found.value, found.place or 'the file', list(found.around)
    outputs, head, layers, fields = None, (), None, {}
    if isinstance(saved, torch_pickle.Module):
        if saved.foreign:
            raise torch_pickle.refusal(path, saved.foreign)
        layers = torch_layers.Layers.of(
            {'': saved.name, **saved.layers}, saved.settings
        )
        fields = torch_layers.check(path, layers)
        outputs, head = _read_activation(saved)
        beside.append(saved.attributes)
        saved = _without_blur(saved)
    if isinstance(saved, torch_pickle.Record):
        raise torch_pickle.refusal(path, saved.name)
    if not isinstance(saved, dict):
        raise UserError(f'{path} holds a {type(saved).__name__}, not weights')
    names, note = _find_names(beside)
    # Removed one by one, here and in `torch_names.rename`, so that no array is in
    # memory twice.
    is_array = {k: isinstance(v, np.ndarray) for k, v in saved.items()}
    arrays = {str(k): saved.pop(k) for k, is_one in is_array.items() if is_one}
    others = [name for name in map(str, saved) if name not in _NAMES]
    if not arrays:
        raise UserError(f'{path} holds no arrays in {place}')
    if inside := [name for name in others if '.' in name]:
        raise UserError(f'{path}: {place} holds {inside[0]}, which is not an array')
    if others:
        _LOGGER.warning(
            '%s: entries that are not arrays are left out: %s',
            *(path, printable(list_first(sorted(others)))),
        )
    return Content(arrays, names, outputs, head, layers, fields, note)


def _holds_network(saved):
    if isinstance(saved, torch_pickle.Module | torch_pickle.Record):
        return True
    return isinstance(saved, dict) and any(
        isinstance(value, np.ndarray) and torch_matcher.is_of_network(str(key))
        for key, value in saved.items()
    )


@dataclasses.dataclass(frozen=True)
class _Found:
    """A part of a file: what it holds, where, and all dicts around it."""

    value: Any
    place: str
    around: tuple[Any, ...]


def _choose(path, saved):
    """The network in a file: of several copies, the moving average."""
    usual = _follow_usual_keys(saved)
    networks = _find_networks(saved)
    first = next((one for one in networks if one.value is usual.value), None)
    if not networks or (first is None and _holds_network(usual.value)):
        return usual
    copies = networks
    if first is not None:
        shapes = _shapes(first.value)
        others = [one for one in networks if one is not first]
        copies = [first, *(one for one in others if _shapes(one.value) == shapes)]
    if len(copies) == 1:
        _tell_unnamed_averages(path, saved, copies[0])
        return copies[0]
    places = [one.place for one in copies]
    averages = [n for n, place in enumerate(places) if torch_copies.is_average(place)]
    # Lightning keeps the trained weights there while it saves their average.
    if 'current_model_state' in places:
        averages += [n for n, place in enumerate(places) if place == 'state_dict']
    arrays = [_arrays_of(one.value) for one in copies]
    number = torch_copies.choose(
        path,
        places,
        averages,
        are_equal=lambda: all(
            torch_copies.equal_arrays(arrays[0], other) for other in arrays[1:]
        ),
        remedy="torch.save(torch.load(FILE)['KEY'], NEW)",
    )
    return copies[number]


def _follow_usual_keys(saved):
    """What the keys that trainers use lead to."""
    around, places = [saved], []
    for _ in range(3):
        name = _find_nested(around[-1])
        if name is None:
            break
        places.append(name)
        around.append(around[-1][name])
    return _Found(around[-1], '.'.join(places), tuple(around))


def _find_networks(saved):
    """All networks in a file, under any keys; those in others are not listed."""
    found, waiting = [], collections.deque([_Found(saved, '', ())])
    for _ in range(_MOST_PARTS):
        if not waiting:
            break
        part = waiting.popleft()
        value, place = part.value, part.place
        if _holds_network(value) and not isinstance(value, torch_pickle.Record):
            found.append(part)
            continue
        if place.count('.') > _DEEPEST:
            continue
        inner = value.items() if isinstance(value, dict) else ()
        inner = enumerate(value) if isinstance(value, list) else inner
        for key, one in list(inner)[:_MOST]:
            if isinstance(one, dict | list | torch_pickle.Module):
                name = f'{place}.{key}' if place else str(key)
                waiting.append(_Found(one, name, (*part.around, value)))
    return [
        dataclasses.replace(
            one,
            around=tuple(x for x in (*one.around, one.value) if isinstance(x, dict)),
        )
        for one in found
    ]


def _arrays_of(network):
    arrays = network.arrays if isinstance(network, torch_pickle.Module) else network
    return {k: v for k, v in arrays.items() if isinstance(v, np.ndarray)}


def _shapes(network):
    """The shapes of all kernels, which copies have in common."""
    return sorted(v.shape for v in _arrays_of(network).values() if v.ndim == 4)


def _is_array(values):
    return bool(values) and isinstance(values[0], np.ndarray)


def _tell_unnamed_averages(path, saved, chosen):
    """Warns of a moving average that is only a list of arrays."""
    for key, value in saved.items() if isinstance(saved, dict) else ():
        if not torch_copies.is_average(str(key)) or value is chosen.value:
            continue
        inner = list(value.values()) if isinstance(value, dict) else [value]
        if any(isinstance(x, list) and _is_array(x[:1]) for x in inner):
            _LOGGER.warning(
                '%s: the arrays of the moving average %s have no names, so %s is used; '
                'to use the average, save the network with it: '
                'torch.save(model.state_dict(), FILE)',
                *(path, printable(str(key)), printable(chosen.place)),
            )


def names_of_metadata(metadata: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    """Lists of class names in the metadata of a safetensors file."""
    parts = {}
    for name in _NAMES:
        with contextlib.suppress(ValueError, RecursionError, KeyError):
            parts[name] = json.loads(metadata[name])
    return _find_names([parts])[0]


def _is_state(value):
    return isinstance(value, dict | torch_pickle.Module | torch_pickle.Record)


def _find_nested(saved):
    """The key of the weights in a dict; None if the dict itself holds them."""
    if not isinstance(saved, dict):
        return None
    arrays = sum(isinstance(value, np.ndarray) for value in saved.values())
    if arrays > 4:  # a state dict
        return None
    return next((name for name in _NESTED if _is_state(saved.get(name))), None)


def _find_names(beside):
    """All lists of names in dicts near the weights, and a line if they differ."""
    found, unusable = {}, []  # where each list is
    waiting = [part for part in beside if isinstance(part, dict)]
    for part in list(waiting):
        for name in _SETTINGS:
            waiting += _settings(part.get(name))
    for part in waiting:
        for name in _NAMES:
            given = _plain(part.get(name))
            names = heads.order_names(_fill(given))
            if names:
                found.setdefault(names, name)
            elif name in _CERTAIN and isinstance(given, dict | list | tuple) and given:
                unusable.append(name)
    lengths = collections.Counter(map(len, found))
    several = [names for names in found if lengths[len(names)] > 1]
    note = ''
    if unusable and not found:
        note = (
            f'its {unusable[0]} cannot be used: it takes one name for each output, '
            'numbered from 0; to give names: --class_names=FILE or A,B,...'
        )
    if several:
        lists = ' and '.join(
            f'{found[names]} ({list_first(names, 3)})' for names in several[:2]
        )
        note = (
            f'it names its classes in two ways, {printable(lists)}; the first is '
            'used; to give others: --class_names=FILE or A,B,...'
        )
    return tuple(found), note


def _settings(value, depth=0):
    """The dicts in settings, up to a usual depth."""
    value = value.fields if isinstance(value, torch_pickle.Record) else value
    if not isinstance(value, dict) or depth > _DEEPEST:
        return []
    inner = [_settings(one, depth + 1) for one in list(value.values())[:_MOST]]
    return [value, *(one for part in inner for one in part)]


def _plain(names):
    """Converts numbers in tensors to plain numbers."""
    if isinstance(names, dict):
        return {_plain(key): _plain(value) for key, value in names.items()}
    if isinstance(names, np.ndarray) and names.dtype.kind == 'U' and names.ndim == 1:
        return names.tolist()
    is_number = isinstance(names, np.ndarray) and names.size == 1
    if is_number and names.dtype.kind in 'iu':
        return int(names.reshape(()))
    return names


def _fill(names):
    """Names findings that torchxrayvision leaves empty for a data set."""
    if not isinstance(names, list | tuple) or not any(names):
        return names
    return [f'output {n}' if name == '' else name for n, name in enumerate(names)]


def _without_blur(module):
    """The arrays, without timm's constant filters, which are not in a state dict."""
    blurs = [n for n, kind in module.layers.items() if kind.endswith('.BlurPool2d')]
    filters = {f'{name}.filt' for name in blurs}
    return {k: array for k, array in module.arrays.items() if k not in filters}


def _read_activation(module):
    """The activation after the classifier, and layers that change its outputs."""
    behind, head = False, []
    outputs = None
    for name, kind in module.layers.items():
        if _BODY.search(name):
            continue
        dim = module.settings[name].get('dim')
        kind = kind.rpartition('.')[2]
        if kind == 'Linear':
            behind, head = True, []
        elif behind and kind in _ACTIVATIONS and dim in (None, 1, -1):
            outputs = _ACTIVATIONS[kind]
        elif behind and kind in _ACTIVATIONS:
            head.append(f'{name} ({kind} over dim {dim})')
        elif behind and kind not in _SILENT and not _holds(module, name):
            head.append(f'{name} ({kind})')
    return outputs, tuple(head)


def _holds(module, name):
    """Whether a module contains other modules."""
    return any(other.startswith(f'{name}.') for other in module.layers)
