"""Builds 8-bit integer ONNX models of DenseNets with bottlenecks.

Every feature map is stored in bytes as `255 * (x - low) / (high - low)`, with its own
bounds, measured on images (calibration). The bounds are folded into the convolutions
before and after, so all feature maps of a dense block have the same unit and are
concatenated without conversion. In that unit, batch norm and ReLU are a saturating
subtraction,

    relu(a x + b) = a relu(x - t),  t = -b / a,

and the factor `a` is folded into the next 1x1 convolution. So the network consists of
integer convolutions, subtractions and concatenations. In the file they are float
operators between QuantizeLinear and DequantizeLinear, which runtimes fuse.

Kernels have 7 bits: on processors without 8-bit dot products, the sum of two 8-bit
products may not fit into 16 bits, and results would depend on the processor.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.export import onnx_calibration, onnx_network
from flax_densenet.export.onnx_calibration import Bounds
from flax_densenet.export.onnx_graph import Graph
from flax_densenet.models import network
from flax_densenet.weights import decisions as decisions_lib
from flax_densenet.weights import trained

_STEPS = 255  # of a feature map
_KERNEL_STEPS = 63


def check(module: network.Network, metadata: dict[str, Any]):
    """Raises `UserError` if a model cannot be computed in integers.

    Folding needs bottlenecks, and images must have 8 bits.
    """
    if module.members > 1:
        raise UserError(
            f'--precision=int8 is for one network, and this is an ensemble of '
            f'{module.members}; use float16 or bfloat16, or export one of them, as '
            'fold-1 in its folder'
        )
    if not module.has_batch_norm or not module.bottleneck:
        raise UserError(
            f'--precision=int8: {metadata["model"]["variant"]} has no bottleneck; use '
            'float16 or bfloat16'
        )
    if not module.has_usual_head():
        raise UserError(
            '--precision=int8: only a head of one layer after mean pooling can be '
            'computed in integers; use float16 or bfloat16'
        )
    if trained.preparation_of(metadata).is_deep:
        raise UserError(
            '--precision=int8 is for images of 8 bits, but this model uses more '
            '(data.bit_depth); use float16 or bfloat16'
        )


def make(
    module: network.Network,
    variables,
    metadata: dict[str, Any],
    batches: Sequence[np.ndarray],
    *,
    inputs: str = 'images',
    decisions: decisions_lib.Decisions | None = None,
) -> Any:
    """Makes the integer model; inputs and outputs are those of `onnx_network.make`.

    Rounding shifts the logits of all images a little. The bias of the classifier
    corrects the average shift.

    Args:
      module: the network.
      variables: `{'params', 'batch_stats'}`.
      metadata: metadata of the run.
      batches: resized uint8 images `[N, H, W, C]` for calibration.
      inputs: one of `onnx_network.INPUTS`.
      decisions: see `onnx_network.make`.

    Raises:
      UserError: the network has no bottleneck, or ONNX Runtime is not installed.
    """
    check(module, metadata)
    bounds, wanted = onnx_calibration.calibrate(module, variables, metadata, batches)
    net = onnx_network.fold(module, variables)

    scored = decisions is not None and decisions.unusual is not None

    def build(inputs, shift=0.0):
        graph, pooled, logits = _network(
            module, net, metadata, bounds, inputs, shift, scored=scored
        )
        return onnx_network.finish(
            graph, logits, module, metadata, inputs, pooled=pooled, decisions=decisions
        )

    session, outputs = onnx_calibration.start(build('normalized')), []
    mean, std = (np.float32(metadata[name]) for name in ('mean', 'std'))
    for batch in batches:
        images = (batch / np.float32(255) - mean) / std
        given = {'input': images.transpose(0, 3, 1, 2)}
        outputs += session.run(['logits'], given)
    return build(inputs, wanted - np.concatenate(outputs).mean(0))


def _network(module, net, metadata, bounds, inputs, shift, *, scored):
    """The graph, its pooled features, and its logits plus `shift`.

    Args:
      scored: whether pooled features are needed; otherwise they are None.
    """
    graph = _Quantized(bounds)
    x, divisor = onnx_network.take_images(graph, metadata, inputs)
    # The bounds are for images minus their mean, in the units of uint8 images.
    std = 255 * np.float64(metadata['std'])
    x, unit = _image(graph, x, std if divisor is None else 1.0)
    x, x_bounds = _stem(graph, x, unit, module, net['stem'], divisor)
    for number, block in enumerate(net['blocks'], start=1):
        for place, layer in enumerate(block['layers'], start=1):
            name = f'denseblock{number}.denselayer{place}'
            y, of_y = _dense_layer(graph, x, x_bounds, layer, name)
            x = graph.add('Concat', x, y, axis=1, name=f'{name}.joined')
            x_bounds = x_bounds.join(of_y)
        if 'kernel' in block['tail']:
            name = f'transition{number}'
            x, x_bounds = _transition(graph, x, x_bounds, block['tail'], name)
    classifier = net['head']['params']['classifier']
    arrays = classifier['kernel'], classifier['bias'] + shift
    ends = _classify(graph, x, x_bounds, block['tail'], *arrays, scored=scored)
    return graph, *ends


class _Quantized(Graph):
    """A graph that stores feature maps in bytes."""

    def __init__(self, bounds):
        super().__init__()
        self.bounds = bounds
        self._unit = self.constant(np.float32(1 / _STEPS), 'unit')
        self._zero = self.constant(np.uint8(0), 'zero')

    def quantized(self, x, name):
        return self.add('QuantizeLinear', x, self._unit, self._zero, name=name)

    def value(self, x, name):
        """Bytes as numbers from 0 to 1."""
        return self.add('DequantizeLinear', x, self._unit, self._zero, name=name)

    def conv(self, x, kernel, bias, name, *, unit=1 / _STEPS, **options):
        """Adds an integer convolution; its input and its output are values.

        Args:
          kernel: float64 `[K, K, C, F]`.
          bias: float64 `[F]`.
          unit: the value of one step of the input.
        """
        step = np.abs(kernel).max((0, 1, 2)) / _KERNEL_STEPS
        step = np.where(step > 0, step, 1.0).astype(np.float32)
        integers = np.rint(kernel / step).astype(np.int8).transpose(3, 2, 0, 1)
        stored = self.constant(integers, f'{name}.kernel')
        kernel_value = self.add(
            'DequantizeLinear', stored, step, axis=0, name=f'{name}.kernel.value'
        )
        of_bias = np.float32(unit) * step
        limit = 2**31 - 1
        integers = np.rint(np.clip(bias / of_bias.astype(np.float64), -limit, limit))
        stored = self.constant(integers.astype(np.int32), f'{name}.bias')
        bias_value = self.add(
            'DequantizeLinear', stored, of_bias, axis=0, name=f'{name}.bias.value'
        )
        return self.add('Conv', x, kernel_value, bias_value, name=name, **options)


def _into(kernel, bias, bounds):
    """Rescales kernel and bias so that the output is in the unit of its bounds."""
    bias = np.zeros(kernel.shape[-1]) if bias is None else np.float64(bias)
    return np.float64(kernel) / bounds.width, (bias - bounds.low) / bounds.width


def _above_zero(bounds):
    """Bounds after a ReLU, whose 0 must stay 0, because it is the padding."""
    return Bounds(np.zeros_like(bounds.high), bounds.high)


def _options(kernel, strides=1, padding='torch'):
    size = kernel.shape[0]
    pads = {'pads': (size // 2,) * 4}
    if padding == 'same' and strides > 1:
        pads = {'auto_pad': 'SAME_UPPER'}
    return pads | {'kernel_shape': (size, size), 'strides': (strides, strides)}


def _stem(graph, x, unit, module, convs, divisor):
    """The feature maps of the stem as bytes, and their bounds."""
    bounds = None
    for number, part in enumerate(convs):
        name, kernel = f'conv{number}', np.float64(part['kernel'])
        kernel = onnx_network.divided(kernel, divisor) if bounds is None else kernel
        if bounds is not None:
            kernel = kernel * bounds.width.reshape(1, 1, -1, 1)
        if 'bias' not in part:
            bounds = graph.bounds[name]
        else:
            bounds = _above_zero(graph.bounds[f'relu{number}'])
        strides = onnx_network.stem_strides(module, number)
        options = _options(kernel, strides, module.padding)
        kernel, bias = _into(kernel, part.get('bias'), bounds)
        x = graph.conv(x, kernel, bias, name, unit=unit, **options)
        x, unit = graph.quantized(x, f'{name}.bytes'), 1 / _STEPS
        if number + 1 < len(convs):
            x = graph.value(x, f'{name}.value')
    return _pool(graph, x, module), bounds


def _image(graph, x, divided_by):
    """Quantizes the image over its full range; returns its values and the step."""
    bounds = graph.bounds['centered']
    low = min((bounds.low / divided_by).min(), 0)
    high = max((bounds.high / divided_by).max(), 0)
    unit = np.float32((high - low or 1) / _STEPS)
    zero = np.uint8(np.rint(-low / unit))
    unit_, zero_ = graph.constant(unit, 'image.unit'), graph.constant(zero, 'image.0')
    x = graph.add('QuantizeLinear', x, unit_, zero_, name='image.bytes')
    x = graph.add('DequantizeLinear', x, unit_, zero_, name='image.value')
    return x, unit


def _pool(graph, x, module):
    if module.blur_pool:
        x = graph.value(x, 'pool0.value')
        return graph.quantized(onnx_network.pool(graph, x, module), 'pool0.bytes')
    return onnx_network.pool(graph, x, module)  # the maximum of bytes


def _thresholds(norm, bounds):
    """Writes relu(norm) of bytes `x` as thresholds, factors and constants.

    Returns:
      steps: int `[C]` to subtract, 0 to 255.
      factor: factor of `relu(x - steps)`, in units of 1.
      direct: factor of `x` itself; 0 if not needed.
      constant: the remaining term.
    """
    scale, bias = onnx_network.affine(norm)
    a, b = scale * bounds.width, scale * bounds.low + bias
    flat = np.abs(a) < 1e-12 * np.maximum(np.abs(b), 1e-12)
    threshold = np.where(flat, 0, -b / np.where(flat, 1, a))
    inside = np.clip(threshold, 0, 1)
    # Increasing: 0 below the threshold. Decreasing: 0 above it.
    rising, falling = ~flat & (a > 0), ~flat & (a < 0)
    always = (rising & (threshold <= 0)) | (falling & (threshold >= 1))
    never = (rising & (threshold >= 1)) | (falling & (threshold <= 0))
    between = falling & ~always & ~never
    factor = np.where(always, a, np.abs(a))
    factor = np.where(never | flat, 0, factor)
    direct = np.where(between, a, 0)
    constant = np.where(always | between, b, 0)
    constant = np.where(flat, np.maximum(b, 0), constant)
    steps = np.rint(np.where(always, 0, inside) * _STEPS).astype(np.int64)
    return np.where(never | flat, _STEPS, steps), factor, direct, constant


def _subtract(graph, x, steps, name):
    """`relu(x - steps)` of bytes."""
    unit, top = np.float32(1 / _STEPS), np.uint8(_STEPS)
    taken = np.uint8(_STEPS - steps).reshape(-1, 1, 1)
    taken = graph.constant(taken, f'{name}.threshold')
    taken = graph.add('DequantizeLinear', taken, unit, top, name=f'{name}.taken')
    x = graph.add('Add', graph.value(x, f'{name}.value'), taken, name=f'{name}.shifted')
    return graph.quantized(x, f'{name}.bytes')


def _norm_relu(graph, x, norm, bounds, name):
    """Bytes after norm and ReLU, with the factors and the constant of each map.

    A decreasing map that crosses 0 is `a x + |a| relu(x - t)`, so it appears twice.
    """
    steps, factor, direct, constant = _thresholds(norm, bounds)
    y = _subtract(graph, x, steps, name)
    twice = np.flatnonzero(direct)
    if not len(twice):
        return y, factor, constant, None
    again = graph.add('Gather', x, twice, axis=1, name=f'{name}.falling')
    y = graph.add('Concat', y, again, axis=1, name=f'{name}.both')
    return y, np.concatenate([factor, direct[twice]]), constant, twice


def _product(kernel, factor, constant, twice):
    """A 1x1 kernel `[1, 1, C, F]` for the output of `_norm_relu`, and its bias."""
    kernel = np.float64(kernel)
    added = constant @ kernel[0, 0]
    if twice is not None:
        kernel = np.concatenate([kernel, kernel[:, :, twice]], axis=2)
    return kernel * factor.reshape(1, 1, -1, 1), added


def _dense_layer(graph, x, bounds, layer, name):
    y, *parts = _norm_relu(graph, x, layer['norm1'], bounds, f'{name}.norm1')
    first, second = layer['conv1'], layer['conv2']
    kernel, added = _product(first['kernel'], *parts)
    inner = _above_zero(graph.bounds[f'{name}.relu2'])
    kernel, bias = _into(kernel, first['bias'] + added, inner)
    y = graph.value(y, f'{name}.norm1.relu')
    y = graph.conv(y, kernel, bias, f'{name}.conv1', **_options(kernel))
    y = graph.value(graph.quantized(y, f'{name}.conv1.bytes'), f'{name}.relu2')
    y_bounds = graph.bounds[f'{name}.conv2']
    kernel = np.float64(second['kernel']) * inner.width.reshape(1, 1, -1, 1)
    kernel, bias = _into(kernel, None, y_bounds)
    y = graph.conv(y, kernel, bias, f'{name}.conv2', **_options(kernel))
    return graph.quantized(y, f'{name}.bytes'), y_bounds


def _transition(graph, x, bounds, tail, name):
    y, *parts = _norm_relu(graph, x, tail, bounds, f'{name}.norm')
    kernel, added = _product(tail['kernel'], *parts)
    y_bounds = graph.bounds[f'{name}.conv']
    kernel, bias = _into(kernel, added, y_bounds)
    y = graph.value(y, f'{name}.norm.relu')
    halves = {'kernel_shape': (2, 2), 'strides': (2, 2)}
    y = graph.add('AveragePool', y, **halves, name=f'{name}.pool')
    y = graph.value(graph.quantized(y, f'{name}.pool.bytes'), f'{name}.pool.value')
    y = graph.conv(y, kernel, bias, f'{name}.conv', **_options(kernel))
    return graph.quantized(y, f'{name}.bytes'), y_bounds


def _classify(graph, x, bounds, norm, kernel, bias, *, scored):
    y, *parts = _norm_relu(graph, x, norm, bounds, 'norm5')
    kernel, added = _product(kernel[None, None], *parts)
    arrays = np.float32(kernel[0, 0]), np.float32(bias + added)
    y = onnx_network.pool_mean(graph, graph.value(y, 'norm5.relu'))
    pooled = _features(graph, y, *parts) if scored else None
    return pooled, onnx_network.classify(graph, y, *arrays)


def _features(graph, y, factor, constant, twice):
    """The pooled features, from the means of the output of `_norm_relu`."""
    size = len(constant)

    def part(places, factors, name):
        found = graph.add('Gather', y, places, axis=1, name=f'features.{name}')
        return graph.add('Mul', found, np.float32(factors)[None], name=f'{name}.scaled')

    found = part(np.arange(size), factor[:size], 'rising')
    if twice is not None:
        places, factors = np.zeros(size, np.int64), np.zeros(size)
        places[twice] = size + np.arange(len(twice))
        factors[twice] = factor[size:]
        found = graph.add('Add', found, part(places, factors, 'falling'))
    return graph.add('Add', found, np.float32(constant)[None], name='pooled.features')
