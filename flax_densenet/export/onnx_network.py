"""Builds ONNX models of DenseNet and RDNet.

Feature maps in ONNX are `[N, C, H, W]`, so kernels are transposed to `[F, C, K, K]`.
Batch size, height and width are free.
"""

import json
import math
from typing import Any

import numpy as np

from flax_densenet.export import onnx_mean, onnx_unusual
from flax_densenet.export.onnx_graph import Graph
from flax_densenet.models import ensemble, folded, layers, network, rdnet_layers
from flax_densenet.settings import sizes
from flax_densenet.weights import decisions as decisions_lib
from flax_densenet.weights import heads, trained

# `images`: decoded, resized uint8 images `[N, H, W, C]` to probabilities. A model with
# more than 8 bits takes uint16 images, where 0 and 65535 are the ends of its window.
# `normalized`: float32 `[N, C, H, W]`, normalized with mean and std, to logits, as in
# torchvision.
INPUTS = ('images', 'normalized')


def make(
    module: network.Network,
    variables,
    metadata: dict[str, Any],
    *,
    inputs: str = 'images',
    precision: str = 'float32',
    decisions: decisions_lib.Decisions | None = None,
) -> Any:
    """Makes the `onnx.ModelProto` of a trained network.

    Args:
      module: the network.
      variables: `{'params', 'batch_stats'}`.
      metadata: metadata of the run (`prepare.make_metadata`). The file stores labels
        and preprocessing, see `properties`.
      inputs: one of `INPUTS`.
      precision: precision of the stored weights, see `onnx_graph.Graph`.
      decisions: what was fitted after training. With a score of unusual images, the
        file has a second output `unusual`, float32 `[N]`.
    """
    graph = Graph(precision)
    x, divisor = take_images(graph, metadata, inputs)
    pooled, logits, *members = _NETWORKS[module.family](
        graph, x, module, variables, divisor
    )
    return finish(
        graph,
        logits,
        module,
        metadata,
        inputs,
        pooled=pooled,
        decisions=decisions,
        members=members,
    )


def fold(module: network.Network, variables) -> dict[str, Any]:
    """Like `folded.fold`, but without packing for the native kernel."""
    return folded.fold(module.clone(fast=False), variables)


def affine(norm) -> tuple[np.ndarray, np.ndarray]:
    """The factor and the bias, float64 `[C]` each, of a norm from `folded.fold`."""
    scale = np.asarray(norm['a'], np.float64)
    return scale, norm['bias'] - norm['mean'] * scale


def take_images(graph, metadata, inputs) -> tuple[str, np.ndarray | None]:
    """The input of the first convolution, and the divisor of its kernel.

    The mean of the images is subtracted here, so that padding with 0 is right. The
    division by 255 (65535 for uint16) and by std becomes part of the kernel.
    """
    if inputs == 'normalized':
        return 'input', None
    white = trained.white_of(trained.preparation_of(metadata).dtype)
    mean, std = (np.asarray(metadata[name], np.float32) for name in ('mean', 'std'))
    x = graph.add('Transpose', 'image', perm=(0, 3, 1, 2), name='channels_first')
    x = graph.add('Cast', x, to=1, name='float32')
    x = graph.add('Sub', x, (white * mean).reshape(1, -1, 1, 1), name='centered')
    return x, white * std


_ACTIVATIONS = {
    heads.SOFTMAX: ('Softmax', {'axis': -1}),
    heads.SIGMOID: ('Sigmoid', {}),
    heads.NONE: ('Identity', {}),
}


