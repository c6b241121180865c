"""The components of a DenseNet: norms, dense layers, dense blocks, transitions.

The plain modules are the specification. With `fast`, a block declares the same
variables but computes with `kernels.dense_block`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from jax import lax

from flax_densenet.kernels import dense_block, xla_block

# (scale, fan, distribution) of jax.nn.initializers.variance_scaling. He et al., arXiv
# 1502.01852: the DenseNet paper cites fan-in (reference [10]), its Torch code uses
# fan-out. Glorot normal is as in Keras (truncated at two standard deviations).
INITIALIZERS = {
    'he_fan_in': (2.0, 'fan_in', 'normal'),
    'he_fan_out': (2.0, 'fan_out', 'normal'),
    'glorot_normal': (1.0, 'fan_avg', 'truncated_normal'),
}
# As nn.Linear in PyTorch: uniform in +-1/sqrt(fan_in). torchvision sets the bias to 0.
CLASSIFIER_INITIALIZER = (1 / 3, 'fan_in', 'uniform')


def initializers(name: str | None):
    """The initializers of convolutions and of the classifier; zeros for None."""
    if name is None:
        return nn.initializers.zeros, nn.initializers.zeros
    scaling = nn.initializers.variance_scaling
    return scaling(*INITIALIZERS[name]), scaling(*CLASSIFIER_INITIALIZER)


class Perceptron(nn.Module):
    """Linear layers with a ReLU between each two: `layer1`, `layer2`, ...

    Attributes:
      widths: widths of the layers.
      linear: a function from a width to a layer.
    """

    widths: Sequence[int]
    linear: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        for number, width in enumerate(self.widths, start=1):
            x = nn.relu(x) if number > 1 else x
            x = self.linear(width, name=f'layer{number}')(x)
        return x


def linear_layers(classifier: dict[str, Any]) -> list[dict[str, Any]]:
    """`{'kernel', 'bias'}` of each linear layer in a classifier, in order.

    Args:
      classifier: the parameters of a Dense layer or of a `Perceptron`.
    """
    if 'kernel' in classifier:
        return [classifier]
    return [classifier[f'layer{n}'] for n in range(1, len(classifier) + 1)]


def parameter(module, name, init, shape, dtype):
    """Like `module.param`, but faster to trace if the value exists.

    Linen traces the initializer of each parameter in each call to compare shapes. This
    takes a quarter of the time for tracing a training step of DenseNet-121.
    """
    if module.is_initializing() or not module.has_variable('params', name):
        return module.param(name, init, shape, dtype)
    value = module.get_variable('params', name)
    if value.shape != shape:
        raise ScopeParamShapeError(name, module.scope.path_text, shape, value.shape)
    return value


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last, as in PyTorch or Keras.

    `BatchNorm` of Linen always averages the biased variance; PyTorch averages the
    unbiased variance. Statistics are computed in float32 or wider, in two passes, so
    that a mean far from zero costs no precision.

    Attributes:
      momentum: fraction of the running average that is kept at each step (a momentum of
        0.1 in PyTorch is 0.9 here).
      unbiased: whether the running variance averages the batch variance times
        n / (n - 1).
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    unbiased: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def declare(self, channels: int):
        """Declares scale, bias, running mean and running variance, each `[C]`."""
        shape, dtype = (channels,), self.param_dtype
        return (
            parameter(self, 'scale', nn.initializers.ones, shape, dtype),
            parameter(self, 'bias', nn.initializers.zeros, shape, dtype),
            self.variable('batch_stats', 'mean', jnp.zeros, shape, dtype),
            self.variable('batch_stats', 'var', jnp.ones, shape, dtype),
        )

    def update(self, averages, statistics, count: int):
        """Moves the running averages toward the statistics of `count` values."""
        if self.is_initializing() or not self.is_mutable_collection('batch_stats'):
            return
        factor = count / max(count - 1, 1) if self.unbiased else 1.0
        keep = self.momentum
        for average, value, scale in zip(
            averages, statistics, (1, factor), strict=True
        ):
            # A training step has about 240 of these; jnp takes twice as long to trace.
            old = lax.mul(average.value, np.asarray(keep, value.dtype))
            new = np.asarray((1 - keep) * scale, value.dtype)
            average.value = lax.add(old, lax.mul(lax.stop_gradient(value), new))

    def __call__(self, x, train: bool = False, statistics=None):
        """Normalizes `[N, H, W, C]`; in training, updates `batch_stats` if mutable.

        Args:
          x: `[N, H, W, C]`.
          train: use the statistics of the batch instead of the running averages.
          statistics: (mean, var) of the batch if they are already known.
        """
        scale, bias, *averages = self.declare(x.shape[-1])
        if train:
            statistics = statistics or xla_block.statistics(x)
            self.update(averages, statistics, x.size // x.shape[-1])
            mean, var = statistics
        else:
            mean, var = (average.value for average in averages)
        row = (1,) * (x.ndim - 1) + (-1,)
        a = scale * lax.rsqrt(var + self.epsilon)
        y = (x.astype(self.param_dtype) - mean.reshape(row)) * a.reshape(row)
        return (y + bias.reshape(row)).astype(self.dtype)


class Kernel(nn.Module):
    """The kernel of a convolution, without the convolution."""

    kernel_init: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, *shape: int):
        return parameter(self, 'kernel', self.kernel_init, shape, self.param_dtype)


class DenseLayer(nn.Module):
    """H_l of the paper (section 3): new feature maps, not yet concatenated.

    This is the specification of the layers of a fast `DenseBlock`.

    Attributes:
      drop_bottleneck: whether dropout also follows the 1x1 convolution.
      drop_path_rate: in training, fraction of the images that get new maps of zeros.
    """

    growth_rate: int
    bottleneck: int
    dropout_rate: float
    conv: Any
    norm: Any
    drop_bottleneck: bool = False
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.relu(self.norm(name='norm1')(x, train))
        if self.bottleneck:
            width = self.bottleneck * self.growth_rate
            y = self.conv(width, (1, 1), name='conv1')(y)
            if self.drop_bottleneck:
                y = self._drop_out(y, train)
            y = nn.relu(self.norm(name='norm2')(y, train))
        name = 'conv2' if self.bottleneck else 'conv1'
        y = self._drop_out(self.conv(self.growth_rate, (3, 3), name=name)(y), train)
        if train and self.drop_path_rate:
            key = self.make_rng('dropout')
            y = xla_block.drop_path(y, key, self.drop_path_rate)
        return y

    def _drop_out(self, y, train):
        if not train or not self.dropout_rate:
            return y
        return xla_block.drop_out(y, self.make_rng('dropout'), self.dropout_rate)


class DenseLayerVariables(nn.Module):
    """Declares the variables of a `DenseLayer` without computing anything."""

    growth_rate: int
    bottleneck: int
    dropout_rate: float
    kernel: Any
    norm: Any
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, channels: int, train: bool):
        """Returns an `xla_block.Layer`, its norms with their averages, and two keys.

        The random keys are for dropout and stochastic depth; None if the rate is 0.
        """
        growth, norm1 = self.growth_rate, self.norm(name='norm1')
        scale, bias, *averages1 = norm1.declare(channels)
        norms = [(norm1, averages1)]
        width = self.bottleneck * growth
        shape = (1, 1, channels, width) if width else (3, 3, channels, growth)
        fields = dict(
            scale1=scale,
            bias1=bias,
            kernel1=self.kernel(name='conv1')(*shape),
            mean1=averages1[0].value,
            var1=averages1[1].value,
        )
        if width:
            norm2 = self.norm(name='norm2')
            scale, bias, *averages2 = norm2.declare(width)
            norms.append((norm2, averages2))
            fields |= dict(
                scale2=scale,
                bias2=bias,
                kernel2=self.kernel(name='conv2')(3, 3, width, growth),
                mean2=averages2[0].value,
                var2=averages2[1].value,
            )
        keys = [
            self.make_rng('dropout') if train and rate else None
            for rate in (self.dropout_rate, self.drop_path_rate)
        ]
        return xla_block.Layer(**fields), norms, keys


class DenseBlock(nn.Module):
    """x_l = H_l([x_0, ..., x_(l-1)]) (equation 2), concatenated.

    Returns the features and, in training with `fast`, their batch statistics.

    Attributes:
      drop_path_rates: one rate for each layer, see the function `drop_path_rates`.
      layer: constructor of a layer.
      fast: options of `kernels.dense_block`; None for the plain layers.
    """

    drop_path_rates: Sequence[float]
    layer: Any
    fast: dict[str, Any] | None

    @nn.compact
    def __call__(self, x, train: bool):
        modules = [
            self.layer(name=f'denselayer{number}', drop_path_rate=rate)
            for number, rate in enumerate(self.drop_path_rates, start=1)
        ]
        if self.fast is None:
            for module in modules:
                x = jnp.concatenate([x, module(x, train)], axis=-1)
            return x, None
        channels, layers, norms, keys = x.shape[-1], [], [], []
        for module in modules:
            layer, norm, key = module(channels, train)
            channels += module.growth_rate
            layers.append(layer)
            norms.append(norm)
            keys.append(key)
        options = dict(self.fast)
        if not train:
            del options['remat']
            return dense_block.block_eval(x, layers, **options), None
        block_keys, path_keys = zip(*keys, strict=True)
        x, (mean, var), inner = dense_block.block_train(
            x,
            layers,
            **options,
            dropout_rate=module.dropout_rate,
            keys=block_keys,
            path_rates=self.drop_path_rates,
            path_keys=path_keys,
        )
        count = x.size // x.shape[-1]
        for layer, norm, of_norm2 in zip(layers, norms, inner, strict=True):
            width = layer.scale1.shape[0]
            for (module, averages), values in zip(
                norm, ((mean[:width], var[:width]), of_norm2), strict=False
            ):
                module.update(averages, values, count)
        return x, (mean, var)


def drop_path_rates(rate: float, block_sizes: Sequence[int]) -> list[tuple[float, ...]]:
    """The rate of stochastic depth for each layer of each block.

    The rates rise linearly from 0 at the first layer to `rate` at the last (Huang et
    al., arXiv 1603.09382, section 3). As in "DenseNets Reloaded" (arXiv 2403.19588) and
    timm, the new maps of a dense layer are dropped.

    >>> drop_path_rates(0.5, (1, 2))
    [(0.0,), (0.25, 0.5)]
    """
    total, rates, place = sum(block_sizes), [], 0
    for size in block_sizes:
        layers = range(place, place + size)
        rates.append(tuple(rate * layer / max(total - 1, 1) for layer in layers))
        place += size
    return rates


def blur_pool(x):
    """Blurs `[N, H, W, C]` with [1, 2, 1] x [1, 2, 1] / 16 and halves height and width.

    It replaces a stride of 2 (Zhang, arXiv 1904.11486). Edges are mirrored, and odd
    sides round up.
    """
    for axis in (1, 2):
        margin = [(1, 1) if n == axis else (0, 0) for n in range(4)]
        padded = jnp.pad(x, margin, mode='reflect')
        size = x.shape[axis]
        first, second, third = (
            lax.slice_in_dim(padded, start, start + size, 2, axis) for start in range(3)
        )
        x = 0.25 * first + 0.5 * second + 0.25 * third
    return x


class Transition(nn.Module):
    """Batch norm, ReLU, 1x1 convolution, 2x2 average pooling (section 3).

    Attributes:
      dropout_rate: fraction dropped after the convolution; only without `fast`.
    """

    features: int
    conv: Any
    kernel: Any
    norm: Any
    fast: dict[str, Any] | None
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool, statistics=None):
        norm = self.norm(name='norm')
        if self.fast is None:
            x = nn.relu(norm(x, train))
            x = self.conv(self.features, (1, 1), name='conv')(x)
            if train and self.dropout_rate:
                key = self.make_rng('dropout')
                x = xla_block.drop_out(x, key, self.dropout_rate)
            return nn.avg_pool(x, (2, 2), strides=(2, 2))
        channels = x.shape[-1]
        scale, bias, *averages = norm.declare(channels)
        kernel = self.kernel(name='conv')(1, 1, channels, self.features)
        if train:
            norm.update(averages, statistics, x.size // channels)
        else:
            statistics = [average.value for average in averages]
        return dense_block.transition(
            x,
            (*statistics, scale, bias),
            kernel,
            epsilon=self.fast['epsilon'],
            dtype=self.fast['dtype'],
            kernel=self.fast['kernel'],
        )
