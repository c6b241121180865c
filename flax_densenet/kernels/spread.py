"""Runs the C++ kernels in a program on several CPU devices that share the rows.

`jax.set_mesh(mesh)`, with a mesh of one axis, defines these devices; the rows of a
batch are spread over the axis. Each device computes what depends only on its own rows.
Batch statistics and gradients of parameters depend on all rows, so one device computes
them for all (`cpu_together.h`), and the results are bit-identical to those of a single
device. This needs all devices in one process.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from flax_densenet.kernels import cpu as cpu_kernels


def is_known() -> bool:
    """Whether there is one device here, or it is known which devices share the rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or _is_local(mesh) or _has_one_axis(mesh)


def is_shared() -> bool:
    """Whether several devices share the rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and _has_one_axis(mesh)


def _is_local(mesh):
    """Whether this is inside `jax.shard_map`, where a device sees only its own rows."""
    return all(kind == AxisType.Manual for kind in mesh.axis_types)


def _has_one_axis(mesh):
    return mesh.axis_types == (AxisType.Auto,)


def devices(rows: int) -> int:
    """The number of devices that share the rows; 1 if each computes all of them."""
    if not is_shared():
        return 1
    size = jax.sharding.get_abstract_mesh().size
    return 1 if rows % size else size


def by_rows(function, results, arguments, rows: int):
    """Wraps a `function` of independent rows: each device computes its own rows.

    Args:
      function: takes arrays or trees of arrays; returns a list or a tuple of them.
      results, arguments: the axis of the rows in each result and argument, in a list or
        a tuple like that of the function; None if each device has the entire array.
      rows: total number of rows on all devices.
    """
    if devices(rows) == 1:
        return function
    (name,) = jax.sharding.get_abstract_mesh().axis_names

    def spec(axis):
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, name)

    return jax.shard_map(
        function,
        in_specs=tuple(map(spec, arguments)),
        out_specs=jax.tree.map(spec, results, is_leaf=lambda axis: axis is None),
        check_vma=False,
    )


def call(name: str, results, arrays, axes, axes_of_results, *, rows: int, **attributes):
    """Calls a handler that needs the rows of all devices, like `cpu.call`.

    Args:
      name: name of the handler, which has a variant `...Together`.
      results: shapes of the results for all rows.
      arrays: the arguments.
      axes, axes_of_results: the axis of the rows in each array, see `by_rows`.
      rows: total number of rows on all devices.
    """
    count = devices(rows)
    if count == 1:
        return cpu_kernels.call(name, results, *arrays, **attributes)
    (axis,) = jax.sharding.get_abstract_mesh().axis_names
    own_results = []
    for result, place in zip(results, axes_of_results, strict=True):
        sizes = list(result.shape)
        if place is not None:
            sizes[place] //= count
        own_results.append(jax.ShapeDtypeStruct(tuple(sizes), result.dtype))
    places = [-1 if place is None else place for place in (*axes, *axes_of_results)]

    def call_together(*arrays):
        number = cpu_kernels.call(
            'CallNumber', jax.ShapeDtypeStruct((1,), jnp.uint32), has_side_effect=True
        )
        # The maximum over the devices, which no other call has at this time.
        number = lax.pmax(number, axis)
        place = lax.axis_index(axis).astype(jnp.uint32).reshape(1)
        return cpu_kernels.call(
            f'{name}Together',
            own_results,
            *arrays,
            jnp.concatenate([number, place]),
            axes=np.array(places, np.int64),
            devices=count,
            **attributes,
        )

    return by_rows(call_together, axes_of_results, axes, rows)(*arrays)