def finish(
    graph, logits, module, metadata, inputs, *, pooled=None, decisions=None, members=()
) -> Any:
    """Adds the outputs and completes the graph; returns the `onnx.ModelProto`.

    Args:
      pooled, logits: names of the pooled features and the logits.
      members: the same names, as a pair for each member of an ensemble.
    """
    channels, classes = len(metadata['mean']), module.num_classes
    taken: dict[str, tuple]
    given: dict[str, tuple]
    if inputs == 'normalized':
        taken = {'input': (np.float32, ('batch', channels, 'height', 'width'))}
        output = graph.add('Identity', logits, name='logits')
    else:
        dtype = trained.preparation_of(metadata).dtype
        taken = {'image': (dtype, ('batch', 'height', 'width', channels))}
        node, options = _ACTIVATIONS[trained.outputs_of(metadata)]
        points = trained.points_of(metadata)
        name = 'probabilities' if points is None else 'sigmoids'
        if node == 'Identity':
            name = 'outputs'
        output = graph.add(node, logits, **options, name=name)
        if points is not None:
            output = _scale(graph, output, points)
    given = {output: (np.float32, ('batch', classes))}
    if decisions is not None and decisions.unusual is not None:
        if members:
            score = onnx_unusual.add_of_members(graph, decisions.unusual, members)
        else:
            if decisions.unusual.needs_logits:
                logits = _without_calibration(graph, logits, metadata)
            score = onnx_unusual.add(graph, decisions.unusual, pooled, logits)
        given[score] = np.float32, ('batch',)
    return graph.model(taken, given, properties(module, metadata, decisions))


def _without_calibration(graph, logits, metadata):
    """Recovers the logits of the network from its calibrated logits."""
    found = (metadata.get('decisions') or {}).get('calibration')
    if not found:
        return logits
    return onnx_unusual.revert(graph, logits, found['scale'], found['bias'])


def _scale(graph, sigmoids, points):
    """Scores from operating points (`operating_points.scale`)."""
    given = np.array([point is not None for point in points])
    p = np.float32([0.5 if point is None else point for point in points])
    low = graph.add('Mul', sigmoids, 1 / (2 * p), name='below_points')
    high = graph.add('Sub', np.float32(1), sigmoids, name='rests')
    high = graph.add('Mul', high, 1 / (2 * (1 - p)), name='rests_above_points')
    high = graph.add('Sub', np.float32(1), high, name='above_points')
    is_low = graph.add('Less', sigmoids, p, name='is_below')
    scores = graph.add('Where', is_low, low, high, name='scores')
    half = np.float32(0.5)
    return graph.add('Where', given, scores, half, name='probabilities')


def properties(
    module: network.Network,
    metadata: dict[str, Any],
    decisions: decisions_lib.Decisions | None = None,
) -> dict[str, str]:
    """The metadata of a file: `{name: string}`, with lists as JSON.

    Always: `labels`, `image_size` (side in pixels, or `HEIGHT,WIDTH`), `channels`,
    `resize`, `crop_fraction` and `interpolation` (see `images.Preparation`), `mean`,
    `std`, `multi_label` and `variant`.

    If they apply:
    - `outputs`, if the outputs are neither a softmax nor sigmoids;
    - `window` and `bit_depth`, if images have more than 8 bits;
    - `operating_points`, if they are applied to the probabilities;
    - `calibration` (method, scale and bias, already part of the classifier) and
      `thresholds` (`{class: probability}`), if they were fitted after training;
    - `set_thresholds`, if there are conformal sets: for each coverage, the lowest
      probability in a set (with several labels, a list with one for each). If images
      have one class, the most likely class is always in the set.
    """
    preparation = trained.preparation_of(metadata)
    names = metadata['class_names'] or [str(n) for n in range(module.num_classes)]
    outputs = trained.outputs_of(metadata)
    more = {'outputs': outputs} if outputs == heads.NONE else {}
    if (points := trained.points_of(metadata)) is not None:
        more['operating_points'] = json.dumps(points)
    if decisions is not None and decisions.sets is not None:
        found = decisions.sets.table()
        more['set_thresholds'] = json.dumps(found)
    more |= _fitted(metadata.get('decisions') or {}, names)
    return more | {
        'labels': json.dumps(list(names)),
        'image_size': sizes.plain(preparation.size).strip('()'),
        'channels': str(preparation.channels),
        'resize': preparation.resize,
        'crop_fraction': str(preparation.crop_fraction),
        'interpolation': preparation.interpolation,
        'mean': json.dumps(list(metadata['mean'])),
        'std': json.dumps(list(metadata['std'])),
        'multi_label': json.dumps(bool(metadata.get('multi_label'))),
        'variant': metadata['model']['variant'],
        **({'window': json.dumps(preparation.window)} if preparation.window else {}),
        **({'bit_depth': str(preparation.bit_depth)} if preparation.is_deep else {}),
    }


