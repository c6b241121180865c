"""Converts array names and layouts between torchvision and this package.

features.denseblock1.denselayer1.norm1.weight    torchvision
params/denseblock1/denselayer1/norm1/scale       ours
"""

import dataclasses
import logging
import math
import re
from typing import Any

import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.weights import (
    head_layers,
    rdnet_names,
    torch_head,
    torch_layers,
    torch_matcher,
)

_LOGGER = logging.getLogger(__name__)
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
_CLASSIFIER = re.compile(r'classifier/layer(\d+)')
_TORCH_LEAVES = {ours: k for k, ranks in _LEAVES.items() for ours in ranks.values()}


@dataclasses.dataclass(frozen=True)
class Renamed:
    """The arrays of a PyTorch file under our names.

    Attributes:
      arrays: `{our name: array}` in our layouts; unknown arrays keep their names.
      extra: other content of the file, such as `operating_points`.
      head: layers of a head that cannot be read and is left out.
      reason: why it cannot be read.
      fields: the fields of `DenseNet` that the head determines.
      guess: describes what was guessed about the head; '' for nothing.
      preparation: `mean` and `std`, if the file has them as arrays.
    """

    arrays: dict[str, np.ndarray]
    extra: dict[str, Any]
    head: tuple[str, ...] = ()
    reason: str = ''
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    guess: str = ''
    preparation: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)


def rename(
    path: str,
    arrays: dict[str, np.ndarray],
    layers: torch_layers.Layers | None = None,
    *,
    own: bool = False,
) -> Renamed:
    """Converts PyTorch's keys and layouts to ours.

    Args:
      path: the file, for messages.
      arrays: `{key in the file: array}`; emptied, so that no array is in memory twice.
      layers: the layers of a pickled network; None for other files.
      own: whether this program wrote the file. Its metadata then says how features are
        pooled.

    Raises:
      UserError: the file holds several networks or heads.
    """
    if (prefix := rdnet_names.find_prefix(arrays)) is not None:
        keys = torch_matcher.of_rdnet(path, arrays, prefix)
        chosen = {name: arrays.pop(key) for name, key in keys.items()}
        return Renamed(rdnet_names.rename(chosen, ''), {})
    found, extra = {}, {}
    for key in [key for key in arrays if key.rpartition('.')[2] == 'op_threshs']:
        # torchxrayvision's operating points
        extra['operating_points'] = [
            None if math.isnan(x) else x for x in np.ravel(arrays.pop(key)).tolist()
        ]
    match = torch_matcher.match(path, arrays)
    preparation = _read_means(path, arrays, match.means)
    for name, key in match.keys.items():
        array = arrays.pop(key)
        place, _, leaf = name.rpartition('.')
        if leaf == 'num_batches_tracked':
            continue
        target = _LEAVES.get(leaf, {}).get(array.ndim)
        if place != 'classifier' and not name.startswith('features.'):
            target = None
        if not target:
            found[key] = array
            continue
        collection, leaf = target
        parts = place.removeprefix('features.').split('.')
        found['/'.join((collection, *parts, leaf))] = from_torch_layout(array)
    renamed = Renamed(found, extra, preparation=preparation)
    if own:
        match = dataclasses.replace(match, width=None)
    return _with_head(renamed, arrays, match, layers)


def _with_head(renamed, arrays, match, layers):
    """Adds a head of several layers, or the facts about a head of one Linear."""
    try:
        if match.place:
            head = torch_head.read_front(match.place, match.body, layers)
        elif match.head:
            head = torch_head.read(
                {name: arrays[key] for name, key in match.head.items()},
                width=match.width,
                body=match.body,
                layers=layers,
            )
        else:
            return renamed
    except head_layers.Unreadable as error:
        names = match.head or [f'{match.place}.weight']
        layers = tuple(dict.fromkeys(name.rpartition('.')[0] for name in names))
        return dataclasses.replace(renamed, head=layers, reason=str(error))
    made = renamed.arrays | head.arrays
    return dataclasses.replace(
        renamed, arrays=made, fields=head.fields, guess=head.guess
    )


def _read_means(path, arrays, keys):
    """`mean` and `std` of images from 0 to 1, from arrays before the network."""
    if keys is None:
        return {}
    mean, std = (np.ravel(arrays[key]).astype(float) for key in keys)
    scale = 255 if mean.max() > 2 or std.max() > 2 else 1
    count = max(len(mean), len(std))
    mean, std = (
        tuple(float(f'{x:.7g}') for x in np.resize(v / scale, count))
        for v in (mean, std)
    )
    if not min(std) > 0:
        raise UserError(f'{path}: {keys[1]} has a value that is not above 0')
    _LOGGER.warning(
        '%s: its arrays %s and %s are used as data.mean=%s and data.std=%s',
        *(path, *keys, mean, std),
    )
    return {'mean': mean, 'std': std}


def torch_key(name: str) -> str:
    """Converts our name of an array to torchvision's key; other names do not change."""
    collection, *place, leaf = name.split('/') if name.count('/') else ('', name)
    if (collection, leaf) not in _TORCH_LEAVES:
        return name
    if match := _CLASSIFIER.fullmatch('/'.join(place)):
        # In a Sequential with a ReLU between each two layers.
        return f'classifier.{2 * int(match[1]) - 2}.{_TORCH_LEAVES[collection, leaf]}'
    prefix = [] if place == ['classifier'] else ['features']
    return '.'.join([*prefix, *place, _TORCH_LEAVES[collection, leaf]])


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """Converts `[O, I, H, W]` to `[H, W, I, O]`, `[O, I]` to `[I, O]`, contiguous."""
    return np.ascontiguousarray(
        array.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])
    )


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """Converts `[H, W, I, O]` to `[O, I, H, W]`, `[I, O]` to `[O, I]`, contiguous."""
    return np.ascontiguousarray(
        array.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim])
    )
