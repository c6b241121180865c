"""DenseNet as a Flax module (arXiv 1608.06993)."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from flax_densenet.errors import UserError
from flax_densenet.kernels import dense_block
from flax_densenet.models import ghost_batch_norm, layers, network

STEMS = ('imagenet', 'deep', 'cifar')
PADDINGS = ('torch', 'same')
POOLINGS = ('mean', 'max', 'max_mean')


class DenseNet(network.Network):
    """DenseNet for images `[N, H, W, C]`; create one with `create_model`.

    Attributes:
      num_classes: width of the classifier. With 0 there is no classifier, and the model
        returns the pooled features.
      growth_rate: number of feature maps that each layer adds (k).
      block_sizes: number of layers in each dense block.
      bottleneck: a 1x1 convolution to `bottleneck * growth_rate` maps comes before
        each 3x3 convolution; 0 for none.
      compression: fraction of the feature maps that a transition keeps (theta).
      stem: `imagenet` (7x7 convolution with stride 2, batch norm, ReLU, 3x3 max pooling
        with stride 2), `deep` (three 3x3 convolutions in place of the 7x7, each with
        batch norm and ReLU; the first has stride 2, and the first two have half of the
        maps) or `cifar` (a single 3x3 convolution).
      stem_features: number of feature maps of the stem.
      blur_pool: the pooling of the stem has stride 1, and a blur (`layers.blur_pool`)
        halves the size instead. Not possible with the `cifar` stem, which has no
        pooling.
      dropout_rate: fraction of the values dropped in training.
      dropout_after: where values are dropped: `conv3x3` (after each 3x3 convolution of
        a dense block, as in the PyTorch ports) or `every_conv` (also after each 1x1
        convolution and in transitions, as in the authors' Torch code). `every_conv`
        with a rate above 0 uses the plain layers.
      drop_path_rate: in training, fraction of the images for which the new feature maps
        of the last dense layer are dropped (stochastic depth); those of other images
        are scaled up. The rate decreases linearly to 0 at the first layer
        (`layers.drop_path_rates`).
      epsilon: added to the variance in batch norm.
      momentum: fraction of the running average that batch norm keeps at each step.
      unbiased_variance: whether running variances are unbiased (as in PyTorch) or
        biased (as in Keras).
      dtype: dtype of the activations. Parameters, statistics and logits are float32.
        With `float64`, which needs `jax_enable_x64`, everything is float64.
      padding: padding of convolutions and max pooling: `torch` (symmetric) or `same`
        (as in TensorFlow, which pads more at the end). They differ if the stride is 2.
      initializer: initializer of convolution kernels, a key of `factory.INITIALIZERS`.
      fast: compute dense blocks and transitions with `kernels.dense_block`. False uses
        the plain layers, with the same variables and, up to rounding, the same results.
      kernel: implementation of the fast block: `native` (C++, float32 or bfloat16, on
        CPUs), `xla`, or `auto` (native if possible). In a program on several CPU
        devices, native is possible within `jax.set_mesh(mesh)`, where the mesh has one
        axis, for the rows.
      remat: `block` recomputes activations in the backward pass of the XLA fast block;
        `none` keeps them. The native kernel always recomputes them.
      batch_norm_group: in training, the number of consecutive rows over which batch
        norm computes its statistics. The running statistics are updated once per step,
        with the average over the groups. 0: all rows. -1: the rows of one device; the
        training step replaces -1 with their number (`ghost_batch_norm.resolve`), and
        the module itself uses all rows.
      hidden: widths of linear layers before the classifier, each followed by a ReLU.
      pooling: `mean` over all positions, `max`, or `max_mean` (both, in this order).
      last_relu: whether there is a ReLU between the last norm and the pooling.
    """

    family = 'densenet'
    has_batch_norm = True
    architecture_fields = (
        *('growth_rate', 'block_sizes', 'bottleneck', 'compression', 'stem'),
        'stem_features',
    )
    growth_field = 'growth_rate'
    head_fields = ('hidden', 'pooling', 'last_relu')

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
    hidden: Sequence[int] = ()
    pooling: str = 'mean'
    last_relu: bool = True

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
        layer, fast = _make_layer(self, conv, kernel, norm)
        _add_stem(self, conv, norm)
        transition = functools.partial(
            layers.Transition,
            conv=conv,
            kernel=kernel,
            norm=norm,
            fast=fast,
            dropout_rate=self.dropout_rate if _drops_everywhere(self) else 0.0,
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
            linear = functools.partial(
                nn.Dense,
                dtype=param_dtype,
                param_dtype=param_dtype,
                kernel_init=classifier_init,
            )
            self.classifier = (
                layers.Perceptron((*self.hidden, self.num_classes), linear)
                if self.hidden
                else linear(self.num_classes)
            )

    def _stem(self, x, train):
        """The convolutions and the pooling before the first dense block."""
        if self._has_whole_stem(x, train):
            return self._whole_stem(x, train)
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

    def _has_whole_stem(self, x, train):
        usual = self.stem != 'imagenet' or self.blur_pool or not self.fast
        if usual or self.is_initializing():
            return False
        return dense_block.has_whole_stem(x, self.kernel, train)

    def _whole_stem(self, x, train):
        """The stem with its convolution, in one call of a C++ kernel."""
        weights = self.conv0.variables['params']['kernel']
        scale, bias, *averages = self.norm0.declare(weights.shape[-1])
        mean, var = (None, None) if train else (a.value for a in averages)
        y, statistics, count = dense_block.whole_stem(
            x,
            weights,
            (mean, var, scale, bias),
            epsilon=self.epsilon,
            padding=self.padding,
        )
        if train:
            self.norm0.update(averages, statistics, count)
        return y

    def _norm_and_pool(self, x, norm, train):
        """Batch norm, ReLU, 3x3 max pooling with stride 2."""
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

    def pool(self, x):
        """ReLU and the mean over all positions: float32 `[N, F]`.

        With another `pooling`, the maximum, or both.
        """
        x = nn.relu(x) if self.last_relu else x
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.pooling == 'mean':
            return x.mean((1, 2))
        if self.pooling == 'max':
            return x.max((1, 2))
        return jnp.concatenate([x.max((1, 2)), x.mean((1, 2))], -1)

    def pyramid(self, x, train: bool = False, frozen: int = 0):
        """Maps images to the output of each dense block, a list from fine to coarse.

        For detection and segmentation: strides 4, 8, 16 and 32 with the ImageNet
        stem. The last entry, after `norm5` and before its ReLU, is the result of
        `features`, here and in torchvision.
        """
        self.check_image_size(x.shape[-3:-1])
        grouped = 0 < self.batch_norm_group != x.shape[0]
        if train and grouped and not self.is_initializing():
            names = {name for stage in self.stages()[frozen:] for name in stage}
            return ghost_batch_norm.pyramid(self, x, frozen, names)
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

    @nn.nowrap
    def stages(self):
        stem = ('conv0',) if self.stem == 'cifar' else ('conv0', 'norm0')
        if self.stem == 'deep':
            stem += ('conv1', 'norm1', 'conv2', 'norm2')
        last = len(self.block_sizes)
        blocks = [
            (f'denseblock{n}', f'transition{n}' if n < last else 'norm5')
            for n in range(1, last + 1)
        ]
        return [stem, *blocks, ('classifier',)]

    @nn.nowrap
    def plain(self):
        return self.clone(fast=False)

    @nn.nowrap
    def has_usual_head(self):
        return not self.hidden and self.pooling == 'mean' and self.last_relu

    @nn.nowrap
    def smallest_image_size(self):
        # Each of the n - 1 transitions halves the size, rounding down; the ImageNet
        # stem halves it twice, rounding up.
        before_blocks = 2 ** (len(self.block_sizes) - 1)
        return before_blocks if self.stem == 'cifar' else 4 * before_blocks - 3

    @nn.nowrap
    def last_map_side(self, size):
        if self.stem != 'cifar':
            size = -(-size // 4)
        return size // 2 ** (len(self.block_sizes) - 1)

    @nn.nowrap
    def check_image_size(self, size):
        smallest = self.smallest_image_size()
        if any(side < smallest for side in size):  # works for symbolic sizes, too
            raise UserError(
                f'images of {size[0]}x{size[1]} are too small for '
                f'{len(self.block_sizes)} dense blocks with the {self.stem} stem: use '
                f'at least {smallest}x{smallest}'
            )

    @nn.nowrap
    def takes_any_size(self):
        # The padding of TensorFlow depends on the size if the stride is 2.
        return self.padding == 'torch' or self.stem == 'cifar'

    @nn.nowrap
    def count_parameters(self, *, channels=3):
        growth, width = self.growth_rate, self.bottleneck * self.growth_rate
        features = self.stem_features
        count = features * channels * 9
        if self.stem == 'imagenet':
            count = features * channels * 49 + 2 * features
        elif self.stem == 'deep':
            half = features // 2
            count = 9 * half * (channels + half + features) + 4 * half + 2 * features
        for number, size in enumerate(self.block_sizes, start=1):
            for _ in range(size):
                inner = 2 * width + features * width if width else 0
                count += 2 * features + inner + 9 * (width or features) * growth
                features += growth
            if number < len(self.block_sizes):
                shrunk = int(features * self.compression)
                count += 2 * features + features * shrunk
                features = shrunk
        count += 2 * features
        features *= 2 if self.pooling == 'max_mean' else 1
        for width in (*self.hidden, self.num_classes):
            count += (features + 1) * width
            features = width
        return count

    @nn.nowrap
    def check_fields(self):
        network.check_choices(
            self,
            stem=STEMS,
            padding=PADDINGS,
            pooling=POOLINGS,
            kernel=dense_block.KERNELS,
            dropout_after=('conv3x3', 'every_conv'),
        )
        network.check_ranges(
            self,
            growth_rate=(self.growth_rate >= 1, 'at least 1'),
            bottleneck=(self.bottleneck >= 0, 'at least 0'),
            stem_features=(
                self.stem_features >= 1 + (self.stem == 'deep'),
                f'at least {1 + (self.stem == "deep")} with model.stem={self.stem}',
            ),
            momentum=(0 <= self.momentum < 1, 'at least 0, and below 1'),
            batch_norm_group=(
                self.batch_norm_group >= ghost_batch_norm.DEVICE,
                f'{ghost_batch_norm.DEVICE} (of a device), 0 (all) or above',
            ),
            hidden=(
                all(type(n) is int and n > 0 for n in self.hidden),
                'whole numbers of at least 1',
            ),
        )
        if self.blur_pool and self.stem == 'cifar':
            raise UserError(
                'model.blur_pool=True: the cifar stem has no pooling to blur'
            )
        if self.kernel == 'native' and self.dropout_after == 'every_conv':
            raise UserError(
                'model.kernel=native does not support this dropout: use auto with '
                'model.dropout_after=every_conv'
            )


def _drops_everywhere(module):
    return module.dropout_rate > 0 and module.dropout_after == 'every_conv'


def _make_layer(module, conv, kernel, norm):
    """The constructor of dense layers, and the options of the fast block (or None)."""
    layer, fast = functools.partial(layers.DenseLayer, conv=conv), None
    if _drops_everywhere(module):
        layer = functools.partial(layer, drop_bottleneck=True)
    elif module.fast:
        layer = functools.partial(layers.DenseLayerVariables, kernel=kernel)
        fast = dict(
            epsilon=module.epsilon,
            dtype=jnp.dtype(module.dtype),
            kernel=module.kernel,
            remat=module.remat == 'block',
        )
    options = dict(
        growth_rate=module.growth_rate,
        bottleneck=module.bottleneck,
        dropout_rate=module.dropout_rate,
        norm=norm,
    )
    return functools.partial(layer, **options), fast


def _add_stem(module, conv, norm):
    """Adds the convolutions and norms of the stem; part of `setup`."""
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
