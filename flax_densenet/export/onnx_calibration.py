"""The range of each feature map over images, which integers are to stand for."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from flax_densenet import errors
from flax_densenet.export import onnx_network
from flax_densenet.models import densenet


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Lowest and highest value of each feature map, float64 `[C]`."""

    low: np.ndarray
    high: np.ndarray

    @property
    def width(self) -> np.ndarray:
        """1 where a map has one value only, which any unit can hold."""
        width = self.high - self.low
        return np.where(width > 0, width, 1.0)

    def join(self, other: 'Bounds') -> 'Bounds':
        return Bounds(
            np.concatenate([self.low, other.low]),
            np.concatenate([self.high, other.high]),
        )


def calibrate(
    module: densenet.DenseNet, variables, metadata, batches: Iterable[np.ndarray]
) -> tuple[dict[str, Bounds], np.ndarray]:
    """Bounds of all feature maps over images, by the names of `onnx_model`'s nodes.

    Returns:
      The bounds, and the mean logits `[num_classes]`.
    """
    made = onnx_network.make(module, variables, metadata)
    names = _observed(made.graph)
    _add_outputs(made.graph, names)
    session, found = start(made), []
    outputs = [f'{name}.{end}' for name in names for end in ('low', 'high')]
    outputs.append('classifier')
    for batch in batches:
        values = session.run(outputs, {'image': batch})
        found.append([value.reshape(len(batch), -1) for value in values])
    values = dict(
        zip(outputs, map(np.concatenate, zip(*found, strict=True)), strict=True)
    )
    values = {name: np.float64(value) for name, value in values.items()}
    bounds = {
        name: Bounds(values[f'{name}.low'].min(0), values[f'{name}.high'].max(0))
        for name in names
    }
    return bounds, values['classifier'].mean(0)


def start(made) -> Any:
    """A session of ONNX Runtime with an `onnx.ModelProto`.

    Raises:
      UserError: it is not installed.
    """
    with errors.extra('export', '--precision=int8'):
        import onnxruntime
    providers = ['CPUExecutionProvider']
    return onnxruntime.InferenceSession(made.SerializeToString(), providers=providers)


def _observed(graph):
    """What is stored as bytes: convolutions, or the ReLU that follows one."""
    followed = {
        node.input[0]: node.output[0] for node in graph.node if node.op_type == 'Relu'
    }
    convs = [node.output[0] for node in graph.node if node.op_type == 'Conv']
    return ['centered', *(followed.get(name, name) for name in convs)]


def _add_outputs(graph, names):
    """Each image's extremes of each feature map, and its logits."""
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
