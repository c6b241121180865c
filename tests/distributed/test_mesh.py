"""Rows and copies lie where they should."""

import jax
import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.distributed import mesh as mesh_lib


def test_rows_are_spread_and_parameters_copied():
    mesh = mesh_lib.make_mesh()
    batch = mesh_lib.to_global({'x': np.arange(8.0)}, mesh)['x']
    assert [shard.data.tolist() for shard in batch.addressable_shards] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    copy = mesh_lib.replicate({'x': np.arange(3.0)}, mesh)['x']
    assert copy.is_fully_replicated and len(copy.addressable_shards) == 4
    assert mesh_lib.is_writer()


@pytest.mark.parametrize(
    ('size', 'devices', 'message'),
    [
        (100, 3, '100 does not divide over 3 devices; use 99 or 102'),
        (2, 4, '2 does not divide over 4 devices; use 4'),
        (0, 1, 'data.batch_size=0 must be at least 1'),
    ],
)
def test_batch_sizes(size, devices, message):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    with pytest.raises(UserError, match=message):
        mesh_lib.check_batch_size(size, mesh)
    mesh_lib.check_batch_size(devices * 5, mesh)