def _fitted(plain, names):
    """The properties of the decisions that `Trained.folded` keeps in metadata."""
    found = {}
    if plain.get('calibration'):
        kept = ('methods', 'scale', 'bias')
        about = {name: plain['calibration'][name] for name in kept}
        found['calibration'] = json.dumps(about)
    if plain.get('thresholds'):
        pairs = zip(names, plain['thresholds']['values'], strict=True)
        found['thresholds'] = json.dumps(
            {name: value for name, value in pairs if value is not None}
        )
    return found


def conv(graph, x, kernel, bias=None, *, strides=1, padding='torch', **options):
    """Adds a convolution with a kernel `[H, W, C, F]` and the given padding."""
    size = kernel.shape[0]
    pads = {'pads': (size // 2,) * 4}
    if padding == 'same' and strides > 1:
        pads = {'auto_pad': 'SAME_UPPER'}
    arrays = [kernel.transpose(3, 2, 0, 1), *([] if bias is None else [bias])]
    sizes = {'kernel_shape': (size, size), 'strides': (strides, strides)}
    return graph.add('Conv', x, *arrays, **sizes, **pads, **options)


def divided(kernel, divisor):
    """The first kernel `[H, W, C, F]`, adapted to images that were not divided."""
    return kernel if divisor is None else kernel / divisor.reshape(1, 1, -1, 1)


def _densenet(graph, x, module, variables, divisor):
    net = fold(module, variables)
    x = _stem(graph, x, module, net['stem'], divisor)
    for number, block in enumerate(net['blocks'], start=1):
        for place, layer in enumerate(block['layers'], start=1):
            name = f'denseblock{number}.denselayer{place}'
            y = _affine_relu(graph, x, layer['norm1'], f'{name}.norm1')
            y = conv(graph, y, **layer['conv1'], name=f'{name}.conv1')
            if 'conv2' in layer:
                y = graph.add('Relu', y, name=f'{name}.relu2')
                y = conv(graph, y, **layer['conv2'], name=f'{name}.conv2')
            x = graph.add('Concat', x, y, axis=1, name=f'{name}.joined')
        name, tail = f'transition{number}', block['tail']
        if 'kernel' in tail:
            x = _affine_relu(graph, x, tail, f'{name}.norm')
            halves = {'kernel_shape': (2, 2), 'strides': (2, 2)}
            x = graph.add('AveragePool', x, **halves, name=f'{name}.pool')
            x = conv(graph, x, tail['kernel'], name=f'{name}.conv')
    x = _affine(graph, x, tail, 'norm5', relu=module.last_relu)
    pooled = x = _pool(graph, x, module.pooling)
    classifier = layers.linear_layers(net['head']['params']['classifier'])
    for number, layer in enumerate(classifier[:-1], start=1):
        name = f'classifier.layer{number}'
        x = graph.add('Gemm', x, layer['kernel'], layer['bias'], name=name)
        x = graph.add('Relu', x, name=f'{name}.relu')
    return pooled, classify(graph, x, **classifier[-1])


def stem_strides(module: network.Network, number: int) -> int:
    """The stride of a convolution of the stem, counted from 0."""
    return 1 if number or module.stem == 'cifar' else 2


def _stem(graph, x, module, convs, divisor):
    """The convolutions and the pooling of the stem."""
    for number, part in enumerate(convs):
        kernel = divided(part['kernel'], None if number else divisor)
        strides = stem_strides(module, number)
        options = {'strides': strides, 'padding': module.padding}
        x = conv(graph, x, kernel, part.get('bias'), **options, name=f'conv{number}')
        if 'bias' in part:
            x = graph.add('Relu', x, name=f'relu{number}')
    return pool(graph, x, module)


def pool(graph, x, module):
    """The pooling of the stem, if it has one."""
    if module.stem == 'cifar':
        return x
    window = {'kernel_shape': (3, 3), 'name': 'pool0'}
    if not module.blur_pool:
        pads = {'pads': (1, 1, 1, 1)}
        if module.padding == 'same':
            pads = {'auto_pad': 'SAME_UPPER'}
        return graph.add('MaxPool', x, strides=(2, 2), **pads, **window)
    x = graph.add('MaxPool', x, pads=(1, 1, 1, 1), **window)
    around = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    x = graph.add('Pad', x, around, mode='reflect', name='mirrored')
    blur = np.outer((1, 2, 1), (1, 2, 1)).astype(np.float32) / 16
    blur = np.tile(blur, (module.stem_features, 1, 1, 1))
    return graph.add('Conv', x, blur, group=len(blur), strides=(2, 2), name='blur')


def pool_mean(graph, x):
    """The mean over all positions."""
    x = graph.add('GlobalAveragePool', x, name='mean')
    return graph.add('Flatten', x, name='pooled')


def _pool(graph, x, pooling):
    if pooling == 'mean':
        return pool_mean(graph, x)
    largest = graph.add('GlobalMaxPool', x, name='max')
    if pooling == 'max_mean':
        mean = graph.add('GlobalAveragePool', x, name='mean')
        largest = graph.add('Concat', largest, mean, axis=1, name='max_mean')
    return graph.add('Flatten', largest, name='pooled')


def classify(graph, x, kernel, bias):
    """The last layer of the classifier."""
    return graph.add('Gemm', x, kernel, bias, name='classifier')


def _affine_relu(graph, x, norm, name):
    return _affine(graph, x, norm, name, relu=True)


def _affine(graph, x, norm, name, *, relu):
    """A BatchNormalization and an optional ReLU, which runtimes fuse."""
    scale, bias = affine(norm)
    statistics = np.zeros_like(scale), np.ones_like(scale)
    x = graph.add(
        'BatchNormalization',
        x,
        *map(np.float32, (scale, bias, *statistics)),
        epsilon=0.0,
        name=name,
    )
    return graph.add('Relu', x, name=f'{name}.relu') if relu else x


def _rdnet(graph, x, module, variables, divisor):
    """RDNet on maps `[N, C, H, W]`, except for the products inside layers."""
    params = variables['params']
    stem = params['conv0']
    kernel = divided(np.float32(stem['kernel']), divisor)
    x = _patches(graph, x, kernel, stem['bias'], 'conv0')
    x = _layer_norm(graph, x, params['norm0'], module.epsilon, 'norm0')
    for number, size in enumerate(module.block_sizes, start=1):
        if number > 1:
            name = f'transition{number - 1}'
            part = params[name]
            x = _layer_norm(graph, x, part['norm'], module.epsilon, f'{name}.norm')
            kernel = np.float32(part['conv']['kernel'])
            x = _patches(graph, x, kernel, part['conv']['bias'], f'{name}.conv')
        for place in range(1, size + 1):
            name = f'denselayer{place}'
            layer = params[f'denseblock{number}'][name]
            name = f'denseblock{number}.{name}'
            y = _rdnet_layer(graph, x, layer, module.epsilon, name)
            x = graph.add('Concat', x, y, axis=1, name=f'{name}.joined')
    x = graph.add('GlobalAveragePool', x, name='mean')
    x = _normalize(graph, graph.add('Flatten', x), params['norm'], module.epsilon)
    classifier = params['classifier']
    arrays = (np.float32(classifier[name]) for name in ('kernel', 'bias'))
    return x, graph.add('Gemm', x, *arrays, name='classifier')


def _patches(graph, x, kernel, bias, name):
    """A convolution with windows that do not overlap."""
    size = kernel.shape[0]
    arrays = kernel.transpose(3, 2, 0, 1), np.float32(bias)
    sizes = {'kernel_shape': (size, size), 'strides': (size, size)}
    return graph.add('Conv', x, *arrays, **sizes, name=name)


def _rdnet_layer(graph, x, layer, epsilon, name):
    kernel = np.float32(layer['conv1']['kernel']).transpose(3, 2, 0, 1)
    y = graph.add(
        'Conv',
        x,
        kernel,
        np.float32(layer['conv1']['bias']),
        group=kernel.shape[0],
        kernel_shape=kernel.shape[2:],
        pads=(rdnet_layers.KERNEL_SIZE // 2,) * 4,
        name=f'{name}.conv1',
    )
    y = graph.add('Transpose', y, perm=(0, 2, 3, 1), name=f'{name}.channels_last')
    y = _normalize(graph, y, layer['norm1'], epsilon, f'{name}.norm1')
    y = _product(graph, y, layer['conv2'], f'{name}.conv2')
    y = _gelu(graph, y, f'{name}.gelu')
    gamma = np.float32(layer['gamma']) if 'gamma' in layer else np.float32([1])
    gated = 'gate' in layer
    y = _product(graph, y, layer['conv3'], f'{name}.conv3', 1 if gated else gamma)
    y = graph.add('Transpose', y, perm=(0, 3, 1, 2), name=f'{name}.channels_first')
    if not gated:
        return y
    mean = graph.add('GlobalAveragePool', y, name=f'{name}.mean')
    arrays = (np.float32(layer['gate'][key]) for key in ('kernel', 'bias'))
    gate = conv(graph, mean, *arrays, name=f'{name}.gate')
    gate = graph.add('HardSigmoid', gate, alpha=1 / 6, beta=0.5, name=f'{name}.open')
    # One position per image, so gamma is cheaper here than on the maps.
    gate = graph.add('Mul', gate, gamma.reshape(-1, 1, 1), name=f'{name}.gamma')
    return graph.add('Mul', y, gate, name=f'{name}.gated')


def _product(graph, x, params, name, scale=1):
    """A 1x1 convolution over the last axis."""
    kernel = np.float32(params['kernel'])[0, 0] * scale
    x = graph.add('MatMul', x, kernel, name=name)
    return graph.add('Add', x, np.float32(params['bias']) * scale, name=f'{name}.bias')


def _gelu(graph, x, name):
    """GELU with the error function, in five nodes that runtimes fuse."""
    y = graph.add('Div', x, np.float32(math.sqrt(2)), name=f'{name}.scaled')
    y = graph.add('Erf', y, name=f'{name}.erf')
    y = graph.add('Add', y, np.float32(1), name=f'{name}.shifted')
    y = graph.add('Mul', x, y, name=f'{name}.product')
    return graph.add('Mul', y, np.float32(0.5), name=name)


def _layer_norm(graph, x, params, epsilon, name):
    """Layer norm over the channels at each position, `[N, C, H, W]`."""
    x = graph.add('Transpose', x, perm=(0, 2, 3, 1), name=f'{name}.channels_last')
    x = _normalize(graph, x, params, epsilon, name)
    return graph.add('Transpose', x, perm=(0, 3, 1, 2), name=f'{name}.channels_first')


def _normalize(graph, x, params, epsilon, name='norm'):
    arrays = (np.float32(params[key]) for key in ('scale', 'bias'))
    options = {'axis': -1, 'epsilon': epsilon, 'name': name}
    return graph.add('LayerNormalization', x, *arrays, **options)


def _ensemble(graph, x, module, variables, divisor):
    """The joined pooled features, the averaged logits, and both of each member."""
    member = module.member
    found = [
        _NETWORKS[member.family](graph, x, member, one, divisor)
        for one in ensemble.unstack(variables)
    ]
    pooled, logits = zip(*found, strict=True)
    pooled = graph.add('Concat', *pooled, axis=1, name='pooled_of_all')
    return pooled, onnx_mean.mean_logits(graph, list(logits), module.outputs), *found


# Functions that add the nodes of a network and return the names of its pooled features
# and its logits, by `Network.family`.
_NETWORKS = {'densenet': _densenet, 'rdnet': _rdnet, 'ensemble': _ensemble}
