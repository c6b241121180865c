"""What a torch file holds beside arrays: which state dict, class names, activations."""

import contextlib
import dataclasses
import json
import logging
import re
from typing import Any

import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.weights import heads, torch_pickle

_LOGGER = logging.getLogger(__name__)
# Where trainers keep the weights, the moving average first.
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
_BODY = re.compile(
    r'(^|\.)(features|denseblock\d+|transition\d+|(conv|norm|relu|pool)\d)(\.|$)'
)
_SILENT = ('Dropout', 'Identity', 'Flatten', 'Linear', *_ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class Content:
    """The weights of a torch file.

    Attributes:
      arrays: by their keys.
      class_names: lists of names that stand beside them.
      outputs: one of `heads.OUTPUTS`, where the file tells.
      head: layers behind the classifier that compute something else.
      classes: of the modules by their names, of the outermost by '', where the file
        holds a whole model.
    """

    arrays: dict[str, np.ndarray]
    class_names: tuple[tuple[str, ...], ...] = ()
    outputs: str | None = None
    head: tuple[str, ...] = ()
    classes: dict[str, str] | None = None


def find(path: str, saved: Any) -> Content:
    """The weights in what `torch_pickle.read` gives.

    Args:
      path: of the file, for messages.

    Raises:
      UserError: there are none, or they need classes that are not known.
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
                'taken; save the other alone to use it',
                *(path, others[0], name, name),
            )
        saved, place = saved[name], name
        beside.append(saved)
    outputs, head, classes = None, (), None
    if isinstance(saved, torch_pickle.Module):
        if saved.foreign:
            raise torch_pickle.refusal(path, saved.foreign)
        outputs, head = _read_layers(saved)
        beside.append(saved.attributes)
        classes = {'': saved.name, **saved.layers}
        saved = saved.arrays
    if isinstance(saved, torch_pickle.Record):
        raise torch_pickle.refusal(path, saved.name)
    if not isinstance(saved, dict):
        raise UserError(f'{path} holds a {type(saved).__name__}, no weights')
    names = _find_names(beside)
    # Taken out one by one, here and in `torch_names.rename`, so that no array is in
    # memory twice.
    is_array = {k: isinstance(v, np.ndarray) for k, v in saved.items()}
    arrays = {str(k): saved.pop(k) for k, is_one in is_array.items() if is_one}
    others = [name for name in map(str, saved) if name not in _NAMES]
    if not arrays:
        raise UserError(f'{path} holds no arrays in {place}')
    if others:
        raise UserError(f'{path}: {place} holds {others[0]}, which is not an array')
    return Content(arrays, names, outputs, head, classes)


def names_of_metadata(metadata: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    """Lists of names in the texts of a safetensors file."""
    parts = {}
    for name in _NAMES:
        with contextlib.suppress(ValueError, RecursionError, KeyError):
            parts[name] = json.loads(metadata[name])
    return _find_names([parts])


def _is_state(value):
    return isinstance(value, dict | torch_pickle.Module | torch_pickle.Record)


def _find_nested(saved):
    """The key of the weights in a dict of several things; None: it holds them."""
    if not isinstance(saved, dict):
        return None
    arrays = sum(isinstance(value, np.ndarray) for value in saved.values())
    if arrays > 4:  # a state dict
        return None
    return next((name for name in _NESTED if _is_state(saved.get(name))), None)


def _find_names(beside):
    """All lists of names in dicts around the weights."""
    found, waiting = [], [part for part in beside if isinstance(part, dict)]
    for part in list(waiting):
        for name in _SETTINGS:
            inner = part.get(name)
            inner = inner.fields if isinstance(inner, torch_pickle.Record) else inner
            waiting += [inner] if isinstance(inner, dict) else []
    for part in waiting:
        for name in _NAMES:
            names = heads.order_names(_fill(part.get(name)))
            found += [names] if names else []
    return tuple(dict.fromkeys(found))


def _fill(names):
    """torchxrayvision leaves findings empty that a data set does not have."""
    if not isinstance(names, list | tuple) or not any(names):
        return names
    return [f'output {n}' if name == '' else name for n, name in enumerate(names)]


def _read_layers(module):
    """The activation behind the classifier, and layers that change its outputs."""
    behind, head = False, []
    outputs = None
    for name, kind in module.layers.items():
        if _BODY.search(name):
            continue
        kind = kind.rpartition('.')[2]
        if kind == 'Linear':
            behind, head = True, []
        elif behind and kind in _ACTIVATIONS:
            outputs = _ACTIVATIONS[kind]
        elif behind and kind not in _SILENT and not _holds(module, name):
            head.append(f'{name} ({kind})')
    return outputs, tuple(head)


def _holds(module, name):
    """Whether a module has modules inside."""
    return any(other.startswith(f'{name}.') for other in module.layers)
