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

from flax_densenet import dense_block, groups, layers, rdnet
from flax_densenet.errors import UserError

# Paper, table 1. 264 is the paper's fifth ImageNet model (figure 3); torchvision
# has no weights for it.
_IMAGENET = {
    'densenet121': dict(growth_rate=32, block_sizes=(6, 12, 24, 16)),
    'densenet161': dict(growth_rate=48, block_sizes=(6, 12, 36, 24), stem_features=96),
    'densenet169': dict(growth_rate=32, block_sizes=(6, 12, 32, 32)),
    'densenet201': dict(growth_rate=32, block_sizes=(6, 12, 48, 32)),
    'densenet264': dict(growth_rate=32, block_sizes=(6, 12, 64, 48)),
    # timm's, with a stem of three 3x3 convolutions.
    'densenetblur121d': dict(
        growth_rate=32, block_sizes=(6, 12, 24, 16), stem='deep', blur_pool=True
    ),
    'densenet264d': dict(
        growth_rate=48, block_sizes=(6, 12, 64, 48), stem='deep', stem_features=96
    ),
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
VARIANTS = _IMAGENET | {name: cifar_fields(name) for name in _CIFAR} | rdnet.VARIANTS

INITIALIZERS = layers.INITIALIZERS
STEMS = ('imagenet', 'deep', 'cifar')
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
      stem: `imagenet` (7x7 stride 2, batch norm, ReLU, 3x3 max pooling of stride 2),
        `deep` (three 3x3 in place of the 7x7, each with batch norm and ReLU, the
        first of stride 2, the first two with half of the maps) or `cifar` (3x3
        alone).
      stem_features: feature maps of the stem.
      blur_pool: the stem's pooling has stride 1 and a blur (`layers.blur_pool`) halves;
        not with the `cifar` stem, which does not pool.
      dropout_rate: share dropped in training.
      dropout_after: `conv3x3`, each 3x3 convolution of a dense block, as the PyTorch
        ports do; or `every_conv`, also each 1x1 one and each transition's, as the
        authors' Torch code does; then, with a rate above 0, the layers are plain.
      drop_path_rate: share of images that the last dense layer's new maps are left out
        of in training (stochastic depth), the others' scaled up for it; it falls
        evenly to 0 in the first layer (`layers.drop_path_rates`).
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
    blur_pool: bool = False
    dropout_rate: float = 0.0
    dropout_after: str = 'conv3x3'
    drop_path_rate: float = 0.0
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
        kernel_init, classifier_init = layers.initializers(self.initializer)
        everywhere = self.dropout_rate > 0 and self.dropout_after == 'every_conv'

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
        layer, fast = functools.partial(layers.DenseLayer, conv=conv), None
        if everywhere:
            layer = functools.partial(layer, drop_bottleneck=True)
        elif self.fast:
            layer = functools.partial(layers.DenseLayerVariables, kernel=kernel)
            fast = dict(
                epsilon=self.epsilon,
                dtype=jnp.dtype(self.dtype),
                kernel=self.kernel,
                remat=self.remat == 'block',
            )
        layer = functools.partial(
            layer,
            growth_rate=self.growth_rate,
            bottleneck=self.bottleneck,
            dropout_rate=self.dropout_rate,
            norm=norm,
        )
        _add_stem(self, conv, norm)
        transition = functools.partial(
            layers.Transition,
            conv=conv,
            kernel=kernel,
            norm=norm,
            fast=fast,
            dropout_rate=self.dropout_rate if everywhere else 0.0,
        )
        channels = self.stem_features
        rates = layers.drop_path_rates(self.drop_path_rate, self.block_sizes)
        for number, size in enumerate(self.block_sizes, start=1):
            block = layers.DenseBlock(rates[number - 1], layer, fast)
            setattr(self, f'denseblock{number}', block)
            channels += size * self.growth_rate
            if number < len(self.block_sizes):
                channels = int(channels * self.compression)
                setattr(self, f'transition{number}', transition(channels))
        self.norm5 = norm()
        if self.num_classes:
            self.classifier = nn.Dense(
                self.num_classes,
                dtype=param_dtype,
                param_dtype=param_dtype,
                kernel_init=classifier_init,
            )

    def _stem(self, x, train):
        """Convolutions and pooling in front of the first dense block."""
        x, norm = self.conv0(x), None
        if self.stem == 'imagenet':
            norm = self.norm0
        elif self.stem == 'deep':
            x = self.conv1(nn.relu(self.norm0(x, train)))
            x, norm = self.conv2(nn.relu(self.norm1(x, train))), self.norm2
        if norm is None:
            return x
        if self.blur_pool:
            x, pad = nn.relu(norm(x, train)), ((1, 1), (1, 1))
            return layers.blur_pool(nn.max_pool(x, (3, 3), padding=pad))
        return self._norm_and_pool(x, norm, train)

    def _norm_and_pool(self, x, norm, train):
        """Batch norm, ReLU, 3x3 max pooling of stride 2."""
        pad = ((1, 1), (1, 1))
        if self.padding == 'same':
            pad = tuple(lax.padtype_to_pads(x.shape[1:3], (3, 3), (2, 2), 'SAME'))
        if not self.fast:
            x = nn.relu(norm(x, train))
            return nn.max_pool(x, (3, 3), strides=(2, 2), padding=pad)
        scale, bias, *averages = norm.declare(x.shape[-1])
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
            norm.update(averages, statistics, x.size // x.shape[-1])
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
        return self.classify(self.pool(x))

    def pool(self, x):
        """`features` to the classifier's input, float32 `[N, F]`."""
        x = nn.relu(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))

    def classify(self, x):
        """`pool`'s `[N, F]` to logits."""
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
        x = self._stem(x.astype(self.dtype), train and frozen < 1)
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


def _add_stem(module, conv, norm):
    """Convolutions and norms in front of the first dense block, in `setup`."""
    if module.stem == 'imagenet':
        module.conv0 = conv(module.stem_features, (7, 7), strides=2)
        module.norm0 = norm()
    elif module.stem == 'deep':
        half = module.stem_features // 2
        module.conv0, module.norm0 = conv(half, (3, 3), strides=2), norm()
        module.conv1, module.norm1 = conv(half, (3, 3)), norm()
        module.conv2, module.norm2 = conv(module.stem_features, (3, 3)), norm()
    else:
        module.conv0 = conv(module.stem_features, (3, 3))


Network = DenseNet | rdnet.RDNet


def stages(model: Network) -> list[tuple[str, ...]]:
    """Names of the model's parts by depth: the stem, each dense block, the head.

    A block's stage has what follows the block: its transition, after the last `norm5`
    (of RDNet `norm`).
    """
    if isinstance(model, rdnet.RDNet):
        return rdnet.stages(model)
    stem = ('conv0',) if model.stem == 'cifar' else ('conv0', 'norm0')
    if model.stem == 'deep':
        stem += ('conv1', 'norm1', 'conv2', 'norm2')
    last = len(model.block_sizes)
    blocks = [
        (f'denseblock{n}', f'transition{n}' if n < last else 'norm5')
        for n in range(1, last + 1)
    ]
    return [stem, *blocks, ('classifier',)]


def plain(model: Network) -> Network:
    """The same network of modules alone, which can be counted and looked into."""
    return model if isinstance(model, rdnet.RDNet) else model.clone(fast=False)


def has_batch_norm(model: Network) -> bool:
    """Whether images of a batch act on each other in training."""
    return not isinstance(model, rdnet.RDNet)


def smallest_image_size(model: Network) -> int:
    """Smallest height and width, in pixels, that leave one pixel in the last block.

    Each of the n - 1 transitions halves, rounding down; the ImageNet stem halves
    twice, rounding up. 29 for the ImageNet variants, 4 for the CIFAR ones, 32 for
    RDNet's.
    """
    if isinstance(model, rdnet.RDNet):
        return rdnet.smallest_image_size(model)
    before_blocks = 2 ** (len(model.block_sizes) - 1)
    return before_blocks if model.stem == 'cifar' else 4 * before_blocks - 3


def last_map_side(model: Network, size: int) -> int:
    """Side of the last block's feature maps, of images of `size` pixels a side."""
    if isinstance(model, rdnet.RDNet):
        return rdnet.last_map_side(model, size)
    if model.stem != 'cifar':
        size = -(-size // 4)
    return size // 2 ** (len(model.block_sizes) - 1)


def check_image_size(model: Network, size: Sequence[int]):
    """Raises `UserError` where (height, width) is too small for the model."""
    smallest = smallest_image_size(model)
    if isinstance(model, rdnet.RDNet):
        rdnet.check_image_size(model, size)
    elif any(side < smallest for side in size):  # also of sides that are symbols
        raise UserError(
            f'images of {size[0]}x{size[1]} are too small for {len(model.block_sizes)} '
            f'dense blocks with the {model.stem} stem: use at least '
            f'{smallest}x{smallest}'
        )


def create_model(variant: str, *, num_classes: int, **fields) -> Network:
    """Makes the network named `variant`, with any of its fields overridden.

    Args:
      variant: a key of `VARIANTS`, or any `L<depth>k<growth>` with `B-`, `C-` or
        `BC-` before it (`cifar_fields`).
      num_classes: width of the classifier, 0 for pooled features.
      **fields: fields of `DenseNet` or, of an `rdnet_*`, of `rdnet.RDNet`; None takes
        the variant's own.

    Returns:
      The module: `model.apply(variables, images, train=False)`.

    Raises:
      UserError: no such variant or field, or a value that no such network can have.
    """
    kind, defaults = _find_variant(variant)
    chosen = _choose_fields(kind, variant, fields)
    model = kind(num_classes=num_classes, **(defaults | chosen))
    _check_fields(model)
    return model


def _find_variant(variant):
    """The class of a variant, and its fields."""
    if not isinstance(variant, str):
        raise UserError(f'model.variant={variant!r} must be a name, as densenet121')
    if variant in rdnet.VARIANTS:
        return rdnet.RDNet, rdnet.VARIANTS[variant]
    defaults = VARIANTS.get(variant) or cifar_fields(variant)
    if defaults is None:
        base = variant.partition('.')[0].removeprefix('tv_')
        if base != variant and base in VARIANTS:
            raise UserError(
                f'model.variant={variant} names weights; use model.variant={base}, '
                'with --config.init_from=FILE for weights'
            )
        raise UserError(
            f'model.variant={variant} is not known; use one of {", ".join(VARIANTS)}, '
            'or [B-|C-|BC-]L<depth>k<growth rate>'
        )
    return DenseNet, defaults


def field_defaults(kind) -> dict[str, Any]:
    """Fields of `DenseNet` or `RDNet` and their defaults (None where there is none)."""
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(kind)
        if field.name not in ('parent', 'name')
    }


def _choose_fields(kind, variant, fields):
    """Those of `fields` that say something, all of them fields of `kind`.

    A config has the fields of all networks; what is left there as it was says nothing.
    """
    known, chosen = field_defaults(kind), {}
    other = field_defaults(DenseNet if kind is rdnet.RDNet else rdnet.RDNet)
    for name, value in fields.items():
        if name in known:
            if value is not None:
                chosen[name] = value
        elif name not in other:
            raise UserError(
                f'model.{name} is not a field of the model; it has '
                f'{", ".join(sorted(known))}'
            )
        elif value is not None and value != other[name]:
            raise UserError(
                f'model.{name}={value}: {variant} has no such field; leave it out '
                f'(it has {", ".join(sorted(known))})'
            )
    return chosen


def _check_kinds(model):
    """Raises for a field that holds something else than it is declared for."""
    for field in dataclasses.fields(model):
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
    for name in ('growth_rate', 'stem_features', 'bottleneck', 'num_classes'):
        if getattr(model, name, 0) > MOST_PARAMETERS:
            raise UserError(f'model.{name} is above {MOST_PARAMETERS:.3g} parameters')
    count = count_parameters(model)
    if count > MOST_PARAMETERS:
        growth = 'growth_rates' if isinstance(model, rdnet.RDNet) else 'growth_rate'
        raise UserError(
            f'this model would have {count:.3g} parameters, more than '
            f'{MOST_PARAMETERS:.3g}: lower model.{growth}={getattr(model, growth)}, '
            f'model.stem_features={model.stem_features}, '
            f'model.bottleneck={model.bottleneck} or the number of classes, '
            f'{model.num_classes}'
        )


def count_parameters(model: Network, *, channels: int = 3) -> int:
    """Number of parameters, by arithmetic alone: what `init_variables` would make.

    >>> count_parameters(create_model('densenet121', num_classes=1000))
    7978856
    """
    if isinstance(model, rdnet.RDNet):
        return rdnet.count_parameters(model, channels=channels)
    growth, width = model.growth_rate, model.bottleneck * model.growth_rate
    features = model.stem_features
    count = features * channels * 9
    if model.stem == 'imagenet':
        count = features * channels * 49 + 2 * features
    elif model.stem == 'deep':
        half = features // 2
        count = 9 * half * (channels + half + features) + 4 * half + 2 * features
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
        'dtype': DTYPES,
        'initializer': tuple(INITIALIZERS),
        'remat': ('none', 'block'),
    }
    if isinstance(model, DenseNet):
        choices |= {
            'stem': STEMS,
            'padding': PADDINGS,
            'kernel': dense_block.KERNELS,
            'dropout_after': ('conv3x3', 'every_conv'),
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
        'stem_features': model.stem_features >= 1,
        'compression': 0 < model.compression <= 1,
        'dropout_rate': 0 <= model.dropout_rate < 1,
        'drop_path_rate': 0 <= model.drop_path_rate < 1,
        'epsilon': 0 < model.epsilon <= 1,
    }
    if isinstance(model, DenseNet):
        ranges |= {
            'growth_rate': model.growth_rate >= 1,
            'bottleneck': model.bottleneck >= 0,
            'stem_features': model.stem_features >= 1 + (model.stem == 'deep'),
            'momentum': 0 <= model.momentum < 1,
            'batch_norm_group': model.batch_norm_group >= groups.DEVICE,
        }
    for name, valid in ranges.items():
        if not valid:
            raise UserError(f'model.{name}={getattr(model, name)} is out of range')
    if isinstance(model, rdnet.RDNet):
        rdnet.check_fields(model)
    elif model.blur_pool and model.stem == 'cifar':
        raise UserError('model.blur_pool=True: the cifar stem has no pooling to blur')
    elif model.kernel == 'native' and model.dropout_after == 'every_conv':
        raise UserError(
            'model.kernel=native cannot drop out: use auto with '
            'model.dropout_after=every_conv'
        )
    elif model.kernel == 'native' and model.drop_path_rate:
        raise UserError(
            'model.kernel=native has no stochastic depth: use auto with '
            f'model.drop_path_rate={model.drop_path_rate}'
        )
    _check_size(model)


