"""The modules of a DenseNet of torchvision around its arrays, without torch."""

import re

MODULES = {
    'torch.nn.modules.activation': ['ReLU', 'Sigmoid', 'Tanh'],
    'torch.nn.modules.batchnorm': ['BatchNorm2d'],
    'torch.nn.modules.container': ['Sequential'],
    'torch.nn.modules.conv': ['Conv2d'],
    'torch.nn.modules.linear': ['Linear'],
    'torch.nn.modules.pooling': ['AvgPool2d', 'MaxPool2d'],
    'torchvision.models.densenet': [
        *('DenseNet', '_DenseBlock', '_DenseLayer', '_Transition'),
    ],
}
_CLASSES = {
    **{'conv': 'Conv2d', 'norm': 'BatchNorm2d', 'relu': 'ReLU', 'pool': 'AvgPool2d'},
    **{'denseblock': '_DenseBlock', 'denselayer': '_DenseLayer'},
    'transition': '_Transition',
}
_ORDER = ['norm', 'relu', 'conv', 'pool', 'denseblock', 'transition']
_STEM_ORDER = ['conv', 'norm', 'relu']


def _split(part):
    stem, number = re.fullmatch(r'(.*?)(\d*)', part).groups()
    return stem, int(number or 0)


def _rank(name):
    """The place of a module among the others, as torchvision creates them."""
    ranks, parts = [], name.split('.')
    for depth, part in enumerate(parts):
        stem, number = _split(part)
        if depth == 1 and part != 'norm5' and stem in _STEM_ORDER:
            ranks.append((0, number, _STEM_ORDER.index(stem), ''))
        elif part == 'pool0':
            ranks.append((0, 99, 0, ''))
        else:
            number += 99 if part == 'norm5' else 0
            place = _ORDER.index(stem) if stem in _ORDER else len(_ORDER)
            ranks.append((1, number, place, '' if stem == 'features' else stem))
    return ranks


def _class_of(name, is_last):
    parts = name.split('.')
    if parts[0] == 'classifier':
        return 'Linear' if is_last else 'Sequential'
    if parts[-1] == 'pool0':
        return 'MaxPool2d'
    return _CLASSES.get(_split(parts[-1])[0], 'Sequential')


def layers_of(arrays) -> dict[str, str]:
    """`{name of a module: its class}` in order, with those that have no arrays."""
    last = {name.rpartition('.')[0] for name in arrays}
    names = set(last)
    for name in last:
        parent, _, leaf = name.rpartition('.')
        if leaf.startswith('norm') and leaf != 'norm5':
            names.add(f'{parent}.{leaf.replace("norm", "relu")}')
        if leaf == 'norm0':
            names.add(f'{parent}.pool0')
        if leaf == 'conv':
            names.add(f'{parent}.pool')
    for name in list(names):
        parts = name.split('.')
        names |= {'.'.join(parts[:n]) for n in range(1, len(parts))}
    ordered = sorted(names - {''}, key=_rank)
    return {name: _class_of(name, name in last) for name in ordered}


def build(arrays, make, *, outer):
    """A tree of modules.

    Args:
      arrays: `{key in the state dict: array}`.
      make: `make(name of a class)` returns a module without content.
      outer: the outermost module.
    """
    modules = {'': outer} | {
        name: make(kind) for name, kind in layers_of(arrays).items()
    }
    for name, module in modules.items():
        module.__dict__.update(_parameters={}, _buffers={}, _modules={})
        module.training = False
        if name:
            parent, _, leaf = name.rpartition('.')
            modules[parent]._modules[leaf] = module
    for name, array in arrays.items():
        place, _, leaf = name.rpartition('.')
        modules[place]._parameters[leaf] = array
    return outer
