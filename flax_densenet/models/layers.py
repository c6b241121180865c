"""The parts of a DenseNet as Linen modules: norms, layers, blocks, transitions.

The plain ones are the specification; with `fast` a block declares the same variables
and lets `dense_block` compute.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from jax import lax

from flax_densenet.kernels import dense_block, xla_block

# (scale, fan, distribution) of jax.nn.initializers.variance_scaling. He et al.,
# arXiv 1502.01852: fan-in is the paper's reference [10], fan-out is what its Torch
# code does; Glorot normal is Keras' (truncated at two standard deviations).
INITIALIZERS = {
    'he_fan_in': (2.0, 'fan_in', 'normal'),
    'he_fan_out': (2.0, 'fan_out', 'normal'),
    'glorot_normal': (1.0, 'fan_avg', 'truncated_normal'),
}
# torch's nn.Linear: uniform in +-1/sqrt(fan_in); torchvision sets its bias to 0.
CLASSIFIER_INITIALIZER = (1 / 3, 'fan_in', 'uniform')


def initializers(name: str | None):
    """Of kernels and of the classifier; None: zeros, where only shapes are wanted."""
    if name is None:
        return nn.initializers.zeros, nn.initializers.zeros
    scaling = nn.initializers.variance_scaling
    return scaling(*INITIALIZERS[name]), scaling(*CLASSIFIER_INITIALIZER)


def parameter(module, name, init, shape, dtype):
    """`module.param`, quicker to trace where the value is there already.

    Linen traces the initializer of each parameter in each call, to compare shapes: a
    quarter of the time that tracing a training step of the 121 takes.
    """
    if module.is_initializing() or not module.has_variable('params', name):
        return module.param(name, init, shape, dtype)
    value = module.get_variable('params', name)
    if value.shape != shape:
        raise ScopeParamShapeError(name, module.scope.path_text, shape, value.shape)
    return value


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last, with torch's or Keras' variance.

    Linen's own stores the biased variance in the running average and has no choice;
    torch stores the unbiased one. Statistics are taken in float32 or wider, in two
    passes, so that a mean far from zero costs no digits.

    Attributes:
      momentum: share of the old running average that is kept at each step (torch's
        momentum 0.1 is 0.9 here).
      unbiased: the running variance is the batch's times n / (n - 1).
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    unbiased: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def declare(self, channels: int):
        """scale, bias and the variables of the running mean and var, each `[C]`."""
        shape, dtype = (channels,), self.param_dtype
        return (
            parameter(self, 'scale', nn.initializers.ones, shape, dtype),
            parameter(self, 'bias', nn.initializers.zeros, shape, dtype),
            self.variable('batch_stats', 'mean', jnp.zeros, shape, dtype),
            self.variable('batch_stats', 'var', jnp.ones, shape, dtype),
        )

    def update(self, averages, statistics, count: int):
        """Moves the running averages towards the batch's, of `count` values."""
        if self.is_initializing() or not self.is_mutable_collection('batch_stats'):
            return
        factor = count / max(count - 1, 1) if self.unbiased else 1.0
        keep = self.momentum
        for average, value, scale in zip(
            averages, statistics, (1, factor), strict=True
        ):
            # lax: a training step has some 240 of these, jnp takes twice as long to
            # trace them.
            old = lax.mul(average.value, np.asarray(keep, value.dtype))
            new = np.asarray((1 - keep) * scale, value.dtype)
            average.value = lax.add(old, lax.mul(lax.stop_gradient(value), new))

    def __call__(self, x, train: bool = False, statistics=None):
        """[N, H, W, C] -> the same; in training updates `batch_stats` where mutable.

        Args:
          statistics: batch (mean, var) where they are known already.
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
    """The kernel of a convolution, by itself."""

    kernel_init: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, *shape: int):
        return parameter(self, 'kernel', self.kernel_init, shape, self.param_dtype)


class DenseLayer(nn.Module):
    """H_l of the paper (section 3): the layer's new feature maps, not yet joined.

    The specification of what `DenseBlock` with `fast` computes for all its layers.

    Attributes:
      drop_bottleneck: drops out after the 1x1 convolution as well.
      drop_path_rate: share of images that get zeros in training.
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
    """The variables of a `DenseLayer`, under the same names, without computing."""

    growth_rate: int
    bottleneck: int
    dropout_rate: float
    kernel: Any
    norm: Any
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, channels: int, train: bool):
        """Returns the `xla_block.Layer`, its norms with their averages, two keys.

        The keys are of dropout and of stochastic depth, None where nothing drops.
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
    """x_l = H_l([x_0, ..., x_(l-1)]) (equation 2), all of them joined at the end.

    Returns the features and, from `fast` in training, their batch statistics.

    Attributes:
      drop_path_rates: of each layer; see `drop_path_rates`.
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
            for (module, averages), found in zip(
                norm, ((mean[:width], var[:width]), of_norm2), strict=False
            ):
                module.update(averages, found, count)
        return x, (mean, var)


def drop_path_rates(rate: float, block_sizes: Sequence[int]) -> list[tuple[float, ...]]:
    """The share of images that each layer of each block leaves out in training.

    Stochastic depth with its linear rule (Huang et al., arXiv 1603.09382, section 3),
    from 0 in the first layer to `rate` in the last, of the new maps of a dense layer,
    as "DenseNets Reloaded" (arXiv 2403.19588) and timm have it.

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
    """Blurs with [1, 2, 1] x [1, 2, 1] / 16 and halves, `[N, H, W, C]`.

    Zhang, arXiv 1904.11486, at the place of a stride: what is near the edge is
    mirrored. Sides are rounded up.
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
      dropout_rate: share dropped after the convolution; of the plain one alone.
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
        )
