"""Files of arrays that were shuffled, renamed, duplicated or dropped, and their logits.

The logits are computed with numpy from the arrays before anything was done to them. A
file of which something else would be computed must be refused, or its line must say
what is a guess.
"""

import functools
import logging

import numpy as np

from flax_densenet.models import layers
from flax_densenet.weights import weight_file

_PREFIXES = (
    *('net.', 'module.', 'model._orig_mod.', 'a.b.c.', '0.', 'backbone.', 'features.'),
    *('model.module.', 'student.net.', 'encoder.'),
)
_AVERAGES = ('ema.', 'model_ema.module.', 'swa_model.', 'a.ema_model.')
_BESIDE = {
    'criterion.pos_weight': (5,),
    'optimizer.state.0.exp_avg': (4, 3),
    'val_auroc.thresholds': (7,),
    'loss_fn.weight': (5,),
    'n_averaged': (),
}


def _dense(x, arrays, place):
    return x @ arrays[f'{place}.weight'].T + arrays.get(f'{place}.bias', 0)


def _norm(x, arrays, place):
    weight, bias, mean, var = (
        arrays[f'{place}.{leaf}']
        for leaf in ('weight', 'bias', 'running_mean', 'running_var')
    )
    shape = (-1,) + (1,) * (x.ndim - 2)
    scale = weight / np.sqrt(var + 1e-5)
    return (x - mean.reshape(shape)) * scale.reshape(shape) + bias.reshape(shape)


def _conv(x, weight):
    """A convolution of stride 1 with images `[N, C, H, W]`."""
    around = weight.shape[-1] // 2
    x = np.pad(x, ((0, 0), (0, 0), (around, around), (around, around)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))
    return np.einsum('nchwij,fcij->nfhw', windows, weight, optimize=True)


def _relu(x):
    return np.maximum(x, 0)


