"""DenseNet (Huang et al., arXiv 1608.06993) as Flax Linen modules.

The variable tree carries torchvision's names (`denseblock1/denselayer1/norm1`, ...),
so published weights map onto it by one rule.

>>> from flax_densenet import create_model, init_variables
>>> import jax.numpy as jnp
>>> model = create_model('BC-L100k12', num_classes=10, block_sizes=(2, 2, 2))
>>> variables = init_variables(model, seed=0)
>>> model.apply(variables, jnp.zeros((1, 32, 32, 3))).shape
(1, 10)
"""

import dataclasses
import functools
import math
import numbers
import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import lax

from flax_densenet import dense_block, groups, layers
from flax_densenet.errors import UserError

# Paper, table 1. 264 is the paper's fifth ImageNet model (figure 3); torchvision
# has no weights for it.
_IMAGENET = {
    'densenet121': dict(growth_rate=32, block_sizes=(6, 12, 24, 16)),
    'densenet161': dict(growth_rate=48, block_sizes=(6, 12, 36, 24), stem_features=96),
    'densenet169': dict(growth_rate=32, block_sizes=(6, 12, 32, 32)),
    'densenet201': dict(growth_rate=32, block_sizes=(6, 12, 48, 32)),
    'densenet264': dict(growth_rate=32, block_sizes=(6, 12, 64, 48)),
}
_CIFAR_NAME = re.compile(r'(?:(BC|B|C)-)?L(\d{1,9})k(\d{1,9})')


def cifar_fields(name: str) -> dict[str, Any] | None:
    """Fields of a small-image DenseNet named by depth and growth rate (section 4).

    Args:
      name: `L40k12` (plain), `B-L100k12` (bottleneck), `C-L40k12` (compression) or
        `BC-L100k12` (both): depth L counts the stem, the transitions and the
        classifier, so L - 4 is a multiple of 3, with bottleneck of 6.

    Returns:
      Fields of `DenseNet`, or None where the name is not of this form.

    Raises:
      UserError: no network of three equal blocks has this depth.
    """
    match = _CIFAR_NAME.fullmatch(name)
    if match is None:
        return None
    kind, depth, growth_rate = match[1] or '', int(match[2]), int(match[3])
    convolutions = 6 if 'B' in kind else 3
    size, rest = divmod(depth - 4, convolutions)
    if rest or size < 1 or growth_rate < 1:
        lower = depth - rest if size >= 1 else 4 + convolutions
        raise UserError(
            f'model.variant={name}: depth {depth} is not 4 + {convolutions} x layers '
            f'per block; use L{lower} or L{lower + convolutions} with a growth rate '
            'of at least 1'
        )
    return dict(
        growth_rate=growth_rate,
        block_sizes=(size,) * 3,
        bottleneck=4 if 'B' in kind else 0,
        compression=0.5 if 'C' in kind else 1.0,
        stem='cifar',
        stem_features=2 * growth_rate if kind == 'BC' else 16,
    )


_CIFAR = ('L40k12', 'L100k12', 'L100k24', 'BC-L100k12', 'BC-L250k24', 'BC-L190k40')
VARIANTS = _IMAGENET | {name: cifar_fields(name) for name in _CIFAR}

# (scale, fan, distribution) of jax.nn.initializers.variance_scaling. He et al.,
# arXiv 1502.01852: fan-in is the paper's reference [10], fan-out is what its Torch
# code does; Glorot normal is Keras' (truncated at two standard deviations).
INITIALIZERS = {
    'he_fan_in': (2.0, 'fan_in', 'normal'),
    'he_fan_out': (2.0, 'fan_out', 'normal'),
    'glorot_normal': (1.0, 'fan_avg', 'truncated_normal'),
}
# torch's nn.Linear: uniform in +-1/sqrt(fan_in); torchvision sets its bias to 0.
_CLASSIFIER_INITIALIZER = (1 / 3, 'fan_in', 'uniform')
STEMS = ('imagenet', 'cifar')
PADDINGS = ('torch', 'same')
DTYPES = ('float32', 'bfloat16', 'float16', 'float64')
# Whoever asks for more made a mistake, or means harm: it would take the machine's
# memory and hours. DenseNet-264 has 130 layers and 33 million parameters.
MOST_LAYERS = 500
MOST_PARAMETERS = 2**31
_KINDS = {
    'int': (numbers.Integral, 'a whole number'),
    'float': (numbers.Real, 'a number'),
    'str': (str, 'a name'),
    'bool': (bool, 'True or False'),
    'Sequence[int]': (Sequence, 'whole numbers in brackets, as (6, 12, 24, 16)'),
}


