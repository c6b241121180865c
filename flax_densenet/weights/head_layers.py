"""Reduces heads of several layers to linear layers with a ReLU between each two.

At inference, dropout does nothing, batch norm merges with the linear layer next to it,
and two linear layers without a ReLU between them merge into one. The remaining layers
are those that `models.layers.Perceptron` computes.

>>> import numpy as np
>>> one, two = Linear(np.ones((4, 3)), np.zeros(3)), Linear(np.ones((3, 2)), None)
>>> [kernel.shape for kernel, _ in reduce([one, RELU, two])]
[(4, 3), (3, 2)]
>>> [kernel.shape for kernel, _ in reduce([one, two])]
[(4, 2)]
"""

import dataclasses
import itertools

import numpy as np

# More layers have too many orders to try.
_MOST_LAYERS = 8


class Unreadable(Exception):
    """The head is unknown or unsupported; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """A kernel `[in, out]` and a bias `[out]` or None."""

    kernel: np.ndarray
    bias: np.ndarray | None

    def __str__(self):
        return f'Linear({self.kernel.shape[0]}, {self.kernel.shape[1]})'


@dataclasses.dataclass(frozen=True)
class Norm:
    """Batch norm with running statistics."""

    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    epsilon: float

    def __str__(self):
        return f'BatchNorm({len(self.mean)})'

    def affine(self):
        """The factor and the shift at inference, float64 `[C]` each."""
        factor = self.scale / np.sqrt(np.float64(self.var) + self.epsilon)
        return factor, self.bias - self.mean * factor


class _Relu:
    def __str__(self):
        return 'ReLU'


RELU = _Relu()


def describe(layers) -> str:
    """`Linear(1024, 512), ReLU, Linear(512, 2)`."""
    return ', '.join(map(str, layers))


def reduce(layers) -> list[tuple[np.ndarray, np.ndarray]]:
    """Reduces a head to float32 linear layers with a ReLU between each two.

    Args:
      layers: a sequence of `Linear`, `Norm` and `RELU`.

    Returns:
      `(kernel [in, out], bias [out])` of each linear layer.

    Raises:
      Unreadable: the layers do not fit together, or cannot be reduced.
    """
    made: list = []  # [kernel, bias] in double precision
    waiting, width, rectified = None, None, True
    for layer in layers:
        if layer is RELU:
            if waiting is not None:
                raise Unreadable('a ReLU directly after a batch norm')
            rectified = True
            continue
        size = layer.kernel.shape[0] if isinstance(layer, Linear) else len(layer.mean)
        if width not in (None, size):
            raise Unreadable(f'{layer} behind {width} outputs')
        if isinstance(layer, Linear):
            kernel, bias = _absorb(layer, waiting)
            if rectified:
                made.append([kernel, bias])
            else:
                made[-1] = [made[-1][0] @ kernel, made[-1][1] @ kernel + bias]
            waiting, rectified, width = None, False, kernel.shape[1]
            continue
        factor, shift = layer.affine()
        if not rectified:
            made[-1] = [made[-1][0] * factor, made[-1][1] * factor + shift]
        elif waiting is None:
            waiting = factor, shift
        else:
            waiting = waiting[0] * factor, waiting[1] * factor + shift
        width = size
    if not made or rectified or waiting is not None:
        raise Unreadable('its last layer is not linear')
    return [
        (kernel.astype(np.float32), bias.astype(np.float32)) for kernel, bias in made
    ]


def fits(layers, width: int | None) -> bool:
    """Whether each linear layer fits the outputs of the one before it."""
    for layer in layers:
        if width not in (layer.kernel.shape[0], None):
            return False
        width = layer.kernel.shape[1]
    return True


def find_order(layers: dict[str, Linear], width: int | None) -> tuple[str, ...]:
    """The only order in which each linear layer fits the outputs of the one before.

    Args:
      layers: `{name: layer}`.
      width: number of features that the first layer takes; None if unknown.

    Raises:
      Unreadable: there are too many layers, or the order is not unique.
    """
    if len(layers) > _MOST_LAYERS:
        raise Unreadable(f'it has {len(layers)} layers')
    orders = [
        order
        for order in itertools.permutations(layers)
        if fits([layers[name] for name in order], width)
    ]
    if len(orders) != 1:
        raise Unreadable('the order of its layers is unclear')
    return orders[0]


def _absorb(linear, waiting):
    kernel = np.float64(linear.kernel)
    bias = np.zeros(kernel.shape[1]) if linear.bias is None else np.float64(linear.bias)
    if waiting is None:
        return kernel, bias
    factor, shift = waiting
    return kernel * factor[:, None], bias + shift @ kernel


def arrays_of(layers) -> dict[str, np.ndarray]:
    """`{our name: array}` of the layers that `reduce` returns."""
    if len(layers) == 1:
        names = ['params/classifier']
    else:
        names = [f'params/classifier/layer{n}' for n in range(1, len(layers) + 1)]
    return {
        f'{name}/{leaf}': array
        for name, layer in zip(names, layers, strict=True)
        for leaf, array in zip(('kernel', 'bias'), layer, strict=True)
    }


def widths_of(arrays: dict[str, np.ndarray]) -> tuple[int, ...]:
    """Widths of the layers of the classifier in `{our name: array}`; () for none."""
    if 'params/classifier/kernel' in arrays:
        return (arrays['params/classifier/kernel'].shape[-1],)
    widths: list[int] = []
    while (
        kernel := arrays.get(f'params/classifier/layer{len(widths) + 1}/kernel')
    ) is not None:
        widths.append(kernel.shape[-1])
    return tuple(widths)
