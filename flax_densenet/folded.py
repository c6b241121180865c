"""A DenseNet for inference alone: what does not depend on the image is computed once.

A dense layer is `conv3x3(relu(norm2(conv1x1(relu(norm1(x))))))`. With running statistics
a norm is `(x - mean) * a + bias`, `a = scale / sqrt(var + epsilon)`; behind a convolution
it is that convolution with another kernel and a bias:

    norm(conv(x, kernel)) = conv(x, kernel * a) + (bias - mean * a)

So the stem's norms and each norm2 disappear; a norm in front of a ReLU stays. Up to
rounding the results are those of the module's `features`, which the tests compare.
There are few operations left, which are quickly traced, and no layer's modules.

>>> import jax.numpy as jnp
>>> from flax_densenet import create_model, init_variables
>>> model = create_model('BC-L100k12', num_classes=10, block_sizes=(2, 2, 2))
>>> folded = fold(model, init_variables(model, seed=0))
>>> logits(model, folded, jnp.zeros((1, 32, 32, 3))).shape
(1, 10)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_densenet import cpu_kernels, dense_block, layers
from flax_densenet.model import DenseNet, Network, check_image_size, has_batch_norm


def fold(module: Network, variables) -> dict[str, Any]:
    """The arrays of `features`, on the host.

    Args:
      variables: `{'params', 'batch_stats'}`.

    Returns:
      `stem`: convolutions; `blocks`: for each its layers, or one vector where the
      native kernel computes it; `transitions`; `norm5`; `head`: variables behind the
      features. float32, float64 with `dtype='float64'`. Of RDNet, which has nothing to
      fold, its `variables` and its `head`.
    """
    variables = jax.tree.map(np.asarray, variables)
    if not has_batch_norm(module):
        head = {k: variables['params'][k] for k in ('norm', 'classifier')}
        return {'variables': variables, 'head': {'params': head}}
    params, stats = variables['params'], variables['batch_stats']
    epsilon, count = module.epsilon, len(module.block_sizes)

    def norm(parts, averages):
        return _norm(parts, averages, epsilon)

    def layer(parts, averages):
        first = norm(parts['norm1'], averages['norm1'])
        if not module.bottleneck:
            return {'norm1': first, 'conv1': {'kernel': parts['conv1']['kernel']}}
        second = norm(parts['norm2'], averages['norm2'])
        return {
            'norm1': first,
            'conv1': _join(parts['conv1'], second),
            'conv2': {'kernel': parts['conv2']['kernel']},
        }

    def block(number):
        name = f'denseblock{number}'
        found = [
            layer(params[name][f'denselayer{n}'], stats[name][f'denselayer{n}'])
            for n in range(1, module.block_sizes[number - 1] + 1)
        ]
        if not _is_native(module, found[0]):
            return found
        return dense_block.pack(found, cpu_kernels.panel())

    def transition(number):
        name = f'transition{number}'
        kernel = {'kernel': params[name]['conv']['kernel']}
        return norm(params[name]['norm'], stats[name]['norm']) | kernel

    stem = [{'kernel': params['conv0']['kernel']}]
    if module.stem != 'cifar':
        last = 3 if module.stem == 'deep' else 1
        stem = [
            _join(params[f'conv{n}'], norm(params[f'norm{n}'], stats[f'norm{n}']))
            for n in range(last)
        ]
    return {
        'stem': stem,
        'blocks': [block(number) for number in range(1, count + 1)],
        'transitions': [transition(number) for number in range(1, count)],
        'norm5': norm(params['norm5'], stats['norm5']),
        'head': {'params': {k: v for k, v in params.items() if k == 'classifier'}},
    }


def _is_native(module, layer):
    if not module.fast:
        return False
    x = jax.ShapeDtypeStruct((), module.dtype)
    kernel2 = layer.get('conv2', {}).get('kernel')
    layers = [dense_block.Layer(None, None, None, None, None, kernel2=kernel2)]
    return dense_block.use_native(module.kernel, x, layers)


def _norm(params, averages, epsilon):
    """{mean, a, bias}: (x - mean) * a + bias."""
    scale, var = params['scale'], averages['var']
    a = scale.astype(np.float64) / np.sqrt(var.astype(np.float64) + epsilon)
    return {
        'mean': averages['mean'],
        'a': a.astype(scale.dtype),
        'bias': params['bias'],
    }


def _join(conv, norm):
    """A convolution that does the norm behind it as well."""
    kernel, a = conv['kernel'], norm['a'].astype(np.float64)
    bias = norm['bias'] - norm['mean'].astype(np.float64) * a
    return {
        'kernel': (kernel * a.reshape(1, 1, 1, -1)).astype(kernel.dtype),
        'bias': bias.astype(kernel.dtype),
    }


def features(module: DenseNet, folded, images):
    """As the module's `features`: images `[N, H, W, C]`, normalised, to `[N, h, w, F]`.

    Raises:
      UserError: the images are smaller than `model.smallest_image_size`.
    """
    if 'variables' in folded:
        return module.apply(folded['variables'], images, method='features')
    check_image_size(module, images.shape[1:3])
    dtype = jnp.dtype(module.dtype)
    x = _stem(module, folded['stem'], images.astype(dtype))
    for place, block in enumerate(folded['blocks']):
        if not isinstance(block, list):
            x = dense_block.block_packed(
                x,
                block,
                layers=module.block_sizes[place],
                bottleneck=module.bottleneck * module.growth_rate,
                growth=module.growth_rate,
            )
            block = []
        for layer in block:
            x = jnp.concatenate([x, _dense_layer(x, layer, dtype)], -1)
        if place < len(folded['transitions']):
            x = _transition(x, folded['transitions'][place], dtype)
    return _normalise(x, folded['norm5']).astype(dtype)


def logits(module: DenseNet, folded, images):
    """As the module itself: images `[N, H, W, C]`, normalised, to `[N, num_classes]`."""
    maps = features(module, folded, images)
    return module.apply(folded['head'], maps, method='head')


def _row(vector):
    return jnp.reshape(vector, (1, 1, 1, -1))


def _normalise(x, norm):
    mean, a, bias = (_row(norm[name]) for name in ('mean', 'a', 'bias'))
    return (x.astype(mean.dtype) - mean) * a + bias


def _biased_relu(x, conv, dtype):
    bias = _row(conv['bias'])
    return jax.nn.relu(x.astype(bias.dtype) + bias).astype(dtype)


def _conv(x, conv, padding='torch', stride=1):
    kernel = conv['kernel'].astype(x.dtype)
    pad = 'SAME' if padding == 'same' else [(n // 2, n // 2) for n in kernel.shape[:2]]
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, pad, None, None, numbers)


def _stem(module, convs, x):
    dtype = x.dtype
    if module.stem == 'cifar':
        return _conv(x, convs[0], module.padding)
    for conv in convs[:-1]:
        stride = 2 if conv is convs[0] else 1
        x = _biased_relu(_conv(x, conv, module.padding, stride), conv, dtype)
    x = _conv(x, convs[-1], module.padding, 2 if len(convs) == 1 else 1)
    pad, stride = [(1, 1), (1, 1)], 1 if module.blur_pool else 2
    if module.padding == 'same' and not module.blur_pool:
        pad = lax.padtype_to_pads(x.shape[1:3], (3, 3), (2, 2), 'SAME')
    # The largest first: what bias and ReLU do to all of a channel keeps the order.
    x = lax.reduce_window(
        x,
        np.array(-np.inf, dtype),
        lax.max,
        (1, 3, 3, 1),
        (1, stride, stride, 1),
        ((0, 0), *pad, (0, 0)),
    )
    x = _biased_relu(x, convs[-1], dtype)
    return layers.blur_pool(x) if module.blur_pool else x


def _dense_layer(x, layer, dtype):
    y = jax.nn.relu(_normalise(x, layer['norm1'])).astype(dtype)
    if 'conv2' not in layer:
        return _conv(y, layer['conv1'])
    y = dense_block.product(y, layer['conv1']['kernel'].astype(dtype)[0, 0])
    return _conv(_biased_relu(y, layer['conv1'], dtype), layer['conv2'])


def _transition(x, arrays, dtype):
    """The mean of 2x2 in front of the 1x1 convolution, which leaves it a quarter."""
    y = jax.nn.relu(_normalise(x, arrays)).astype(dtype)
    height, width = (n // 2 * 2 for n in y.shape[1:3])
    y = y[:, :height, :width]
    y = y.reshape(y.shape[0], height // 2, 2, width // 2, 2, y.shape[3]).mean((2, 4))
    return dense_block.product(y, arrays['kernel'].astype(dtype)[0, 0])
