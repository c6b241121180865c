"""Finds a DenseNet among the arrays of a PyTorch file by its structure.

It works with any prefix of the names, and with other arrays in the file: a loss,
metrics, an optimizer, or a moving average of the same network.

>>> plain_key('net._orig_mod.features.denseblock1.denselayer2.layers.norm.1.weight')
'net.features.denseblock1.denselayer2.norm1.weight'
"""

import collections
import dataclasses
import logging
import os
import re

import numpy as np

from flax_densenet.data import bands
from flax_densenet.errors import UserError, list_first, printable
from flax_densenet.weights import rdnet_names, torch_copies

_LOGGER = logging.getLogger(__name__)
_WRAPPERS = re.compile(
    r'(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.'
)
_OLD_NAMES = re.compile(r'(denselayer\d+\.(?:norm|conv))\.(\d)(?=\.)')
_INNER = re.compile(r'(denselayer\d+)\.layers\.')
_START = re.compile(r'((?:.*?\.)?)denseblock\d+\.denselayer\d+\..+')
_NUMBERED = re.compile(r'((?:.*?\.)?)(\d{1,3})\.denselayer\d+\..+')
_BODY = re.compile(r'(?:conv\d|norm\d|denseblock\d+|transition\d+)\..+')
HEADS = (
    *('classifier', 'classifier.0', 'classifier.1', 'class_layers.out'),
    *('fc', 'head', 'head.fc'),
)
# Words that mark arrays outside of a network, anywhere in a name.
_BESIDE = re.compile(
    r'criterion\w*|\w*loss(es)?(_\w+)?|\w*metrics?(_\w+)?|\w*(auroc|auc|accuracy|acc|'
    r'precision|recall|f1|confusion\w*|calibration_error|specificity)\d*|optimizers?|'
    r'optim|\w*scheduler\w*|n_averaged|\w*pos_weight|class_weights?|op_threshs'
)
_MEANS = {'mean', 'mu', 'pixel_mean', 'image_mean', 'new_mean'}
_STDS = {'std', 'sigma', 'pixel_std', 'image_std', 'new_std'}


@dataclasses.dataclass(frozen=True)
class Match:
    """A network found among arrays.

    Attributes:
      keys: `{torchvision's key: key in the file}` of everything that belongs to the
        network, such as `features.conv0.weight` and `classifier.bias`; unknown keys do
        not change.
      head: `{name without wrappers: key in the file}` of the arrays of a head with
        several layers; empty otherwise.
      body: prefix of the network's names, such as `net.features.`.
      width: number of features of the network; None if its last norm is missing.
      place: name of the single Linear layer after the network; '' for none.
      means: keys of arrays that look like the mean and std of images.
    """

    keys: dict[str, str]
    head: dict[str, str] = dataclasses.field(default_factory=dict)
    means: tuple[str, str] | None = None
    body: str = ''
    width: int | None = None
    place: str = ''


def plain_key(key: str) -> str:
    """A key with current layer names and without the names of wrappers."""
    key = _INNER.sub(r'\1.', _WRAPPERS.sub('', key))
    return _OLD_NAMES.sub(r'\1\2', key)


def match(path: str, arrays: dict[str, np.ndarray]) -> Match:
    """Finds the network in a file; a warning reports what is left out.

    Args:
      path: the file, for messages.
      arrays: `{key in the file: array}`.

    Raises:
      UserError: there are several networks or heads, and it is unclear which to use.
    """
    plain = {}
    for key in arrays:
        name = plain_key(key)
        plain[name if name not in plain else key] = key
    plain = _name_numbered(plain, arrays)
    starts = _find_starts(plain)
    if not starts:
        return Match(plain)
    start = _choose(path, starts, plain, arrays)
    return _Network(path, start, starts, plain, arrays).match()


def is_of_network(key: str) -> bool:
    """Whether a key belongs to a dense layer, whatever its prefix."""
    name = plain_key(key)
    return bool(
        _START.fullmatch(name)
        or _NUMBERED.fullmatch(name)
        or rdnet_names.find_prefix([key]) is not None
    )


def _find_starts(plain):
    """The prefix of the dense blocks of each network, including `features.`."""
    found = (_START.fullmatch(name) for name in plain)
    return tuple(dict.fromkeys(one[1] for one in found if one))


def _name_numbered(plain, arrays):
    """Names the children of a Sequential: 0, 1, 4 are conv0, norm0, denseblock1."""
    found = [(name, _NUMBERED.fullmatch(name)) for name in plain]
    starts = dict.fromkeys(one[1] for _, one in found if one)
    for start in starts:
        if any(name.startswith(f'{start}denseblock') for name in plain):
            continue
        names = _names_of_numbers(start, plain, arrays)
        if names is None:
            continue
        plain = {
            _replace_number(name, start, names): key for name, key in plain.items()
        }
    return plain


