"""Networks for inference, with batch norm folded into the convolutions.

A dense layer is `conv3x3(relu(norm2(conv1x1(relu(norm1(x))))))`. With running
statistics, a norm is `(x - mean) * a + bias` with `a = scale / sqrt(var + epsilon)`. A
norm after a convolution can be folded into it, with another kernel and a bias:

    norm(conv(x, kernel)) = conv(x, kernel * a) + (bias - mean * a)

This removes the norms of the stem and each norm2; a norm before its convolution stays.
Up to rounding, the results equal those of `Network.features`. Few operations remain,
and no Linen modules, so tracing is fast.

>>> import jax
>>> import jax.numpy as jnp
>>> from flax_densenet import create_model, init_variables
>>> model = create_model('BC-L100k12', num_classes=10, block_sizes=(2, 2, 2))
>>> folded = fold(model, init_variables(model, seed=0))
>>> jax.jit(logits, static_argnums=0)(model, folded, jnp.zeros((1, 32, 32, 3))).shape
(1, 10)
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import (
    dense_block,
    packed_bfloat16,
    packed_inference,
    xla_block,
)
from flax_densenet.models import ensemble
from flax_densenet.models import layers as layers_lib
from flax_densenet.models.network import Network


def fold(module: Network, variables) -> dict[str, Any]:
    """Folds the variables of a network into the arrays that `features` takes.

    Args:
      module: the network.
      variables: `{'params', 'batch_stats'}`.

    Returns:
      A dict of host arrays, float32 (float64 with `dtype='float64'`): `stem` (its
      convolutions), `blocks` (the `layers` of each block, and its `tail`: the
      transition or the last norm) and `head` (the variables after the features). The
      stem and the blocks are `packed` if the native kernel computes them. A network
      without batch norm has nothing to fold, so the dict has its `variables`, with the
      kernels packed if the native kernel computes it, and its `head`. For an ensemble
      it has the stacked `members` and their `head`.
    """
    variables = jax.tree.map(np.asarray, variables)
    if module.members > 1:
        return _fold_members(module, variables)
    params, stats = variables['params'], variables.get('batch_stats', {})
    head = {k: params[k] for k in ('norm', 'classifier') if k in params}
    if not module.has_batch_norm:
        packed = variables | module.pack(params)
        return {'variables': packed, 'head': {'params': head}}
    stem, blocks = _fold_stem(module, params, stats), []
    for number, size in enumerate(module.block_sizes, start=1):
        name = f'denseblock{number}'
        layers = [
            _fold_layer(module, params[name][layer], stats[name][layer])
            for layer in (f'denselayer{n}' for n in range(1, size + 1))
        ]
        blocks.append(
            {'layers': layers, 'tail': _fold_tail(module, params, stats, number)}
        )
    if _is_native(module, blocks[0]['layers'][0]):
        packing = _packing(module)
        blocks = [{'packed': packing.pack_block(**block)} for block in blocks]
        channels = stem[0]['kernel'].shape[2]
        if module.stem == 'imagenet' and not module.blur_pool and channels in (1, 3):
            stem = {'packed': packing.pack_stem(stem[0])}
    return {'stem': stem, 'blocks': blocks, 'head': {'params': head}}


def _fold_members(module, variables):
    found = [fold(module.member, one) for one in ensemble.unstack(variables)]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *found)
    return {'head': stacked.pop('head'), 'members': stacked}


def _fold_stem(module, params, stats):
    if module.stem == 'cifar':
        return [{'kernel': params['conv0']['kernel']}]
    count = 3 if module.stem == 'deep' else 1
    norms = [_norm(module, params[f'norm{n}'], stats[f'norm{n}']) for n in range(count)]
    return [_join(params[f'conv{n}'], norm) for n, norm in enumerate(norms)]


def _fold_layer(module, params, stats):
    first = _norm(module, params['norm1'], stats['norm1'])
    if not module.bottleneck:
        return {'norm1': first, 'conv1': {'kernel': params['conv1']['kernel']}}
    second = _norm(module, params['norm2'], stats['norm2'])
    conv2 = {'kernel': params['conv2']['kernel']}
    return {'norm1': first, 'conv1': _join(params['conv1'], second), 'conv2': conv2}


def _fold_tail(module, params, stats, number):
    if number == len(module.block_sizes):
        return _norm(module, params['norm5'], stats['norm5'])
    name = f'transition{number}'
    norm = _norm(module, params[name]['norm'], stats[name]['norm'])
    return norm | {'kernel': params[name]['conv']['kernel']}


def _is_native(module, layer):
    if not module.fast:
        return False
    x = jax.ShapeDtypeStruct((), module.dtype)
    kernel2 = layer.get('conv2', {}).get('kernel')
    layers = [xla_block.Layer(None, None, None, None, None, kernel2=kernel2)]
    load = 'bfloat16' if module.dtype == 'bfloat16' else 'float32'
    return dense_block.use_native(module.kernel, x, layers, load=load)


def why_bfloat16_is_slow(module: Network) -> str | None:
    """Why bfloat16 is not faster than float32 for a network here; None if it is."""
    if jax.default_backend() != 'cpu':
        return None
    fields = module.fields()
    if 'kernel' not in fields or not module.bottleneck or not module.fast:
        return 'there is no bfloat16 CPU kernel for this network'
    if module.kernel == 'xla':
        return 'the CPU kernel is not used'
    return cpu_kernels.why_bfloat16_is_slow(module.family)


def _packing(module):
    if module.dtype == 'bfloat16':
        return packed_bfloat16
    return packed_inference


def _norm(module, params, averages):
    """`{mean, a, bias}` of a norm that computes (x - mean) * a + bias."""
    scale, var = params['scale'], averages['var']
    a = scale.astype(np.float64) / np.sqrt(var.astype(np.float64) + module.epsilon)
    return {
        'mean': averages['mean'],
        'a': a.astype(scale.dtype),
        'bias': params['bias'],
    }


def _join(conv, norm):
    """Folds the norm after a convolution into it."""
    bias = norm['bias'] - norm['mean'].astype(np.float64) * norm['a']
    return {
        'kernel': conv['kernel'] * norm['a'].reshape(1, 1, 1, -1),
        'bias': bias.astype(conv['kernel'].dtype),
    }


def differentiable(module: Network) -> Network:
    """The network to fold if `features` must be differentiable."""
    # The native kernel for inference has no gradient.
    return module.clone(kernel='xla') if 'kernel' in module.fields() else module


def features(module: Network, folded, images):
    """Maps normalized images `[N, H, W, C]` to the last feature map `[N, h, w, F]`.

    Args:
      module: the network.
      folded: the result of `fold`.
      images: float `[N, H, W, C]`.

    Raises:
      UserError: the images are smaller than `smallest_image_size`.
    """
    if 'members' in folded:
        member = module.member
        maps = lax.map(lambda one: features(member, one, images), folded['members'])
        return ensemble.join(maps)
    if 'variables' in folded:
        return module.apply(folded['variables'], images, method='features')
    x = _first_blocks(module, folded, images)
    return _last_block(module, folded, x)


def before_last_halving(module: Network, folded, images):
    """The feature map before the size is halved for the last time, and the rest.

    In a DenseNet it is the map in the last transition, after its ReLU; in an RDNet it
    is the output of the block before the last halving. In a network that never halves
    the size, it is the last map.

    Args:
      module: the network, from `differentiable`.
      folded: the result of `fold` for this module.
      images: normalized images `[N, H, W, C]`.

    Returns:
      The map `[N, h, w, F]`, and a function from it to the result of `features`.
    """
    if 'members' in folded:
        return _before_last_halvings(module, folded['members'], images)
    if 'variables' in folded:
        variables = folded['variables']
        x, number = module.apply(variables, images, method='before_last_halving')

        def finish(x):
            return module.apply(variables, x, number, method='features_after')

        return x, finish
    if len(folded['blocks']) == 1:
        return features(module, folded, images), lambda x: x
    tail = folded['blocks'][-2]['tail']
    x = _first_blocks(module, folded, images, tails=len(folded['blocks']) - 2)
    x = jax.nn.relu(_normalize(x, tail)).astype(x.dtype)
    return x, lambda x: _last_block(module, folded, _mix_and_pool(x, tail))


def _before_last_halvings(module, members, images):
    """`before_last_halving` for an ensemble: the concatenated maps of its members."""

    def finish(x):
        def finish_one(pair):
            arrays, own = pair
            return before_last_halving(module.member, arrays, images)[1](own)

        parts = ensemble.split(x, module.members)
        return ensemble.join(lax.map(finish_one, (members, parts)))

    found = lax.map(
        lambda one: before_last_halving(module.member, one, images)[0], members
    )
    return ensemble.join(found), finish


def _first_blocks(module, folded, images, tails=None):
    """The stem and all blocks but the last.

    Args:
      tails: the number of transitions to include; None for all.
    """
    module.check_image_size(images.shape[1:3])
    x = _stem(module, folded['stem'], images)
    sizes = zip(module.block_sizes, folded['blocks'][:-1], strict=False)
    for number, (size, block) in enumerate(sizes):
        x = _block(module, x, block, size)
        if 'packed' not in block and number != tails:
            x = _transition(x, block['tail'])
    return x


def _last_block(module, folded, x):
    block = folded['blocks'][-1]
    x = _block(module, x, block, module.block_sizes[-1], last=True)
    return x if 'packed' in block else _normalize(x, block['tail']).astype(x.dtype)


def _block(module, x, block, size, last=False):
    """A dense block; if it is packed, this includes what follows it."""
    if 'packed' in block:
        return _native_block(module, x, block['packed'], size, last)
    for layer in block['layers']:
        x = jnp.concatenate([x, _dense_layer(x, layer)], -1)
    return x


def _native_block(module, x, packed, size, last):
    growth = module.growth_rate
    channels = x.shape[-1] + size * growth
    return _packing(module).block(
        x,
        packed,
        layers=size,
        bottleneck=module.bottleneck * growth,
        growth=growth,
        features=0 if last else int(channels * module.compression),
    )


def logits(module: Network, folded, images):
    """Maps normalized images `[N, H, W, C]` to logits `[N, num_classes]`."""
    maps = features(module, folded, images)
    return module.apply(folded['head'], maps, method='head')


def _row(vector):
    return jnp.reshape(vector, (1, 1, 1, -1))


def _normalize(x, norm):
    mean, a, bias = (_row(norm[name]) for name in ('mean', 'a', 'bias'))
    return (x.astype(mean.dtype) - mean) * a + bias


def _biased_relu(x, conv):
    bias = _row(conv['bias'])
    return jax.nn.relu(x.astype(bias.dtype) + bias).astype(x.dtype)


def _conv(x, kernel, padding, stride=1):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    strides, kernel = (stride, stride), kernel.astype(x.dtype)
    return lax.conv_general_dilated(x, kernel, strides, padding, None, None, numbers)


def _padding(module, sizes, window, stride):
    """((top, bottom), (left, right))"""
    if module.padding == 'same':
        return lax.padtype_to_pads(sizes, (window,) * 2, (stride,) * 2, 'SAME')
    return ((window // 2, window // 2),) * 2


def _stem(module, convs, x):
    def conv(x, kernel, stride=1):
        padding = _padding(module, x.shape[1:3], kernel.shape[0], stride)
        return _conv(x, kernel, padding, stride)

    if 'packed' in convs:
        size, sizes = packed_inference.stem_sizes(
            x,
            _padding(module, x.shape[1:3], 7, 2),
            lambda sizes: _padding(module, sizes, 3, 2),
        )
        packed, features = convs['packed'], module.stem_features
        return _packing(module).stem(x, packed, features=features, size=size, **sizes)
    x = x.astype(module.dtype)
    if module.stem == 'cifar':
        return conv(x, convs[0]['kernel'])
    x = conv(x, convs[0]['kernel'], 2)
    for before, after in itertools.pairwise(convs):
        x = conv(_biased_relu(x, before), after['kernel'])
    # Pooling comes first: bias and ReLU preserve the order of values in a channel.
    stride = 1 if module.blur_pool else 2
    padding = ((1, 1), (1, 1))
    if not module.blur_pool:
        padding = _padding(module, x.shape[1:3], 3, 2)
    x = lax.reduce_window(
        x,
        np.array(-np.inf, x.dtype),
        lax.max,
        (1, 3, 3, 1),
        (1, stride, stride, 1),
        ((0, 0), *padding, (0, 0)),
    )
    x = _biased_relu(x, convs[-1])
    return layers_lib.blur_pool(x) if module.blur_pool else x


_SAME_3X3 = ((1, 1), (1, 1))


def _dense_layer(x, layer):
    y = jax.nn.relu(_normalize(x, layer['norm1'])).astype(x.dtype)
    if 'conv2' not in layer:
        return _conv(y, layer['conv1']['kernel'], _SAME_3X3)
    y = xla_block.product(y, layer['conv1']['kernel'].astype(x.dtype)[0, 0])
    return _conv(_biased_relu(y, layer['conv1']), layer['conv2']['kernel'], _SAME_3X3)


def _transition(x, arrays):
    """Pools before the 1x1 convolution, which then has a quarter of the work."""
    return _mix_and_pool(jax.nn.relu(_normalize(x, arrays)).astype(x.dtype), arrays)


def _mix_and_pool(y, arrays):
    height, width = (n // 2 * 2 for n in y.shape[1:3])
    y = y[:, :height, :width]
    y = y.reshape(y.shape[0], height // 2, 2, width // 2, 2, y.shape[3]).mean((2, 4))
    return xla_block.product(y, arrays['kernel'].astype(y.dtype)[0, 0])