def variable_shapes(model: Network, *, channels: int = 3):
    """Shapes and dtypes of `{'params', 'batch_stats'}`; computes and compiles nothing.

    Without batch norm `batch_stats` is there, and empty.

    Args:
      channels: of the images.
    """
    side = smallest_image_size(model)
    image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    # Tracing 121 random draws would take half of the time.
    model = model.clone(initializer=None)
    # The key inside, else a program that makes it is compiled.
    init = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    return with_statistics(init)


def with_statistics(variables: dict[str, Any]) -> dict[str, Any]:
    """Variables with `batch_stats`, empty where the network has no batch norm."""
    return {'params': variables['params'], 'batch_stats': {}} | variables


def init_variables(model: Network, seed: int, *, channels: int = 3):
    """Makes `{'params', 'batch_stats'}` from `seed`, without compiling the network.

    `model.init` compiles or runs every layer, 13 to 32 s for the 121 on two CPU
    cores; this asks it for shapes only and draws each kernel with numpy, from a
    generator keyed by the seed and the variable's path. So a layer's values do not
    depend on which others exist, on the device, or on the version of JAX.

    Args:
      model: of `create_model`.
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
                rule = layers.CLASSIFIER_INITIALIZER
            key = [seed, zlib.crc32('/'.join(path).encode())]
            generator = np.random.Generator(np.random.Philox(key=key))
            return _draw_kernel(generator, rule, leaf.shape).astype(leaf.dtype)
        values = {'scale': 1, 'var': 1, 'gamma': getattr(model, 'layer_scale', 0)}
        return np.full(leaf.shape, values.get(path[-1], 0), leaf.dtype)

    flat = traverse_util.flatten_dict(shapes)
    drawn = {path: draw(path, leaf) for path, leaf in flat.items()}
    return with_statistics(traverse_util.unflatten_dict(drawn))


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
