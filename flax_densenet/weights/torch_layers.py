"""Compares the layers of a pickled PyTorch network with those that are computed here.

Pooling, ReLU, strides and epsilons leave no trace in the arrays, but a pickle of the
complete model has them. A layer that differs would change the results, so it is
computed as the file says, or the file is refused by the layer's name.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from flax_densenet.errors import UserError, printable
from flax_densenet.weights import head_layers, torch_matcher

EPSILON = 1e-5  # of batch norm in torch
# Layers that do nothing at inference.
SILENT = {
    *('Identity', 'Dropout', 'Dropout1d', 'Dropout2d', 'Dropout3d', 'AlphaDropout'),
    *('FeatureAlphaDropout', 'DropBlock2d', 'DropPath'),
}
_NORMS = {'BatchNorm2d', 'SyncBatchNorm'}
_NORMS_WITH_RELU = {'BatchNormAct2d', 'SyncBatchNormAct', 'FrozenBatchNormAct2d'}
_NORM, _RELU, _BLOCK = 'BatchNorm2d', 'ReLU', 'dense block'
_OPEN = {
    *('Sequential', 'DataParallel', 'DistributedDataParallel'),
    *('_Transition', 'DenseTransition'),
}
# By the package of a DenseNet: its children in the order in which they are called. A
# name in upper case is a function, which is no child.
_CALLED = {
    'torchvision': ('features', 'RELU', 'MEAN', 'classifier'),
    'torchxrayvision': ('features', 'RELU', 'MEAN', 'classifier'),
    'timm': ('features', 'global_pool', 'head_drop', 'classifier'),
    'monai': ('features', 'class_layers'),
}
_FUNCTIONS = {'RELU': _RELU, 'MEAN': 'AdaptiveAvgPool2d'}
_POOLINGS = {
    'AdaptiveAvgPool2d': 'mean',
    'FastAdaptiveAvgPool': 'mean',
    'FastAdaptiveAvgPool2d': 'mean',
    'AdaptiveMaxPool2d': 'max',
    'FastAdaptiveMaxPool': 'max',
}
_MOST_NETWORKS, _DEEPEST = 16, 50
# After these, a ReLU changes nothing.
_RECTIFIED = (_RELU, 'MaxPool2d', 'BlurPool2d')
_RELU_NAME = re.compile(r'(denselayer\d+\.relu)\.(\d)')


def _conv(size, stride=1):
    return 'Conv2d', {
        **{'kernel_size': size, 'stride': stride, 'padding': size // 2},
        **{'dilation': 1, 'groups': 1, 'padding_mode': 'zeros'},
    }


def _max_pool(stride):
    found = {'kernel_size': 3, 'stride': stride, 'padding': 1, 'dilation': 1}
    return 'MaxPool2d', found | {'ceil_mode': False, 'return_indices': False}


_PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    kind: (kind, {}) for kind in (_NORM, _RELU, _BLOCK)
}
_UNIT = [_PLAIN[_NORM], _PLAIN[_RELU]]
_BLUR = [
    _max_pool(1),
    ('BlurPool2d', {'filt_size': 3, 'stride': 2, 'pad_mode': 'reflect'}),
]
_HALVE = {'kernel_size': 2, 'stride': 2, 'padding': 0, 'ceil_mode': False}
_TRANSITION = [*_UNIT, _conv(1), ('AvgPool2d', {**_HALVE, 'divisor_override': None})]


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a pickled module.

    Attributes:
      classes: `{name of a module: its class}`, with '' for the outermost one. The names
        are those of `torch_matcher.plain_key`.
      settings: `{name of a module: {name of an attribute: plain value}}`.
      children: `{name of a module: names of the modules in it, in order}`.
    """

    classes: dict[str, str]
    settings: dict[str, dict[str, Any]]
    children: dict[str, list[str]]

    @classmethod
    def of(
        cls,
        classes: dict[str, str],
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> 'Layers':
        """From the names of modules in the file."""
        plain, values = {}, {}
        children = collections.defaultdict(list)
        for name, kind in classes.items():
            new = torch_matcher.plain_key(f'{name}.').removesuffix('.') if name else ''
            new = _RELU_NAME.sub(r'\1\2', new)
            if new in plain:  # a wrapper, whose name is left out
                continue
            plain[new], values[new] = kind, (settings or {}).get(name, {})
            if new:
                children[new.rpartition('.')[0]].append(new)
        return cls(plain, values, dict(children))

    def kind(self, name: str) -> str:
        """The class of a layer, without its module."""
        return self.classes.get(name, 'module of unknown class').rpartition('.')[2]

    def epsilon(self, name: str) -> float:
        """The epsilon of a batch norm.

        Raises:
          Unreadable: it is not a number of the usual size.
        """
        found = self.settings[name].get('eps', EPSILON)
        if not isinstance(found, int | float) or not 0 <= found <= 1:
            raise head_layers.Unreadable(f'{name} has eps={_show(found)}')
        return found

    def leaves(self, name: str) -> Iterator[tuple[str, str]]:
        """The layers in a module as `(name, class)`, in the order of their calls.

        What is in modules of unknown order is left out.
        """
        kind, inside = self.kind(name), self.children.get(name, [])
        package = self.classes.get(name, '').partition('.')[0]
        if _is_block(inside):
            yield name, _BLOCK
        elif kind in _NORMS_WITH_RELU:
            yield name, _NORM
            kinds = {child: self.kind(child) for child in inside}
            for child, one in kinds.items():
                if child.endswith('.act') or one not in SILENT:
                    yield child, one
        elif kind == 'SelectAdaptivePool2d' and inside:
            for child in inside:
                yield child, self.kind(child)
        elif kind.startswith('DenseNet') and package in _CALLED:
            prefix = f'{name}.' if name else ''
            for child in _CALLED[package]:
                if child in _FUNCTIONS:
                    yield f'{prefix}{child.lower()}', _FUNCTIONS[child]
                elif f'{prefix}{child}' in self.classes:
                    yield from self.leaves(f'{prefix}{child}')
        elif kind in _OPEN:
            for child in inside:
                yield from self.leaves(child)
        else:
            yield name, _NORM if kind in _NORMS else kind

    def norm_of(self, body: str) -> str | None:
        """The last norm of the network whose names start with `body`."""
        found = list(self.inside(body.removesuffix('.')))
        blocks = [n for n, (_, kind) in enumerate(found) if kind == _BLOCK]
        behind = found[blocks[-1] + 1 :] if blocks else []
        return next((name for name, kind in behind if kind == _NORM), None)

    def inside(self, name: str) -> Iterator[tuple[str, str]]:
        """The same for a module of any class, with its children in order."""
        for child in self.children.get(name, []):
            yield from self.leaves(child)


def _is_block(names):
    return any(name.rpartition('.')[2].startswith('denselayer') for name in names)


def check(path: str, layers: Layers) -> dict[str, Any]:
    """Compares all layers up to the last norm with a DenseNet's.

    Returns:
      Fields of `DenseNet` that leave no trace in the arrays.

    Raises:
      UserError: a layer differs in a way that no field describes.
    """
    bodies = dict.fromkeys(
        block.rpartition('.')[0]
        for block, inside in layers.children.items()
        if block and _is_block(inside)
    )
    if len(bodies) > _MOST_NETWORKS:
        raise UserError(f'{path} holds {len(bodies)} networks; save one of them alone')
    if max(name.count('.') for name in layers.classes) > _DEEPEST:
        raise UserError(f'{path} nests its modules deeper than {_DEEPEST} levels')
    fields = {}
    for body in bodies:
        checked = _Body(path, layers, body)
        checked.check_front()
        try:
            fields = checked.check_layers()
        except head_layers.Unreadable as error:
            checked.refuse(str(error))
    return fields


class _Body:
    """The part of a network from the first convolution to the last norm."""

    def __init__(self, path, layers, name):
        self._path, self._layers, self._name = path, layers, name
        self._epsilons = {}

    def refuse(self, what):
        """Raises a line about a layer."""
        raise UserError(
            f'{self._path}: its {printable(what)}; this network is not computed here, '
            'run it in torch'
        )

    def check_front(self):
        """Refuses layers in front of the network, in each Sequential around it."""
        layers, inner = self._layers, self._name
        while inner:
            outer = inner.rpartition('.')[0]
            is_open = layers.kind(outer) in _OPEN
            for sibling in layers.children.get(outer, []) if is_open else []:
                if sibling == inner:
                    break
                for name, kind in layers.leaves(sibling):
                    if kind not in SILENT:
                        self._refuse_front(name, kind, inner)
            inner = outer

    def _refuse_front(self, name, kind, inner):
        parts = inner.split('.')
        place = ''.join(f'[{p}]' if p.isdecimal() else f'.{p}' for p in parts)
        raise UserError(
            f'{self._path}: its {printable(name)} is {printable(kind)} in front of the '
            'network, which is not computed here; if the network works without it: '
            f'torch.save(model{printable(place)}, FILE)'
        )

    def check_layers(self):
        """Compares each layer with the plan; returns the fields of `DenseNet`."""
        layers = self._layers
        found = list(layers.inside(self._name))
        blocks = [n for n, (_, kind) in enumerate(found) if kind == _BLOCK]
        blur = any(kind == 'BlurPool2d' for _, kind in found[: blocks[0]])
        plan = self._plan(found[: blocks[0]], blur)
        for _ in blocks[1:]:
            plan += [_PLAIN[_BLOCK], *_TRANSITION]
        plan += [_PLAIN[_BLOCK], _PLAIN[_NORM]]
        self._compare(found, plan)
        for number in blocks:
            self._check_block(found[number][0])
        fields = (
            {'blur_pool': blur} if self._is_deep(found[: blocks[0]]) or blur else {}
        )
        return fields | self._epsilon()

    def _is_deep(self, stem):
        return sum(kind == 'Conv2d' for _, kind in stem) > 1

    def _plan(self, stem, blur):
        """What is expected in front of the first block."""
        pool = _BLUR if blur else [_max_pool(2)]
        if self._is_deep(stem):
            return [_conv(3, 2), *_UNIT, _conv(3), *_UNIT, _conv(3), *_UNIT, *pool]
        sizes = [
            _pair(self._layers.settings[name].get('kernel_size', 3))
            for name, kind in stem
            if kind == 'Conv2d'
        ]
        has_norm = any(kind == _NORM for _, kind in stem)
        if sizes and sizes[0] != (7, 7) and not has_norm:
            return [_conv(3)]
        return [_conv(7, 2), *_UNIT, *pool]

    def _check_block(self, block):
        for layer in self._layers.children[block]:
            if not layer.rpartition('.')[2].startswith('denselayer'):
                if (kind := self._layers.kind(layer)) not in SILENT:
                    self.refuse(f'{layer} is {kind}, which no DenseNet has there')
                continue
            found = list(self._layers.inside(layer))
            count = sum(kind == 'Conv2d' for _, kind in found)
            inner = [*_UNIT, _conv(1)] if count > 1 else []
            self._compare(found, [*inner, *_UNIT, _conv(3)])

    def _compare(self, found, plan):
        """Refuses the first layer that is not in the plan, or is not as it says."""
        kinds = [kind for kind, _ in plan]
        place, skipped = 0, None
        for number, (name, kind) in enumerate(found):
            wanted = kinds[place] if place < len(plan) else None
            if kind == wanted:
                self._check_settings(name, plan[place])
                place, skipped = place + 1, None
            elif kind in SILENT:
                if kind == 'Identity':
                    skipped = skipped or f'{name} is {kind}'
            elif kind == _RELU and place and kinds[place - 1] in _RECTIFIED:
                continue
            elif wanted is None:
                if kind in ('Flatten', 'Linear', *_POOLINGS):  # of the head
                    return
                if kind != _RELU:
                    self.refuse(f'{name} is {kind}, which no DenseNet has there')
            elif skipped:
                self.refuse(f'{skipped} where a DenseNet has {wanted}')
            elif kinds[place + 1 : place + 2] == [kind]:
                self.refuse(f'{name} has no {wanted} in front of it')
            elif number + 1 < len(found) and found[number + 1][1] == wanted:
                self.refuse(f'{name} is {kind}, which no DenseNet has there')
            else:
                self.refuse(f'{name} is {kind} where a DenseNet has {wanted}')
        # Missing arrays are reported with their names later.
        if skipped and place < len(plan):
            self.refuse(f'{skipped} where a DenseNet has {kinds[place]}')

    def _check_settings(self, name, planned):
        kind, wanted = planned
        has = self._layers.settings[name]
        if kind == _NORM:
            self._epsilons.setdefault(self._layers.epsilon(name), name)
        for key, value in wanted.items():
            found = has.get(key, value)
            if found == 'same' and _pair(has.get('stride', 1)) == (1, 1):
                found = value  # the size of the kernel is compared, too
            if found == 'valid':
                found = 0
            if _pair(found) != _pair(value):
                self.refuse(
                    f'{name} has {key}={_show(found)} where a DenseNet has '
                    f'{_show(value)}'
                )

    def _epsilon(self):
        if len(self._epsilons) > 1:
            (one, first), (other, second), *_ = self._epsilons.items()
            self.refuse(f'{first} has eps={one} and {second} has eps={other}')
        (epsilon,) = self._epsilons or (EPSILON,)
        return {} if epsilon == EPSILON else {'epsilon': epsilon}


def _pair(value):
    """`(3, 3)` of 3; `(3, 3)` of `[3, 3]`."""
    if isinstance(value, list | tuple):
        return tuple(value)
    return value, value


def _show(value):
    both = _pair(value)
    return str(both[0] if len(set(map(repr, both))) == 1 else both)


def read_front(layers: Layers, body: str, place: str) -> dict[str, Any] | None:
    """The fields of `DenseNet` about what is between the body and a Linear layer.

    Args:
      body: prefix of the names of the body, such as `0.0.`.
      place: name of the first layer of the head that has arrays.

    Returns:
      None if the order of the layers is unknown.

    Raises:
      Unreadable: there is something that our networks do not have.
    """
    norm = layers.norm_of(body)
    if norm is None:
        return None
    scope = norm
    while scope and not f'{place}.'.startswith(f'{scope}.'):
        scope = scope.rpartition('.')[0]
    found = list(layers.leaves(scope))
    names = [name for name, _ in found]
    if norm not in names or place not in names:
        if layers.kind(scope) in _OPEN:
            raise head_layers.Unreadable(
                f'the order of the layers in {scope} is unclear'
            )
        return None
    first, last = names.index(norm), names.index(place)
    if last < first:
        raise head_layers.Unreadable('its layers come in another order')
    relu, pooling = False, None
    for name, kind in found[first + 1 : last]:
        if kind == _RELU and pooling is None:
            relu = True
        elif kind in _POOLINGS and pooling is None:
            pooling = _POOLINGS[kind]
        # Values after a ReLU stay as they are with another.
        elif kind not in (*SILENT, 'Flatten') and not (kind == _RELU and relu):
            raise head_layers.Unreadable(f'{name} is a {kind}')
    if pooling is None:
        raise head_layers.Unreadable('it has no global pooling')
    fields = {} if relu else {'last_relu': False}
    return fields | ({} if pooling == 'mean' else {'pooling': pooling})