def _replace_number(name, start, names):
    if not name.startswith(start):
        return name
    number, _, rest = name.removeprefix(start).partition('.')
    return f'{start}{names[number]}.{rest}' if number in names else name


def _names_of_numbers(start, plain, arrays):
    """`{'0': 'conv0', ...}` of a Sequential; None if it is not a DenseNet."""
    children = collections.defaultdict(dict)
    for name, key in plain.items():
        number, _, rest = name.removeprefix(start).partition('.')
        if name.startswith(start) and number.isdecimal():
            children[int(number)][rest] = arrays[key]
    names, block = {}, 0
    for number in sorted(children):
        inside = children[number]
        if any(name.startswith('denselayer') for name in inside):
            block += 1
            names[number] = f'denseblock{block}'
        elif 'conv.weight' in inside:
            names[number] = f'transition{block}'
        elif 'running_mean' in inside:
            names[number] = 'norm0' if not block else 'norm5'
        elif getattr(inside.get('weight'), 'ndim', 0) == 4 and not block:
            names[number] = 'conv0'
    given = list(names.values())
    if len(set(given)) < len(given) or 'conv0' not in given:
        return None
    return {str(number): name for number, name in names.items()}


def _choose(path, starts, plain, arrays):
    if len(starts) == 1:
        return starts[0]

    def are_equal():
        first, *parts = (_part(start, plain, arrays) for start in starts)
        return all(torch_copies.equal_arrays(first, part) for part in parts)

    number = torch_copies.choose(
        path,
        [start or '(no prefix)' for start in starts],
        [n for n, start in enumerate(starts) if torch_copies.is_average(start)],
        are_equal=are_equal,
        remedy='torch.save(model.NAME.state_dict(), FILE)',
    )
    return starts[number]


def _part(start, plain, arrays):
    return {
        name.removeprefix(start): arrays[key]
        for name, key in plain.items()
        if name.startswith(start) and _BODY.fullmatch(name.removeprefix(start))
    }


class _Network:
    """One network in a file, with its head and its surroundings."""

    def __init__(self, path, start, starts, plain, arrays):
        self._path, self._start, self._starts = path, start, starts
        self._plain, self._arrays = plain, arrays
        self._keys, self._head, self._head_place = {}, {}, ''
        self._width = self._find_width()

    def _array(self, name):
        return self._arrays[self._plain[name]]

    def _find_width(self):
        """Number of features after the body, if its last norm exists."""
        name = f'{self._start}norm5.weight'
        if name in self._plain and getattr(self._array(name), 'ndim', 0) == 1:
            return len(self._array(name))
        return None

    def match(self):
        inside, around, beside = [], [], []
        for name in self._plain:
            rest = name.removeprefix(self._start)
            mine = name.startswith(self._start)
            if mine and (self._start.endswith('features.') or _BODY.fullmatch(rest)):
                inside.append(name)
            elif self._is_of_copy(name) or _is_beside(name):
                beside.append(name)
            else:
                around.append(name)
        for name in inside:
            key = f'features.{name.removeprefix(self._start)}'
            self._keys[key] = self._plain[name]
        means, around = self._take_means(around)
        self._refuse_layers_in_front(around)
        root = self._start.removesuffix('features.')
        scope, taken = self._find_head(root, around)
        for name in around:
            # Arrays below a prefix of another network belong to that one.
            if name not in taken and name.startswith(scope):
                self._keys[name] = self._plain[name]
            elif name not in taken:
                beside.append(name)
        _tell(self._path, beside)
        return Match(
            self._keys, self._head, means, self._start, self._width, self._head_place
        )

    def _is_of_copy(self, name):
        return any(
            _is_of_other(name, self._start, start)
            for start in self._starts
            if start != self._start
        )

    def _refuse_layers_in_front(self, names):
        """Raises if a Sequential has layers with arrays before the network."""
        parts = self._start.removesuffix('features.').split('.')[:-1]
        for depth, number in enumerate(parts):
            parent = ''.join(f'{part}.' for part in parts[:depth])
            inside = [name for name in names if name.startswith(parent)]
            children = {
                name: name.removeprefix(parent).split('.')[0] for name in inside
            }
            front = [
                name
                for name, child in children.items()
                if number.isdecimal() and child.isdecimal() and int(child) < int(number)
            ]
            if front:
                raise UserError(
                    f'{self._path}: {printable(list_first(sorted(front)))} belong to a '
                    'layer in front of the network, which cannot be computed; save the '
                    f'network alone: torch.save(model[{number}].state_dict(), FILE)'
                )

    def _take_means(self, around):
        """The mean and std of a layer before the network that prepares images."""
        found = {}
        for name in around:
            leaf = name.rpartition('.')[2]
            if leaf in _MEANS | _STDS and self._is_short(name):
                found.setdefault('mean' if leaf in _MEANS else 'std', []).append(name)
        if {kind: len(names) for kind, names in found.items()} != {'mean': 1, 'std': 1}:
            return None, around
        names = found['mean'][0], found['std'][0]
        keys = tuple(self._plain[name] for name in names)
        return keys, [name for name in around if name not in names]

    def _is_short(self, name):
        """Whether an array may have one number for each channel."""
        return 1 <= np.size(self._array(name)) <= bands.MOST

    def _find_head(self, root, around):
        """The innermost part that holds the network and a Linear layer after it.

        Returns:
          The prefix of that part, and the names that belong to the head.
        """
        scope = root
        while not any(n.startswith(scope) and self._is_linear(n) for n in around):
            if not scope:
                other = [n for n in around if _is_named_head(n.removeprefix(root))]
                return root, self._take_layers(root, around, other)
            scope = scope.rstrip('.').rpartition('.')[0]
            scope += '.' if scope else ''
        inner = [name for name in around if name.startswith(scope)]
        linear = [name for name in inner if self._is_linear(name)]
        fitting = [n for n in linear if self._array(n).shape[1] == self._width]
        # Layers that take the outputs of these belong to the head, wherever they are.
        widths = {self._array(name).shape[0] for name in linear} | {self._width}
        outer = [
            name
            for name in around
            if name not in inner
            and self._is_linear(name)
            and self._array(name).shape[1] in widths
        ]
        place = _place(linear[0])
        known = place.removeprefix(scope) in HEADS
        norms = [n for n in inner if f'{_place(n)}.running_mean' in self._plain]
        found = {name for name in inner if _place(name) == place}
        plain = {name.rpartition('.')[2] for name in found} == {'weight', 'bias'}
        beside = '.' in place and any(
            _place(name) != place and _place(_place(name)) == _place(place)
            for name in inner
        )
        plain = plain and not (beside or norms or outer)
        if len(linear) == 1 and (known or fitting) and plain:
            self._head_place = place
            for name in found:
                leaf = name.rpartition('.')[2]
                self._keys[f'classifier.{leaf}'] = self._plain[name]
            return scope, found
        return scope, self._take_layers(scope, around, [*linear, *norms, *outer])

    def _take_layers(self, scope, around, layers):
        """Records the layers of a head that is not one Linear; returns its names."""

        def parent(name):
            return name.removeprefix(scope).partition('.')[0]

        parents = {parent(name) for name in layers if name.startswith(scope)}
        places = {_place(name) for name in layers}
        taken = {
            name
            for name in around
            if _place(name) in places
            or (name.startswith(scope) and parent(name) in parents)
        }
        self._head = {name: self._plain[name] for name in around if name in taken}
        return taken

    def _is_linear(self, name):
        return name.endswith('weight') and getattr(self._array(name), 'ndim', 0) == 2