def logits(arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Of a DenseNet with the CIFAR stem in torchvision's names, in double precision.

    Args:
      x: normalized images `[N, C, H, W]`.
    """
    arrays = {name: np.float64(array) for name, array in arrays.items()}
    x, blocks = _conv(x, arrays['features.conv0.weight']), 0
    while f'features.denseblock{blocks + 1}.denselayer1.conv1.weight' in arrays:
        if blocks:
            place = f'features.transition{blocks}'
            x = _conv(_relu(_norm(x, arrays, f'{place}.norm')),
                arrays[f'{place}.conv.weight'])  # fmt: skip
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
        blocks, layer = blocks + 1, 1
        while (
            f'{(place := f"features.denseblock{blocks}.denselayer{layer}")}'
            '.conv1.weight' in arrays
        ):
            y = _relu(_norm(x, arrays, f'{place}.norm1'))
            y = _relu(_norm(_conv(y, arrays[f'{place}.conv1.weight']), arrays,
                f'{place}.norm2'))  # fmt: skip
            y = _conv(y, arrays[f'{place}.conv2.weight'])
            x, layer = np.concatenate([x, y], 1), layer + 1
    x = _relu(_norm(x, arrays, 'features.norm5')).mean((2, 3))
    if 'classifier.weight' in arrays:
        return _dense(x, arrays, 'classifier')
    x = _dense(x, arrays, 'classifier.0')
    if 'classifier.4.weight' not in arrays:
        return x
    if 'classifier.1.weight' in arrays:
        x = _norm(x, arrays, 'classifier.1')
    return _dense(_relu(x), arrays, 'classifier.4')


IMAGES = np.random.default_rng(5).normal(0, 1, (2, 3, 4, 4))


@functools.cache
def networks() -> dict[str, dict[str, np.ndarray]]:
    """State dicts by the names of their heads."""
    rng, made = np.random.default_rng(0), {}

    def conv(name, out, width, side):
        values = rng.normal(
            0, (2 / (width * side * side)) ** 0.5, (out, width, side, side)
        )
        made[f'{name}.weight'] = values

    def norm(name, width):
        for leaf in ('weight', 'running_var'):
            made[f'{name}.{leaf}'] = rng.uniform(0.5, 1.5, width)
        for leaf in ('bias', 'running_mean'):
            made[f'{name}.{leaf}'] = rng.normal(0, 0.5, width)

    def linear(name, width, out):
        made[f'{name}.weight'] = rng.normal(0, 1, (out, width))
        made[f'{name}.bias'] = rng.normal(0, 1, out)

    conv('features.conv0', 4, 3, 3)
    width = 4
    for block, size in enumerate((2, 1), start=1):
        for number in range(1, size + 1):
            place = f'features.denseblock{block}.denselayer{number}'
            norm(f'{place}.norm1', width)
            conv(f'{place}.conv1', 4, width, 1)
            norm(f'{place}.norm2', 4)
            conv(f'{place}.conv2', 2, 4, 3)
            width += 2
        if block == 1:
            norm('features.transition1.norm', width)
            conv('features.transition1.conv', width // 2, width, 1)
            width //= 2
    norm('features.norm5', width)
    body, heads = dict(made), {}
    for kind in ('plain', 'two layers', 'norm'):
        made.clear()
        if kind == 'plain':
            linear('classifier', width, 3)
        else:
            linear('classifier.0', width, 7)
            linear('classifier.4', 7, 3)
        if kind == 'norm':
            norm('classifier.1', 7)
        heads[kind] = {k: np.float32(v) for k, v in (body | made).items()}
    return heads


def average_of(arrays):
    """Other arrays of the same shapes."""
    return {
        name: np.asarray(array * np.float32(1.25)) for name, array in arrays.items()
    }


@functools.cache
def truths() -> tuple[np.ndarray, ...]:
    """Logits of all networks and of their averages."""
    found = list(networks().values())
    # Without its last layer, this is the file of another network.
    two = networks()['two layers']
    found.append({k: v for k, v in two.items() if 'classifier.4' not in k})
    return tuple(
        logits(arrays, IMAGES) for one in found for arrays in (one, average_of(one))
    )


def change(rng, arrays):
    """Does one to three things to arrays; rng is a `random.Random`."""
    arrays = dict(arrays)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.randrange(9)
        names = sorted(arrays)
        name = rng.choice(names)
        parts = name.split('.')
        if kind == 0:
            del arrays[name]
        elif kind == 1:  # a whole module
            place = name.rpartition('.')[0]
            arrays = {k: v for k, v in arrays.items() if not k.startswith(f'{place}.')}
        elif kind == 2:
            part = rng.randrange(len(parts))
            parts[part] = rng.choice(('x', parts[part] + '0', 'layer9', '7', 'weight'))
            new = '.'.join(parts)
            if new not in arrays:
                arrays[new] = arrays.pop(name)
        elif kind == 3:
            prefix = rng.choice(_PREFIXES)
            arrays = {f'{prefix}{k}': v for k, v in arrays.items()}
        elif kind == 4:  # a copy of one array, with other numbers
            prefix = rng.choice((*_PREFIXES, *_AVERAGES, 'copy.'))
            arrays.setdefault(f'{prefix}{name}', np.asarray(arrays[name] + 1))
        elif kind == 5:
            prefix = rng.choice(_AVERAGES)
            arrays |= {f'{prefix}{k}': v for k, v in average_of(arrays).items()}
        elif kind == 6:
            beside = rng.choice(sorted(_BESIDE))
            arrays[beside] = np.ones(_BESIDE[beside], np.float32)
        elif kind == 7:  # a copy of the network without an array
            prefix = rng.choice((*_PREFIXES, *_AVERAGES))
            copy = {f'{prefix}{k}': v for k, v in average_of(arrays).items()}
            copy.pop(f'{prefix}{name}')
            arrays = copy | arrays
        else:  # without the wrapper of some arrays
            arrays = {
                k.replace('features.', '', 1) if rng.random() < 0.5 else k: v
                for k, v in arrays.items()
            }
        if not arrays:
            break
    order = list(arrays)
    rng.shuffle(order)
    return {name: arrays[name] for name in order}


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def check(path: str):
    """Loads a file of `change`; an AssertionError tells that it is silently wrong."""
    handler, logger = _Lines(), logging.getLogger('flax_densenet')
    logger.addHandler(handler)
    try:
        found = weight_file.load(path)
    finally:
        logger.removeHandler(handler)
    if not found.num_classes or found.notes:
        return found
    made = logits(_to_torch(found), IMAGES)
    for number, truth in enumerate(truths()):
        if made.shape == truth.shape and np.allclose(made, truth, 1e-3, 1e-4):
            averaged = any('moving average' in line for line in handler.lines)
            assert averaged or number % 2 == 0 or not handler.lines, handler.lines
            return found
    raise AssertionError(f'loads with other logits: {handler.lines}')


def _to_torch(found):
    """Arrays of loaded weights under torchvision's names."""
    from flax import traverse_util

    from flax_densenet.weights import torch_names

    flat = traverse_util.flatten_dict(found.variables, sep='/')
    arrays = {
        torch_names.torch_key(name): torch_names.to_torch_layout(np.asarray(array))
        for name, array in flat.items()
    }
    count = len(layers.linear_layers(found.variables['params']['classifier']))
    if count == 2:  # the ReLU's number there is 1
        for leaf in ('weight', 'bias'):
            arrays[f'classifier.4.{leaf}'] = arrays.pop(f'classifier.2.{leaf}')
    return arrays
