"""A mesh with one `data` axis over all devices, and transfers to and from it."""

import contextlib

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_densenet.errors import UserError


def make_mesh(devices=None) -> Mesh:
    """A mesh of all devices on all hosts, or of `devices`, with the axis `data`."""
    devices = jax.devices() if devices is None else devices
    # jax.make_mesh has explicit axes by default, in which optax's cross-entropy
    # has no gradient; Mesh itself has automatic ones.
    return Mesh(np.asarray(devices), ('data',))


def make_local_mesh() -> Mesh:
    """A mesh of only this host's devices."""
    return make_mesh(jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters: a complete copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows divided over the devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def split_micro_batches(mesh: Mesh) -> NamedSharding:
    """The sharding of `[micro_batches, rows, ...]`: rows divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, 'data'))


def computing(mesh: Mesh):
    """A context for tracing programs whose rows are spread over the mesh.

    The CPU kernels, which are calls that JAX cannot divide, learn from it who has which
    rows (`kernels.spread`).
    """
    if jax.default_backend() == 'cpu' and jax.device_count() > 1:
        return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def replicate(tree, mesh: Mesh):
    """Copies host arrays, the same on every host, to every device."""
    sharding = replicated(mesh)
    if jax.process_count() == 1:  # all at once, five times as fast
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def to_global(batch, mesh: Mesh, micro_batches: int = 1):
    """Makes global arrays over all hosts' devices from this host's rows (numpy).

    Args:
      batch: arrays `[n, ...]`.
      mesh: the mesh of the devices.
      micro_batches: number of micro-batches. Above 1 the arrays become `[micro_batches,
        N / micro_batches, ...]`, and each micro-batch is divided over all devices. A
        micro-batch consists of consecutive rows of the batch, whatever the devices, so
        no rows have to move between devices.
    """
    if micro_batches == 1:
        sharding = split_rows(mesh)
    else:
        sharding = split_micro_batches(mesh)
        batch = jax.tree.map(
            lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch
        )
    # Intended, although JAX warns about it for arrays of several processes.
    with jax.transfer_guard_host_to_device('allow'):
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x), batch
        )


def gather(array) -> np.ndarray:
    """Gathers the rows of a global array, from all hosts, on this host."""
    if jax.process_count() == 1:
        return jax.device_get(array)
    return multihost_utils.process_allgather(array, tiled=True)


def to_host(tree):
    """Copies of arrays for the one process that writes; None on the others.

    All processes have to call it: sharded arrays are gathered.
    """
    arrays = jax.tree.map(_replicated, tree)
    if not is_writer():
        return None
    # On a CPU, the host arrays would share the device's buffers, which a step with
    # donated arguments overwrites.
    return jax.tree.map(lambda leaf: np.array(leaf), jax.device_get(arrays))


def _replicated(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return leaf
    return jax.jit(lambda x: x, out_shardings=replicated(leaf.sharding.mesh))(leaf)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate_steps: int = 1):
    """Raises `UserError` if a global batch does not divide over the devices.

    Args:
      accumulate_steps: number of micro-batches, each of which must divide.
    """
    devices = mesh.size
    if batch_size < 1:
        raise UserError(f'data.batch_size={batch_size} must be at least 1')
    if accumulate_steps > 1 and batch_size % (devices * accumulate_steps):
        step = devices * accumulate_steps
        below = batch_size // step * step
        choices = f'{below} or {below + step}' if below > 0 else f'{step}'
        raise UserError(
            f'data.batch_size={batch_size} does not divide into '
            f'train.accumulate_steps={accumulate_steps} parts over {devices} devices; '
            f'use {choices}'
        )
    if batch_size % devices:
        below = batch_size // devices * devices
        choices = f'{below} or {below + devices}' if below > 0 else f'{devices}'
        raise UserError(
            f'data.batch_size={batch_size} does not divide over {devices} devices; '
            f'use {choices}'
        )


def is_writer() -> bool:
    """True on the one host that writes logs, pictures and settings."""
    return jax.process_index() == 0
