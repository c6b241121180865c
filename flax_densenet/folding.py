"""Trained networks as plain arrays, batch norm folded into convolutions.

Where a batch norm follows a convolution it becomes the convolution's factor and bias.
Those in front of a ReLU and a convolution cannot (a dense layer's first: section 3 of
the paper has batch norm, ReLU, convolution in this order, on features that other layers
use too); they become a factor and a bias for each feature map.
"""

import dataclasses
from typing import Any

import numpy as np

from flax_densenet import model


@dataclasses.dataclass(frozen=True)
class Affine:
    """`scale * x + bias` of each feature map, float32 `[C]`."""

    scale: np.ndarray
    bias: np.ndarray


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution.

    Attributes:
      kernel: float32 `[K, K, C, F]`.
      bias: float32 `[F]`, or None.
      strides: of both axes.
    """

    kernel: np.ndarray
    bias: np.ndarray | None = None
    strides: int = 1


@dataclasses.dataclass(frozen=True)
class Layer:
    """A dense layer: affine, ReLU, convolution; with two, a ReLU between them."""

    affine: Affine
    convs: tuple[Conv, ...]


@dataclasses.dataclass(frozen=True)
class Transition:
    """Affine, ReLU, 2x2 average pooling, 1x1 convolution.

    The network pools after the convolution. Both are linear, so they can change places,
    and the convolution has a quarter of the positions.
    """

    affine: Affine
    conv: Conv


@dataclasses.dataclass(frozen=True)
class DenseNet:
    """What a DenseNet computes in evaluation.

    Attributes:
      stem: convolutions, each followed by a ReLU where it has a bias.
      pool: `max` (3x3, stride 2), `blur` (3x3 maximum, then a blur of stride 2) or
        None.
      padding: as of `model.DenseNet`, of stem and pooling.
      blocks: layers of each dense block.
      transitions: behind each block but the last.
      last: affine behind the last block; a ReLU, the mean over all positions and the
        classifier follow.
      kernel: of the classifier, `[F, num_classes]`.
      bias: of the classifier.
    """

    stem: tuple[Conv, ...]
    pool: str | None
    padding: str
    blocks: tuple[tuple[Layer, ...], ...]
    transitions: tuple[Transition, ...]
    last: Affine
    kernel: np.ndarray
    bias: np.ndarray


def fold(module: model.DenseNet, variables: dict[str, Any]) -> DenseNet:
    """The network of these variables, `{'params', 'batch_stats'}`, as float32."""
    norms = _Norms(module, variables)
    params = variables['params']
    blocks, transitions = [], []
    for number, size in enumerate(module.block_sizes, start=1):
        place = f'denseblock{number}'
        layers = params[place]
        blocks.append(
            tuple(
                _layer(layers[name], norms, (place, name))
                for name in (f'denselayer{n}' for n in range(1, size + 1))
            )
        )
        name = f'transition{number}'
        if name in params:
            kernel = _float64(params[name]['conv']['kernel'])
            transitions.append(
                Transition(norms.affine((name, 'norm')), Conv(_float32(kernel)))
            )
    return DenseNet(
        stem=_stem(module, params, norms),
        pool=None if module.stem == 'cifar' else 'blur' if module.blur_pool else 'max',
        padding=module.padding,
        blocks=tuple(blocks),
        transitions=tuple(transitions),
        last=norms.affine(('norm5',)),
        kernel=_float32(params['classifier']['kernel']),
        bias=_float32(params['classifier']['bias']),
    )


class _Norms:
    """Batch norms by their path in the variables."""

    def __init__(self, module, variables):
        self._epsilon, self._variables = module.epsilon, variables

    def affine64(self, path):
        """Factor and bias in double precision, so that a fold rounds once."""
        params, stats = self._variables['params'], self._variables['batch_stats']
        for name in path:
            params, stats = params[name], stats[name]
        scale = _float64(params['scale'])
        scale = scale / np.sqrt(_float64(stats['var']) + self._epsilon)
        return scale, _float64(params['bias']) - scale * _float64(stats['mean'])

    def affine(self, path):
        return Affine(*map(_float32, self.affine64(path)))

    def folded(self, kernel, path, strides=1):
        """The convolution with the norm behind it."""
        scale, bias = self.affine64(path)
        return Conv(_float32(_float64(kernel) * scale), _float32(bias), strides)


def _stem(module, params, norms):
    if module.stem == 'cifar':
        return (Conv(_float32(params['conv0']['kernel'])),)
    count = 3 if module.stem == 'deep' else 1
    return tuple(
        norms.folded(params[f'conv{n}']['kernel'], (f'norm{n}',), 1 if n else 2)
        for n in range(count)
    )


def _layer(params, norms, path):
    affine = norms.affine((*path, 'norm1'))
    kernel = params['conv1']['kernel']
    if 'conv2' not in params:
        return Layer(affine, (Conv(_float32(kernel)),))
    first = norms.folded(kernel, (*path, 'norm2'))
    return Layer(affine, (first, Conv(_float32(params['conv2']['kernel']))))


def _float64(array):
    return np.asarray(array, np.float64)


def _float32(array):
    return np.ascontiguousarray(np.asarray(array, np.float32))
