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

import jax.numpy as jnp
from flax import linen as nn

from flax_densenet.errors import UserError
from flax_densenet.kernels import dense_block, native_rdnet
from flax_densenet.models import layers, network, rdnet_layers


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
      fast: compute layers and transitions with `kernels.native_rdnet` if possible.
        False uses the plain layers, with the same variables and, up to rounding, the
        same results.
      kernel: implementation of the layers: `native` (C++, float32 or bfloat16, on
        CPUs), `xla` (the plain layers), or `auto` (native if possible).
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
        conv = functools.partial(rdnet_layers.Conv, kernel_init=kernel_init, **dtypes)
        depthwise_conv = functools.partial(
            rdnet_layers.DepthwiseConv, kernel_init=kernel_init, **dtypes
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
                transition = rdnet_layers.Transition(channels, size, conv, norm, fast)
                setattr(self, f'transition{number - 1}', transition)
            block = rdnet_layers.DenseBlock(
                rates[number - 1],
                functools.partial(
                    nn.remat(rdnet_layers.DenseLayer, static_argnums=(2,))
                    if self.remat == 'block'
                    else rdnet_layers.DenseLayer,
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
    def pack(self, params):
        if not self.fast or not native_rdnet.use_native(
            self.kernel, self.dtype, gradients=False
        ):
            return {}
        dtype = native_rdnet.compute_dtype(jnp.dtype(self.dtype))

        def pack(module, *names):
            kernels = {name: module[name]['kernel'] for name in names}
            return {k: native_rdnet.pack(v, dtype) for k, v in kernels.items()}

        packed = {}
        for name, module in params.items():
            if name.startswith('denseblock'):
                packed[name] = {k: pack(v, 'conv2', 'conv3') for k, v in module.items()}
            elif name.startswith('transition'):
                packed[name] = pack(module, 'conv')
        return {'packed': packed}

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
                inner = rdnet_layers.inner_features(joined, self.bottleneck)
                count += (rdnet_layers.KERNEL_SIZE**2 + 3) * joined + (
                    joined + 1
                ) * inner
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
            bottleneck=(self.bottleneck >= 1, 'at least 1'),
            layer_scale=(0 <= self.layer_scale <= 1, 'from 0 to 1'),
            patch_size=(1 <= self.patch_size <= 64, 'from 1 to 64'),
        )
        widths = transition_features(self)
        if min(widths[1:], default=8) < 1 or self.stem_features * self.bottleneck < 8:
            raise UserError(
                f'model.stem_features={self.stem_features} and '
                f'model.compression={self.compression} leave a part of the network '
                'without features: widths are multiples of 8'
            )


def transition_features(model: RDNet) -> list[int]:
    """Input channels of each block, from the stem and from each transition."""
    channels = [model.stem_features]
    parts = zip(model.growth_rates, model.block_sizes, strict=True)
    for growth, size in list(parts)[:-1]:
        joined = channels[-1] + growth * size
        channels.append(int(joined * model.compression / 8) * 8)
    return channels