def _tell(path, names):
    quiet = ('num_batches_tracked', 'op_threshs')
    names = [name for name in names if not name.endswith(quiet)]
    if names:
        _LOGGER.warning(
            '%s: %d arrays that are not part of the network are left out: %s',
            path,
            len(names),
            printable(list_first(sorted(names))),
        )


def _place(name):
    return name.rpartition('.')[0]


def _is_named_head(name):
    return any(name.startswith(f'{head}.') for head in HEADS)


def _is_beside(name):
    if name.endswith('num_batches_tracked'):
        return False
    return any(_BESIDE.fullmatch(part.lower()) for part in name.split('.'))


def _is_of_other(name, start, other):
    """Whether a name belongs to the network at `other` rather than at `start`.

    >>> _is_of_other('fc.weight', 'ema.features.', 'features.')
    True
    >>> _is_of_other('a.fc.weight', 'b.net.features.', 'a.net.features.')
    True
    """
    mine, theirs = start.split('.'), other.split('.')
    depth = len(os.path.commonprefix([mine, theirs]))
    common = ''.join(f'{part}.' for part in mine[:depth])
    mine, theirs = (
        f'{common}{parts[depth]}.' if parts[depth] not in ('features', '') else None
        for parts in (mine, theirs)
    )
    if theirs is not None:
        return name.startswith(theirs)
    return name.startswith(common) and not (mine and name.startswith(mine))


def of_rdnet(path: str, arrays: dict[str, np.ndarray], prefix: str) -> dict[str, str]:
    """`{timm's key: key in the file}` of an RDNet; a warning lists what is left out.

    Args:
      path: the file, for messages.
      arrays: `{key in the file: array}`.
      prefix: the result of `rdnet_names.find_prefix`.
    """
    keys, beside = {}, []
    for key in arrays:
        if not key.startswith(prefix) or _is_beside(key.removeprefix(prefix)):
            beside.append(key)
        else:
            keys[key.removeprefix(prefix)] = key
    _tell(path, beside)
    return keys
