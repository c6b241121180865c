"""Measures the range of each feature map on images, for 8-bit quantization."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from flax_densenet import errors
from flax_densenet.export import onnx_network
from flax_densenet.models import network


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The lowest and the highest value of each feature map, float64 `[C]` each."""

    low: np.ndarray
    high: np.ndarray

    @property
    def width(self) -> np.ndarray:
        """`high - low`, or 1 for a map with a single value."""
        width = self.high - self.low
        return np.where(width > 0, width, 1.0)

    def join(self, other: 'Bounds') -> 'Bounds':
        return Bounds(
            np.concatenate([self.low, other.low]),
            np.concatenate([self.high, other.high]),
        )


def calibrate(
    module: network.Network, variables, metadata, batches: Iterable[np.ndarray]
) -> tuple[dict[str, Bounds], np.ndarray]:
    """Measures the bounds of all feature maps on images.

    Args:
      module: the network.
      variables: `{'params', 'batch_stats'}`.
      metadata: metadata of the model.
      batches: uint8 images `[N, H, W, C]`.

    Returns:
      `{name of a node in onnx_network: bounds}`, and the mean logits `[num_classes]`.

    Raises:
      UserError: ONNX Runtime is not installed.
    """
    made = onnx_network.make(module, variables, metadata)
    names = _observed(made.graph)
    _add_outputs(made.graph, names)
    session, rows = start(made), []
    outputs = [f'{name}.{end}' for name in names for end in ('low', 'high')]
    outputs.append('classifier')
    for batch in batches:
        values = session.run(outputs, {'image': batch})
        rows.append([value.reshape(len(batch), -1) for value in values])
    values = dict(
        zip(outputs, map(np.concatenate, zip(*rows, strict=True)), strict=True)
    )
    values = {name: np.float64(value) for name, value in values.items()}
    bounds = {
        name: Bounds(values[f'{name}.low'].min(0), values[f'{name}.high'].max(0))
        for name in names
    }
    return bounds, values['classifier'].mean(0)


def start(made) -> Any:
    """Starts a session of ONNX Runtime with an `onnx.ModelProto`.

    Raises:
      UserError: ONNX Runtime is not installed.
    """
    with errors.extra('export', '--precision=int8'):
        import onnxruntime
    providers = ['CPUExecutionProvider']
    return onnxruntime.InferenceSession(made.SerializeToString(), providers=providers)


def _observed(graph):
    """The outputs stored as bytes: convolutions, or the ReLU after one."""
    followed = {
        node.input[0]: node.output[0] for node in graph.node if node.op_type == 'Relu'
    }
    convs = [node.output[0] for node in graph.node if node.op_type == 'Conv']
    return ['centered', *(followed.get(name, name) for name in convs)]


def _add_outputs(graph, names):
    """Adds outputs: the extremes of each feature map per image, and the logits."""
    from onnx import TensorProto, helper

    def add(output):
        value = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph.output.append(value)

    for name in names:
        for end, operator in (('low', 'ReduceMin'), ('high', 'ReduceMax')):
            output = f'{name}.{end}'
            node = helper.make_node(operator, [name], [output], axes=(2, 3))
            graph.node.append(node)
            add(output)
    add('classifier')
