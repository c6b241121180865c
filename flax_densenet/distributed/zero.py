"""Shards the optimizer's state over the devices (ZeRO-1), by shardings alone.

Adam keeps two values for each parameter. With complete parameters on each device, these
are two thirds of the memory that does not depend on the batch. Here each device keeps
its part of them, updates its part of the parameters, and gets the other parts of the
update (Rajbhandari et al., "ZeRO", 2019, https://arxiv.org/abs/1910.02054, section
5.1).

The state belongs to one vector of all parameters, as in `optax.flatten`, padded with
zeros to a multiple of the devices. Zeros stay zeros, so `replicated` can remove them,
and a checkpoint does not depend on the number of devices or on sharding.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from flax_densenet.distributed import mesh as mesh_lib


@flax.struct.dataclass
class Shards:
    """The state of an optimizer of one vector, sharded over the devices.

    Attributes:
      inner: the state; its vectors are padded to a multiple of the devices, scalars are
        not divided.
      size: size of the vector without padding.
    """

    inner: Any
    size: int = flax.struct.field(pytree_node=False)


def _is_shards(node):
    return isinstance(node, Shards)


def is_sharded(opt_state) -> bool:
    """Whether a state contains `Shards`."""
    return any(map(_is_shards, jax.tree.leaves(opt_state, is_leaf=_is_shards)))


def flatten(inner: optax.GradientTransformation, mesh) -> optax.GradientTransformation:
    """`optax.flatten` with the state, and the work on it, sharded over the mesh.

    Gradients, parameters and updates are complete on each device.

    Args:
      inner: an optimizer of one vector; each value must depend only on its own gradient
        and parameter, as in Adam and SGD.
    """

    split, whole = mesh_lib.split_rows(mesh), mesh_lib.replicated(mesh)

    def fill(tree):
        vector, unravel = ravel_pytree(tree)
        return jnp.pad(vector, (0, -vector.size % mesh.size)), vector.size, unravel

    def own_part(vector):
        # Complete at first; otherwise each of its 364 arrays would be sharded
        # separately.
        vector = lax.with_sharding_constraint(vector, whole)
        return lax.with_sharding_constraint(vector, split)

    def init(params):
        vector, size, _ = fill(params)
        return Shards(inner.init(vector), size)

    def update(updates, state, params=None):
        vector, size, unravel = fill(updates)
        if params is not None:
            params = own_part(fill(params)[0])
        found, inner_state = inner.update(own_part(vector), state.inner, params)
        found = lax.with_sharding_constraint(found, whole)
        return unravel(found[:size]), state.replace(inner=inner_state)

    return optax.GradientTransformation(init, update)


def layout(opt_state, mesh):
    """The sharding of each array of an optimizer's state, with or without `Shards`."""
    whole, split = mesh_lib.replicated(mesh), mesh_lib.split_rows(mesh)

    def of_node(node):
        if not _is_shards(node):
            return whole
        return jax.tree.map(lambda leaf: split if np.ndim(leaf) else whole, node)

    return jax.tree.map(of_node, opt_state, is_leaf=_is_shards)


def place(opt_state, mesh):
    """Copies an optimizer's state, the same on all hosts, from host to devices."""

    def put(leaf, target):
        if target.is_fully_replicated:
            return mesh_lib.replicate(leaf, mesh)
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, target, lambda at: leaf[at])

    return jax.tree.map(put, opt_state, layout(opt_state, mesh))


def replicated(opt_state):
    """The state in the form of `optax.flatten`, for a checkpoint.

    With several hosts, all must call it together.

    Returns:
      Host arrays instead of `Shards`; the rest unchanged.
    """

    def of_node(node):
        if not _is_shards(node):
            return node
        return jax.tree.map(
            lambda leaf: mesh_lib.gather(leaf)[: node.size] if np.ndim(leaf) else leaf,
            node.inner,
        )

    # The loop forbids implicit transfers; a gather has some inside.
    with jax.transfer_guard('allow'):
        return jax.tree.map(of_node, opt_state, is_leaf=_is_shards)


def from_replicated(opt_state, like):
    """Converts the result of `replicated` to another optimizer's state, on the host.

    Args:
      like: a state of the optimizer that continues, in `Shards` or not.
    """

    def of_node(node, found):
        if not _is_shards(node):
            return found

        def fill(target, leaf):
            leaf = np.asarray(leaf)
            extra = target.shape[0] - leaf.shape[0] if leaf.ndim else 0
            return np.pad(leaf, (0, extra)) if leaf.ndim else leaf

        return node.replace(inner=jax.tree.map(fill, node.inner, found))

    return jax.tree.map(of_node, like, opt_state, is_leaf=_is_shards)
