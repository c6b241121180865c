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
from flax_densenet.weights import heads, torch_layers, torch_matcher, torch_pickle

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
_SETTINGS = ('hyper_parameters', 'meta', 'args', 'config', 'cfg', 'hparams')
_ACTIVATIONS = {
    'Sigmoid': heads.SIGMOID,
    'Softmax': heads.SOFTMAX,
    'LogSoftmax': heads.SOFTMAX,
}
_MOST, _DEEPEST = 1000, 3  # of settings that are searched
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
    beside, place = [saved], 'the file'
    for _ in range(3):
        name = _find_nested(saved)
        if name is None:
            break
        others = [n for n in _NESTED if n not in _AVERAGES and _is_state(saved.get(n))]
        if name in _AVERAGES and others:
            _LOGGER.warning(
                '%s holds the network twice, as %s and %s; the moving average %s is '
                'used; to use the other, save it alone',
                *(path, others[0], name, name),
            )
        saved, place = saved[name], name
        beside.append(saved)
    if not _holds_network(saved):
        saved, place, more = _search(path, beside[0]) or (saved, place, [])
        beside += more
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


def _search(path, saved):
    """Finds a state dict under any key: the dict, its place, all dicts around it."""
    found, waiting = [], [(saved, '', [])]
    while waiting and len(found) < _MOST:
        value, place, around = waiting.pop(0)
        if _holds_network(value) and not isinstance(value, torch_pickle.Record):
            found.append((value, place, around))
            continue
        if place.count('.') > _DEEPEST:
            continue
        inner = value.items() if isinstance(value, dict) else ()
        inner = enumerate(value) if isinstance(value, list) else inner
        for key, one in list(inner)[:_MOST]:
            if isinstance(one, dict | list | torch_pickle.Module):
                waiting.append((one, f'{place}.{key}', [*around, value]))
    if not found:
        return None
    averages = [one for one in found if torch_matcher.is_average(one[1].lower())]
    chosen = averages if len(averages) == 1 else found
    places = ' and '.join(printable(one[1].strip('.')) for one in found[:4])
    if len(chosen) > 1:
        raise UserError(
            f'{path} holds {len(found)} networks, as {places}; choose one and save it '
            "alone: torch.save(torch.load(FILE)['KEY'], NEW)"
        )
    value, place, around = chosen[0]
    place = printable(place.strip('.'))
    if len(found) > 1:
        _LOGGER.warning(
            '%s holds networks as %s; the moving average %s is used; to use the other, '
            'save it alone',
            *(path, places, place),
        )
    return value, place, [one for one in (*around, value) if isinstance(one, dict)]


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
    found = {}  # where each list is
    waiting = [part for part in beside if isinstance(part, dict)]
    for part in list(waiting):
        for name in _SETTINGS:
            waiting += _settings(part.get(name))
    for part in waiting:
        for name in _NAMES:
            names = heads.order_names(_fill(_plain(part.get(name))))
            if names:
                found.setdefault(names, name)
    lengths = collections.Counter(map(len, found))
    several = [names for names in found if lengths[len(names)] > 1]
    note = ''
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
