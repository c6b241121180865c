"""The components of an RDNet: convolutions, dense layers, dense blocks, transitions.

The plain modules are the specification. With `fast`, layers and transitions declare the
same variables but compute with `kernels.native_rdnet` where that is possible.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from flax_densenet.kernels import depthwise as depthwise_lib
from flax_densenet.kernels import native_rdnet, xla_block
from flax_densenet.models import layers

KERNEL_SIZE = 7  # kernel size of the depthwise convolutions


class Conv(nn.Module):
    """A convolution with bias: 1x1, or with patches that do not overlap."""

    features: int
    size: int
    stride: int = 1
    kernel_init: Any = nn.initializers.zeros
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def declare(self, channels: int):
        """Declares the kernel and the bias."""
        return _kernel_and_bias(self, (self.size, self.size, channels, self.features))

    def __call__(self, x):
        kernel, bias = _cast(self, self.declare(x.shape[-1]))
        if self.size == self.stride == 1:
            return xla_block.product(x, kernel[0, 0]) + bias
        return bias + lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            'VALID',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )


class DepthwiseConv(nn.Module):
    """A 7x7 depthwise convolution with bias."""

    kernel_init: Any
    dtype: Any
    param_dtype: Any

    @nn.compact
    def declare(self, channels: int):
        """Declares the kernel and the bias."""
        return _kernel_and_bias(self, (KERNEL_SIZE, KERNEL_SIZE, 1, channels))

    def __call__(self, x):
        kernel, bias = _cast(self, self.declare(x.shape[-1]))
        return depthwise_lib.depthwise(x, kernel) + bias


class LayerNormVariables(nn.Module):
    """Declares the variables of a layer norm without computing anything."""

    param_dtype: Any

    @nn.compact
    def __call__(self, channels: int):
        """Returns scale and bias."""
        return tuple(
            layers.parameter(self, name, init, (channels,), self.param_dtype)
            for name, init in (
                ('scale', nn.initializers.ones),
                ('bias', nn.initializers.zeros),
            )
        )


def _kernel_and_bias(module, shape):
    make = functools.partial(layers.parameter, module)
    return (
        make('kernel', module.kernel_init, shape, module.param_dtype),
        make('bias', nn.initializers.zeros, shape[-1:], module.param_dtype),
    )


def _cast(module, parameters):
    kernel, bias = (array.astype(module.dtype) for array in parameters)
    return kernel, bias.reshape(1, 1, 1, -1)


def _packed(module, *names):
    """The packed kernels of `folded.fold`; None if there are none."""
    if not module.has_variable('packed', names[0]):
        return None
    return tuple(module.get_variable('packed', name) for name in names)


class DenseLayer(nn.Module):
    """The new feature maps of a layer, not yet concatenated to its input."""

    growth_rate: int
    bottleneck: int
    squeeze: bool
    layer_scale: float
    dropout_rate: float
    conv: Any
    depthwise: Any
    norm: Any
    param_dtype: Any
    fast: dict[str, Any] | None
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        conv = functools.partial(self.conv, size=1)
        depthwise = self.depthwise(name='conv1')
        conv2 = conv(inner_features(x.shape[-1], self.bottleneck), name='conv2')
        conv3 = conv(self.growth_rate, name='conv3')
        if self.fast and _is_native(self.fast, x, train):
            y = native_rdnet.layer(
                x,
                (
                    *depthwise.declare(x.shape[-1]),
                    *LayerNormVariables(self.param_dtype, name='norm1')(x.shape[-1]),
                    *conv2.declare(x.shape[-1]),
                    *conv3.declare(conv2.features),
                ),
                self.fast['epsilon'],
                _packed(self, 'conv2', 'conv3'),
            )
        else:
            y = conv3(_gelu(conv2(self.norm(name='norm1')(depthwise(x)))))
        if self.squeeze:  # effective: one layer that keeps the number of channels
            gate = conv(self.growth_rate, name='gate')(y.mean((1, 2), keepdims=True))
            y = y * nn.hard_sigmoid(gate)
        if self.layer_scale:
            first = nn.initializers.constant(self.layer_scale)
            shape, dtype = (self.growth_rate,), self.param_dtype
            gamma = layers.parameter(self, 'gamma', first, shape, dtype)
            y = y * gamma.astype(y.dtype).reshape(1, 1, 1, -1)
        if train and self.drop_path_rate:
            y = _drop(self, y, self.drop_path_rate, (y.shape[0], 1, 1, 1))
        if train and self.dropout_rate:
            y = _drop(self, y, self.dropout_rate, y.shape)
        return y


def _is_native(fast, x, train):
    return native_rdnet.use_native(fast['kernel'], x.dtype, gradients=train)


def _gelu(x):
    """Exact GELU with `erf`; on CPUs twice as fast as with `erfc`, as in Flax."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    share = 0.5 + 0.5 * lax.erf(wide * np.asarray(0.5**0.5, wide.dtype))
    return (wide * share).astype(x.dtype)


def _drop(module, x, rate, shape):
    """Drops a fraction of the values or of the images, depending on `shape`."""
    kept = jax.random.bernoulli(module.make_rng('dropout'), 1 - rate, shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


class DenseBlock(nn.Module):
    """Each layer sees the input and the outputs of all layers before it."""

    drop_path_rates: Sequence[float]  # one for each layer
    layer: Any

    @nn.compact
    def __call__(self, x, train: bool):
        for number, rate in enumerate(self.drop_path_rates, start=1):
            layer = self.layer(drop_path_rate=rate, name=f'denselayer{number}')
            x = jnp.concatenate([x, layer(x, train)], axis=-1)
        return x


class Transition(nn.Module):
    """Layer norm and a convolution: 2x2 if it halves the size, otherwise 1x1."""

    features: int
    size: int
    conv: Any
    norm: Any
    fast: dict[str, Any] | None

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv = self.conv(self.features, self.size, self.size, name='conv')
        if not self.fast or not _is_native(self.fast, x, train):
            return conv(self.norm(name='norm')(x))
        norm = LayerNormVariables(conv.param_dtype, name='norm')
        packed = _packed(self, 'conv')
        return native_rdnet.transition(
            x,
            (*norm(x.shape[-1]), *conv.declare(x.shape[-1])),
            self.fast['epsilon'],
            packed and packed[0],
        )


def inner_features(channels: int, bottleneck: int) -> int:
    """The width inside a layer with this many input channels: a multiple of 8."""
    return channels * bottleneck // 8 * 8