class DenseNet(nn.Module):
    """DenseNet for images `[N, H, W, C]`; make one with `create_model`.

    Attributes:
      num_classes: width of the classifier; 0 leaves it out: the model then returns
        the pooled features.
      growth_rate: feature maps that each layer adds (k).
      block_sizes: layers of each dense block.
      bottleneck: a 1x1 convolution to `bottleneck * growth_rate` maps comes before
        each 3x3 one; 0 for none.
      compression: share of the feature maps that a transition keeps (theta).
      stem: `imagenet` (7x7 stride 2, batch norm, ReLU, 3x3 max pooling of stride 2)
        or `cifar` (3x3 alone).
      stem_features: feature maps of the stem.
      dropout_rate: share dropped after each 3x3 convolution of a dense block.
      epsilon: added to the variance in batch norm.
      momentum: share of the running average that batch norm keeps at each step.
      unbiased_variance: running variances are unbiased (torch) or not (Keras).
      dtype: of activations; parameters, statistics and logits are float32 (all
        float64 with `float64`, which needs `jax_enable_x64`).
      padding: `torch` (symmetric) or `same` (TensorFlow's: more at the end) for
        convolutions and the max pooling; they differ where the stride is 2.
      initializer: of convolution kernels, a key of `INITIALIZERS`.
      fast: dense blocks and transitions as `dense_block` computes them; False for the
        plain layers, with the same variables and, up to rounding, the same results.
      kernel: of the fast block: `native` (C++, float32 on one CPU device), `xla`, or
        `auto`: native where it can be.
      remat: `block` computes activations again in the backward pass of the fast block
        by XLA, `none` keeps them; native always computes them again.
      batch_norm_group: in training, batch norm takes the statistics of each so many
        consecutive rows; the running ones move once, to the average over the groups of
        the groups' means and variances. 0: of all rows at once. -1: of a device's rows,
        for which the training step puts in their number (`groups.resolve`); the module
        by itself takes all rows that it is given.
    """

    num_classes: int
    growth_rate: int
    block_sizes: Sequence[int]
    bottleneck: int = 4
    compression: float = 0.5
    stem: str = 'imagenet'
    stem_features: int = 64
    dropout_rate: float = 0.0
    epsilon: float = 1e-5
    momentum: float = 0.9
    unbiased_variance: bool = True
    dtype: str = 'float32'
    padding: str = 'torch'
    initializer: str = 'he_fan_in'
    fast: bool = True
    kernel: str = 'auto'
    remat: str = 'block'
    batch_norm_group: int = 0

    def setup(self):
        param_dtype = jnp.float64 if self.dtype == 'float64' else jnp.float32
        dtypes = dict(dtype=jnp.dtype(self.dtype), param_dtype=param_dtype)
        norm = functools.partial(
            layers.BatchNorm,
            epsilon=self.epsilon,
            momentum=self.momentum,
            unbiased=self.unbiased_variance,
            **dtypes,
        )
        # None: zeros, where only shapes are wanted (see `variable_shapes`).
        kernel_init, classifier_init = nn.initializers.zeros, nn.initializers.zeros
        if self.initializer is not None:
            scaling = nn.initializers.variance_scaling
            kernel_init = scaling(*INITIALIZERS[self.initializer])
            classifier_init = scaling(*_CLASSIFIER_INITIALIZER)

        def conv(features, size, strides=1, name=None):
            pad = [(n // 2, n // 2) for n in size]
            return nn.Conv(
                features,
                size,
                strides,
                padding=pad if self.padding == 'torch' else 'SAME',
                use_bias=False,
                kernel_init=kernel_init,
                name=name,
                **dtypes,
            )

        kernel = functools.partial(
            layers.Kernel, kernel_init=kernel_init, param_dtype=param_dtype
        )
        layer = functools.partial(
            layers.DenseLayerVariables if self.fast else layers.DenseLayer,
            growth_rate=self.growth_rate,
            bottleneck=self.bottleneck,
            dropout_rate=self.dropout_rate,
            norm=norm,
            **({'kernel': kernel} if self.fast else {'conv': conv}),
        )
        fast = None
        if self.fast:
            fast = dict(
                epsilon=self.epsilon,
                dtype=jnp.dtype(self.dtype),
                kernel=self.kernel,
                remat=self.remat == 'block',
            )
        if self.stem == 'imagenet':
            self.conv0 = conv(self.stem_features, (7, 7), strides=2)
            self.norm0 = norm()
        else:
            self.conv0 = conv(self.stem_features, (3, 3))
        channels = self.stem_features
        for number, size in enumerate(self.block_sizes, start=1):
            setattr(self, f'denseblock{number}', layers.DenseBlock(size, layer, fast))
            channels += size * self.growth_rate
            if number < len(self.block_sizes):
                channels = int(channels * self.compression)
                transition = layers.Transition(channels, conv, kernel, norm, fast)
                setattr(self, f'transition{number}', transition)
        self.norm5 = norm()
        if self.num_classes:
            self.classifier = nn.Dense(
                self.num_classes,
                dtype=param_dtype,
                param_dtype=param_dtype,
                kernel_init=classifier_init,
            )

    def _norm_and_pool(self, x, train):
        """The ImageNet stem behind its convolution."""
        pad = ((1, 1), (1, 1))
        if self.padding == 'same':
            pad = tuple(lax.padtype_to_pads(x.shape[1:3], (3, 3), (2, 2), 'SAME'))
        if not self.fast:
            x = nn.relu(self.norm0(x, train))
            return nn.max_pool(x, (3, 3), strides=(2, 2), padding=pad)
        scale, bias, *averages = self.norm0.declare(x.shape[-1])
        mean, var = (None, None) if train else (a.value for a in averages)
        y, statistics = dense_block.stem(
            x,
            (mean, var, scale, bias),
            epsilon=self.epsilon,
            dtype=jnp.dtype(self.dtype),
            padding=pad,
            kernel=self.kernel,
        )
        if train:
            self.norm0.update(averages, statistics, x.size // x.shape[-1])
        return y

    def __call__(self, x, train: bool = False, frozen: int = 0):
        """Images `[N, H, W, C]`, normalised, to logits `[N, num_classes]`.

        With `num_classes=0`: to pooled features `[N, F]`. In training pass
        `mutable=['batch_stats']`, and `rngs={'dropout': key}` where it drops out.

        Args:
          frozen: how many of `stages`, from the stem on, compute as in evaluation
            though the others train: batch norm by its running statistics, which stay
            as they are, and no dropout. An argument, not a field, since it says how
            the model is trained and not which model it is.

        Raises:
          UserError: the images are smaller than `smallest_image_size`.
        """
        return self.head(self.features(x, train, frozen))

    def features(self, x, train: bool = False, frozen: int = 0):
        """Images to the last feature map `[N, H', W', F]`: after `norm5`, no ReLU.

        The same place as the output of torchvision's `features`.
        """
        return self.pyramid(x, train, frozen)[-1]

    def head(self, x):
        """`features` to logits: ReLU, mean over all positions, classifier."""
        x = nn.relu(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
        return self.classifier(x) if self.num_classes else x

    def pyramid(self, x, train: bool = False, frozen: int = 0):
        """Images to the output of each dense block, a list from fine to coarse.

        For detection and segmentation: strides 4, 8, 16 and 32 with the ImageNet
        stem. The last entry is what `features` returns.
        """
        check_image_size(self, x.shape[-3:-1])
        grouped = 0 < self.batch_norm_group != x.shape[0]
        if train and grouped and not self.is_initializing():
            live = {name for stage in stages(self)[frozen:] for name in stage}
            return groups.pyramid(self, x, frozen, live)
        x = self.conv0(x.astype(self.dtype))
        if self.stem == 'imagenet':
            x = self._norm_and_pool(x, train and frozen < 1)
        outputs = []
        for number in range(1, len(self.block_sizes) + 1):
            live = train and frozen <= number
            x, statistics = getattr(self, f'denseblock{number}')(x, live)
            if number == len(self.block_sizes):
                x = self.norm5(x, live, statistics)
            outputs.append(x)
            if number < len(self.block_sizes):
                x = getattr(self, f'transition{number}')(x, live, statistics)
        return outputs


def stages(model: DenseNet) -> list[tuple[str, ...]]:
    """Names of the model's parts by depth: the stem, each dense block, the head.

    A block's stage has what follows the block: its transition, after the last `norm5`.
    """
    stem = ('conv0', 'norm0') if model.stem == 'imagenet' else ('conv0',)
    last = len(model.block_sizes)
    blocks = [
        (f'denseblock{n}', f'transition{n}' if n < last else 'norm5')
        for n in range(1, last + 1)
    ]
    return [stem, *blocks, ('classifier',)]


def smallest_image_size(model: DenseNet) -> int:
    """Smallest height and width, in pixels, that leave one pixel in the last block.

    Each of the n - 1 transitions halves, rounding down; the ImageNet stem halves
    twice, rounding up. 29 for the ImageNet variants, 4 for the CIFAR ones.
    """
    before_blocks = 2 ** (len(model.block_sizes) - 1)
    return before_blocks if model.stem == 'cifar' else 4 * before_blocks - 3


def last_map_side(model: DenseNet, size: int) -> int:
    """Side of the last block's feature maps, of images of `size` pixels a side."""
    if model.stem != 'cifar':
        size = -(-size // 4)
    return size // 2 ** (len(model.block_sizes) - 1)


def check_image_size(model: DenseNet, size: Sequence[int]):
    """Raises `UserError` where (height, width) is too small for the model."""
    smallest = smallest_image_size(model)
    if min(size) < smallest:
        raise UserError(
            f'images of {size[0]}x{size[1]} are too small for {len(model.block_sizes)} '
            f'dense blocks with the {model.stem} stem: use at least '
            f'{smallest}x{smallest}'
        )


def create_model(variant: str, *, num_classes: int, **fields) -> DenseNet:
    """Makes the DenseNet named `variant`, with any field of `DenseNet` overridden.

    Args:
      variant: a key of `VARIANTS`, or any `L<depth>k<growth>` with `B-`, `C-` or
        `BC-` before it (`cifar_fields`).
      num_classes: width of the classifier, 0 for pooled features.
      **fields: fields of `DenseNet`; None takes the variant's own.

    Returns:
      The module: `model.apply(variables, images, train=False)`.

    Raises:
      UserError: no such variant or field, or a value that no DenseNet can have.
    """
    if not isinstance(variant, str):
        raise UserError(f'model.variant={variant!r} must be a name, as densenet121')
    defaults = VARIANTS.get(variant) or cifar_fields(variant)
    if defaults is None:
        raise UserError(
            f'model.variant={variant} is not known; use one of {", ".join(VARIANTS)}, '
            'or [B-|C-|BC-]L<depth>k<growth rate>'
        )
    known = {f.name for f in dataclasses.fields(DenseNet)} - {'parent', 'name'}
    for name in fields:
        if name not in known:
            raise UserError(
                f'model.{name} is not a field of the model; it has '
                f'{", ".join(sorted(known))}'
            )
    chosen = {name: value for name, value in fields.items() if value is not None}
    model = DenseNet(num_classes=num_classes, **(defaults | chosen))
    _check_fields(model)
    return model


def _check_kinds(model):
    """Raises for a field that holds something else than it is declared for."""
    for field in dataclasses.fields(DenseNet):
        if field.name in ('parent', 'name'):
            continue
        kind = getattr(field.type, '__name__', None) or str(field.type)
        kind, said = _KINDS['Sequence[int]' if 'Sequence' in str(field.type) else kind]
        value = getattr(model, field.name)
        # True would be a 1, a text a row of letters.
        if (
            not isinstance(value, kind)
            or (kind is not bool and isinstance(value, bool))
            or (kind is Sequence and isinstance(value, str))
        ):
            raise UserError(f'model.{field.name}={value!r} must be {said}')


def _check_size(model):
    """Raises for a network of absurd size, before anything is as large."""
    layers = sum(model.block_sizes)
    if layers > MOST_LAYERS:
        raise UserError(
            f'model.block_sizes={tuple(model.block_sizes)}: {layers} dense layers are '
            f'more than {MOST_LAYERS}'
        )
    count = count_parameters(model)
    if count > MOST_PARAMETERS:
        raise UserError(
            f'this model would have {min(count, 10**300):.3g} parameters, more than '
            f'{MOST_PARAMETERS:.3g}: lower model.growth_rate={model.growth_rate}, '
            f'model.stem_features={model.stem_features}, '
            f'model.bottleneck={model.bottleneck} or the number of classes, '
            f'{model.num_classes}'
        )


def count_parameters(model: DenseNet, *, channels: int = 3) -> int:
    """Number of parameters, by arithmetic alone: what `init_variables` would make.

    >>> count_parameters(create_model('densenet121', num_classes=1000))
    7978856
    """
    growth, width = model.growth_rate, model.bottleneck * model.growth_rate
    features = model.stem_features
    count = features * channels * 9
    if model.stem == 'imagenet':
        count = features * channels * 49 + 2 * features
    for number, size in enumerate(model.block_sizes, start=1):
        for _ in range(size):
            inner = 2 * width + features * width if width else 0
            count += 2 * features + inner + 9 * (width or features) * growth
            features += growth
        if number < len(model.block_sizes):
            shrunk = int(features * model.compression)
            count += 2 * features + features * shrunk
            features = shrunk
    return count + 2 * features + (features + 1) * model.num_classes


def _check_fields(model):
    _check_kinds(model)
    choices = {
        'stem': STEMS,
        'padding': PADDINGS,
        'dtype': DTYPES,
        'initializer': tuple(INITIALIZERS),
        'kernel': dense_block.KERNELS,
        'remat': ('none', 'block'),
    }
    for name, valid in choices.items():
        value = getattr(model, name)
        if value not in valid:
            raise UserError(
                f'model.{name}={value} is not known; use {", ".join(valid)}'
            )
    if model.dtype == 'float64' and not jax.config.jax_enable_x64:
        raise UserError(
            'model.dtype=float64 needs double precision in JAX: set JAX_ENABLE_X64=1'
        )
    blocks = model.block_sizes
    if not blocks or not all(type(n) is int and n > 0 for n in blocks):
        raise UserError(
            f'model.block_sizes={blocks} must be whole numbers above 0, '
            'one for each dense block, such as (6, 12, 24, 16)'
        )
    ranges = {
        'num_classes': model.num_classes >= 0,
        'growth_rate': model.growth_rate >= 1,
        'bottleneck': model.bottleneck >= 0,
        'stem_features': model.stem_features >= 1,
        'compression': 0 < model.compression <= 1,
        'dropout_rate': 0 <= model.dropout_rate < 1,
        'momentum': 0 <= model.momentum < 1,
        'epsilon': 0 < model.epsilon <= 1,
        'batch_norm_group': model.batch_norm_group >= groups.DEVICE,
    }
    for name, valid in ranges.items():
        if not valid:
            raise UserError(f'model.{name}={getattr(model, name)} is out of range')
    _check_size(model)


def variable_shapes(model: DenseNet, *, channels: int = 3):
    """Shapes and dtypes of `{'params', 'batch_stats'}`; computes and compiles nothing.

    Args:
      channels: of the images.
    """
    side = smallest_image_size(model)
    image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    # Tracing 121 random draws would take half of the time.
    model = model.clone(initializer=None)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def init_variables(model: DenseNet, seed: int, *, channels: int = 3):
    """Makes `{'params', 'batch_stats'}` from `seed`, without compiling the network.

    `model.init` compiles or runs every layer, 13 to 32 s for the 121 on two CPU
    cores; this asks it for shapes only and draws each kernel with numpy, from a
    generator keyed by the seed and the variable's path. So a layer's values do not
    depend on which others exist, on the device, or on the version of JAX.

    Args:
      model: a DenseNet.
      seed: a whole number of at most 64 bits.
      channels: of the images.

    Returns:
      Host (numpy) arrays, float32, or float64 with `dtype='float64'`.
    """
    shapes = variable_shapes(model, channels=channels)

    def draw(path, leaf):
        if path[-1] == 'kernel':
            rule = INITIALIZERS[model.initializer]
            if path[-2] == 'classifier':
                rule = _CLASSIFIER_INITIALIZER
            key = [seed, zlib.crc32('/'.join(path).encode())]
            generator = np.random.Generator(np.random.Philox(key=key))
            return _draw_kernel(generator, rule, leaf.shape).astype(leaf.dtype)
        fill = np.ones if path[-1] in ('scale', 'var') else np.zeros
        return fill(leaf.shape, leaf.dtype)

    flat = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({k: draw(k, v) for k, v in flat.items()})


def _draw_kernel(generator, rule, shape):
    scale, fan, distribution = rule
    area = math.prod(shape[:-2])
    fans = {'fan_in': area * shape[-2], 'fan_out': area * shape[-1]}
    fans['fan_avg'] = (fans['fan_in'] + fans['fan_out']) / 2
    std = math.sqrt(scale / fans[fan])
    if distribution == 'uniform':
        return generator.uniform(-math.sqrt(3) * std, math.sqrt(3) * std, shape)
    values = generator.standard_normal(shape, np.float32)
    if distribution == 'truncated_normal':
        while (outside := np.abs(values) > 2).any():
            values[outside] = generator.standard_normal(outside.sum(), np.float32)
        values /= 0.87962566103423978  # std of a normal cut at 2 standard deviations
    return values * np.float32(std)
