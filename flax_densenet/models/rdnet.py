"""RDNet (Kim et al., "DenseNets Reloaded", arXiv 2403.19588) as Flax Linen modules.

RDNet has dense connections and the components of modern networks: a patch stem, wide
layers with a 7x7 depthwise convolution, few transitions, layer norm, GELU, layer scale,
and squeeze-excitation in the later blocks. Create one with
`factory.create_model('rdnet_tiny', ...)`. There is no batch norm, so `batch_stats` is
empty.

Submodules have the same names as in DenseNet, so that code that freezes, counts or
replaces them works for both: `conv0, norm0, denseblock1/denselayer1/{conv1, norm1,
conv2, conv3, gate, gamma}, transition1/{norm, conv}, norm, classifier`. A block is a
stage of the paper without the transition before it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from flax_densenet.errors import UserError
from flax_densenet.kernels import dense_block, native_rdnet, xla_block
from flax_densenet.kernels import depthwise as depthwise_lib
from flax_densenet.models import layers, network

KERNEL_SIZE = 7  # kernel size of the depthwise convolutions


def _variant(stem_features, growth_rates, halvings):
    """Three layers per block, squeeze-excitation from the third block on."""
    count = len(growth_rates)
    return dict(
        stem_features=stem_features,
        growth_rates=tuple(growth_rates),
        block_sizes=(3,) * count,
        halvings=halvings,
        squeeze_blocks=tuple(range(3, count + 1)),
    )


# Widths of the published weights.
VARIANTS = {
    'rdnet_tiny': _variant(64, [64, 104, *[128] * 4, 224], (1, 2, 6)),
    'rdnet_small': _variant(72, [64, *[128] * 8, 240, 240], (1, 2, 9)),
    'rdnet_base': _variant(120, [96, 128, *[168] * 7, 336, 336], (1, 2, 9)),
    'rdnet_large': _variant(144, [128, 192, *[256] * 8, 360, 360], (1, 2, 10)),
}


class RDNet(network.Network):
    """RDNet for images `[N, H, W, C]`; create one with `factory.create_model`.

    Attributes:
      num_classes: width of the classifier. With 0 there is no classifier, and the model
        returns the pooled and normalized features.
      growth_rates: number of feature maps that each layer adds, one for each block.
      block_sizes: number of layers in each block.
      halvings: numbers of the transitions that halve height and width, counted from 1
        after the first block. The others only mix channels.
      squeeze_blocks: numbers of the blocks with (effective) squeeze-excitation.
      bottleneck: width inside a layer, as a multiple of its input channels.
      compression: fraction of the feature maps that a transition keeps.
      layer_scale: initial value of the factors that scale the maps of each layer; 0 for
        no factors.
      patch_size: side of the patches in the stem, in pixels.
      stem_features: number of feature maps of the stem.
      dropout_rate: fraction of the values dropped from the maps of each layer in
        training.
      drop_path_rate: in training, fraction of the images for which the maps of the last
        layer are dropped (stochastic depth). The rate decreases linearly to 0 at the
        first layer.
      epsilon: added to the variance in layer norm.
      dtype: dtype of the activations. Parameters and logits are float32. With
        `float64`, which needs `jax_enable_x64`, everything is float64.
      initializer: initializer of convolution kernels, a key of `factory.INITIALIZERS`.
      fast: compute layers and transitions with `kernels.native_rdnet` if possible. False
        uses the plain layers, with the same variables and, up to rounding, the same
        results.
      kernel: implementation of the layers: `native` (C++, float32 or bfloat16, on CPUs),
        `xla` (the plain layers), or `auto` (native if possible).
      remat: `block` recomputes the inside of each layer in the backward pass, which
        takes less memory and more time; `none` keeps it.
    """

    family = 'rdnet'
    has_batch_norm = False
    architecture_fields = (
        *('block_sizes', 'bottleneck', 'compression', 'stem_features'),
        *('growth_rates', 'halvings', 'squeeze_blocks', 'patch_size'),
    )
    growth_field = 'growth_rates'

    growth_rates: Sequence[int]
    block_sizes: Sequence[int]
    halvings: Sequence[int]
    squeeze_blocks: Sequence[int]
    bottleneck: int = 4
    compression: float = 0.5
    layer_scale: float = 1e-6
    patch_size: int = 4
    stem_features: int = 64
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    epsilon: float = 1e-6
    dtype: str = 'float32'
    initializer: str = 'he_fan_in'
    fast: bool = True
    kernel: str = 'auto'
    remat: str = 'none'

    def setup(self):
        param_dtype = jnp.float64 if self.dtype == 'float64' else jnp.float32
        kernel_init, classifier_init = layers.initializers(self.initializer)
        dtypes = dict(dtype=jnp.dtype(self.dtype), param_dtype=param_dtype)
        conv = functools.partial(Conv, kernel_init=kernel_init, **dtypes)
        depthwise_conv = functools.partial(
            DepthwiseConv, kernel_init=kernel_init, **dtypes
        )
        norm = functools.partial(
            nn.LayerNorm, epsilon=self.epsilon, use_fast_variance=False, **dtypes
        )
        fast = None
        if self.fast:
            fast = dict(kernel=self.kernel, epsilon=self.epsilon)
        self.conv0 = conv(self.stem_features, self.patch_size, self.patch_size)
        self.norm0 = norm()
        rates = layers.drop_path_rates(self.drop_path_rate, self.block_sizes)
        for number, channels in enumerate(transition_features(self), start=1):
            if number > 1:
                size = 2 if number - 1 in self.halvings else 1
                transition = Transition(channels, size, conv, norm, fast)
                setattr(self, f'transition{number - 1}', transition)
            block = DenseBlock(
                rates[number - 1],
                functools.partial(
                    nn.remat(DenseLayer, static_argnums=(2,))
                    if self.remat == 'block'
                    else DenseLayer,
                    growth_rate=self.growth_rates[number - 1],
                    bottleneck=self.bottleneck,
                    squeeze=number in self.squeeze_blocks,
                    layer_scale=self.layer_scale,
                    dropout_rate=self.dropout_rate,
                    conv=conv,
                    depthwise=depthwise_conv,
                    norm=norm,
                    param_dtype=param_dtype,
                    fast=fast,
                ),
            )
            setattr(self, f'denseblock{number}', block)
        wide = dict(dtype=param_dtype, param_dtype=param_dtype)
        self.norm = norm(**wide)
        if self.num_classes:
            self.classifier = nn.Dense(
                self.num_classes, kernel_init=classifier_init, **wide
            )

    def pool(self, x):
        """Mean over all positions and layer norm: float32 `[N, F]`."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
        return self.norm(x)

    def pyramid(self, x, train: bool = False, frozen: int = 0):
        """Maps images to the last output of each size, a list from fine to coarse.

        The strides are 4, 8, 16 and 32 in the published variants. The last entry is the
        result of `features`.
        """
        self.check_image_size(x.shape[-3:-1])
        x = self.norm0(self.conv0(x.astype(self.dtype)))
        return self._blocks(x, train, frozen)

    def _blocks(self, x, train=False, frozen=0, *, first=1):
        """The last output of each size, starting from a block."""
        outputs, count = [], len(self.block_sizes)
        for number in range(first, count + 1):
            x = getattr(self, f'denseblock{number}')(x, train and frozen <= number)
            if number == count or number in self.halvings:
                outputs.append(x)
            if number < count:
                x = getattr(self, f'transition{number}')(x, train and frozen <= number)
        return outputs

    def before_last_halving(self, x):
        """The feature map before the last halving, and the number of its block."""
        if not self.halvings:
            return self.features(x), len(self.block_sizes)
        return self.pyramid(x)[-2], max(self.halvings)

    def features_after(self, x, number: int):
        """Maps the output of a dense block to the last feature map."""
        if number == len(self.block_sizes):
            return x
        x = getattr(self, f'transition{number}')(x)
        return self._blocks(x, first=number + 1)[-1]

    @nn.nowrap
    def stages(self):
        last = len(self.block_sizes)
        blocks = [
            (f'denseblock{n}', f'transition{n}' if n < last else 'norm')
            for n in range(1, last + 1)
        ]
        return [('conv0', 'norm0'), *blocks, ('classifier',)]

    @nn.nowrap
    def plain(self):
        return self.clone(fast=False)

    @nn.nowrap
    def smallest_image_size(self):
        return self.patch_size * 2 ** len(self.halvings)

    @nn.nowrap
    def last_map_side(self, size):
        return size // self.smallest_image_size()

    @nn.nowrap
    def check_image_size(self, size):
        smallest = self.smallest_image_size()
        if min(size) < smallest:
            raise UserError(
                f'images of {size[0]}x{size[1]} are too small for patches of '
                f'{self.patch_size}x{self.patch_size} and {len(self.halvings)} '
                f'halvings: use at least {smallest}x{smallest}'
            )

    @nn.nowrap
    def takes_any_size(self):
        return False  # how many patches fit depends on the size

    @nn.nowrap
    def count_parameters(self, *, channels=3):
        stem = self.stem_features
        count, joined = (self.patch_size**2 * channels + 3) * stem, stem
        for number, features in enumerate(transition_features(self), start=1):
            if number > 1:
                area = 4 if number - 1 in self.halvings else 1
                count += 2 * joined + (area * joined + 1) * features
            growth, joined = self.growth_rates[number - 1], features
            gate = (growth + 1) * growth if number in self.squeeze_blocks else 0
            for _ in range(self.block_sizes[number - 1]):
                inner = inner_features(joined, self.bottleneck)
                count += (KERNEL_SIZE**2 + 3) * joined + (joined + 1) * inner
                count += (inner + 1) * growth + gate + growth * (self.layer_scale > 0)
                joined += growth
        return count + 2 * joined + (joined + 1) * self.num_classes

    @nn.nowrap
    def check_fields(self):
        blocks = len(self.block_sizes)
        growth = self.growth_rates
        if len(growth) != blocks or not all(type(n) is int and n > 0 for n in growth):
            raise UserError(
                f'model.growth_rates={tuple(growth)} must be {blocks} whole numbers '
                f'above 0, one for each of model.block_sizes={tuple(self.block_sizes)}'
            )
        for name, most in (('halvings', blocks - 1), ('squeeze_blocks', blocks)):
            value = getattr(self, name)
            good = all(type(n) is int and 1 <= n <= most for n in value)
            if not good or len(set(value)) != len(value):
                raise UserError(
                    f'model.{name}={tuple(value)} must be different numbers from 1 to '
                    f'{most}, or none: ()'
                )
        network.check_choices(self, kernel=dense_block.KERNELS)
        network.check_ranges(
            self,
            bottleneck=self.bottleneck >= 1,
            layer_scale=0 <= self.layer_scale <= 1,
            patch_size=1 <= self.patch_size <= 64,
        )
        widths = transition_features(self)
        if min(widths[1:], default=8) < 1 or self.stem_features * self.bottleneck < 8:
            raise UserError(
                f'model.stem_features={self.stem_features} and '
                f'model.compression={self.compression} leave a part of the network '
                'without features: widths are multiples of 8'
            )


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
        if _is_native(self.fast, x, train):
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
    if fast is None:
        return False
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
        if not _is_native(self.fast, x, train):
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


def transition_features(model: RDNet) -> list[int]:
    """Input channels of each block, from the stem and from each transition."""
    channels = [model.stem_features]
    parts = zip(model.growth_rates, model.block_sizes, strict=True)
    for growth, size in list(parts)[:-1]:
        joined = channels[-1] + growth * size
        channels.append(int(joined * model.compression / 8) * 8)
    return channels
