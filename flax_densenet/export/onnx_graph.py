"""Builds ONNX models from nodes and weights."""

from typing import Any

import numpy as np

from flax_densenet import errors
from flax_densenet.export import precision as precision_lib

# The oldest operator set with LayerNormalization, read by runtimes since 2022.
OPSET, IR_VERSION = 17, 8
# Smaller arrays (biases, factors) stay float32; they would save nothing.
_SMALL = 1024


class Graph:
    """A graph under construction: `add` and `constant` extend it, `model` completes it.

    Args:
      precision: precision of the stored weights, one of `precision.PRECISIONS`.
        Runtimes convert them to float32 when they load the file.
    """

    def __init__(self, precision: str = 'float32'):
        self._onnx = import_onnx()
        self._precision = precision
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._used: dict[str, int] = {}

    def add(self, operator: str, *inputs: str | np.ndarray, **attributes: Any) -> str:
        """Adds a node; returns the name of its (first) output.

        Args:
          operator: type of the node.
          inputs: names of other outputs, arrays, or '' for an omitted input.
          attributes: attributes of the operator. In addition, `name` is the name of the
            node, and `outputs` the number of its outputs if it has several.
        """
        name = self._name(attributes.pop('name', operator))
        made = [name, *map(str, range(1, attributes.pop('outputs', 1)))]
        made[1:] = [self._name(f'{name}.output{number}') for number in made[1:]]
        names = [
            one if isinstance(one, str) else self.constant(one, f'{name}.{number}')
            for number, one in enumerate(inputs)
        ]
        node = self._onnx.helper.make_node(
            operator, names, made, name=name, **attributes
        )
        self._nodes.append(node)
        return name

    def constant(self, array: np.ndarray, name: str) -> str:
        """Adds an array, in `precision` if it is large; returns its name."""
        name, array = self._name(name), np.asarray(array, order='C')
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        numpy_helper, types = self._onnx.numpy_helper, self._onnx.TensorProto
        small = array.size < _SMALL or array.dtype != np.float32
        if self._precision == 'float32' or small:
            self._weights.append(numpy_helper.from_array(array, name))
            return name
        stored = self._onnx.TensorProto(
            name=name,
            dims=array.shape,
            data_type=getattr(types, self._precision.upper()),
            raw_data=precision_lib.convert(array, self._precision, name).tobytes(),
        )
        self._weights.append(stored)
        return self.add('Cast', name, to=types.FLOAT, name=f'{name}.float32')

    def model(
        self, inputs: dict[str, tuple], outputs: dict[str, tuple], metadata
    ) -> Any:
        """Completes the graph; returns the `onnx.ModelProto`.

        Args:
          inputs: `{name: (numpy dtype, shape)}`. A string in a shape is a free size.
          outputs: the same for the outputs.
          metadata: `{name: string}`, stored in the file.
        """
        helper = self._onnx.helper
        described = [
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape
                )
                for name, (dtype, shape) in values.items()
            ]
            for values in (inputs, outputs)
        ]
        graph = helper.make_graph(
            self._nodes, 'flax_densenet', *described, self._weights
        )
        made = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid('', OPSET)],
            ir_version=IR_VERSION,
            producer_name='flax_densenet',
        )
        helper.set_model_props(made, metadata)
        return made

    def _name(self, wanted):
        """A unique name: `wanted`, with a number if it is taken."""
        count = self._used[wanted] = self._used.get(wanted, 0) + 1
        return wanted if count == 1 else self._name(f'{wanted}.{count}')


def import_onnx() -> Any:
    """Imports `onnx`; raises `UserError` if its extra is not installed."""
    with errors.extra('export', '--format=onnx'):
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    return onnx
