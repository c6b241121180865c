"""Batch statistics for groups of rows instead of the entire batch ("ghost" batch norm).

With statistics of the entire batch, devices exchange data in every batch norm, forward
and backward. Statistics of each device's rows need no exchange. Small groups also act
as a regularizer (Hoffer et al., "Train longer, generalize better", 2017,
https://arxiv.org/abs/1705.08741, section 4).

The forward pass of the model is mapped over the groups, so the layers do not change.

>>> resolve(-1, rows=32, devices=4), resolve(8, rows=32, devices=8)
(8, 8)
"""

import jax
import jax.numpy as jnp

from flax_densenet.errors import UserError
from flax_densenet.kernels import dense_block, spread

DEVICE = -1


def resolve(group: int, *, rows: int, devices: int, accumulate_steps: int = 1) -> int:
    """The number of rows in a group, from `model.batch_norm_group`; 0 for all rows.

    Args:
      group: 0, a number of rows, or -1 for the rows of one device.
      rows: number of rows in the global batch.
      devices: number of devices that share the rows.
      accumulate_steps: number of micro-batches, each with its own statistics.

    Raises:
      UserError: the groups do not divide the rows, or a group would cover a part of a
        device.
    """
    rows //= accumulate_steps
    own = rows // devices
    if group == DEVICE:
        group = own
    if group in (0, rows):
        return 0
    valid = [
        n
        for n in range(1, rows + 1)
        if rows % n == 0 and (own % n == 0 or n % own == 0)
    ]
    if group not in valid:
        below, above = ([n for n in valid if (n > group) == side] for side in (0, 1))
        nearest = below[-1:] + above[:1]
        part = 'micro-batch' if accumulate_steps > 1 else 'batch'
        raise UserError(
            f'model.batch_norm_group={group} does not divide the {rows} rows of a '
            f'{part}, {own} on each of {devices} devices, into equal parts of a '
            f'device or of whole devices; use {" or ".join(map(str, nearest))}'
        )
    return group


def pyramid(module, x, frozen: int, live):
    """`module.pyramid` in training, with separate statistics for each group of rows.

    `batch_stats` is updated once, with the average of the updates of all groups.

    Args:
      module: a bound `DenseNet` with `batch_norm_group` above 0.
      x: `[N, H, W, C]`; the rows of a group are consecutive.
      frozen: see `Network.__call__`.
      live: names of the submodules that are not frozen.

    Returns:
      The output of each dense block, `[N, H', W', F]`.

    Raises:
      UserError: the group size does not divide the rows.
    """
    rows, group = x.shape[0], module.batch_norm_group
    if rows % group:
        raise UserError(
            f'model.batch_norm_group={group} does not divide a batch of {rows} rows'
        )
    one, variables = module.clone(batch_norm_group=0), module.variables
    drops = module.dropout_rate or module.drop_path_rate
    key = module.make_rng('dropout') if drops else None

    def of_group(variables, key, images, number):
        rngs = {}
        if key is not None:
            rngs['dropout'] = jax.random.fold_in(key, number)
        return one.apply(
            variables,
            images,
            train=True,
            frozen=frozen,
            method='pyramid',
            mutable=['batch_stats'],
            rngs=rngs,
        )

    count = rows // group
    of_groups = jax.vmap(of_group, (None, None, 0, 0))
    if one.fast and dense_block.use_native(one.kernel, x):
        # The kernels of each device compute the groups of its own rows.
        of_groups = spread.by_rows(of_groups, (0, 0), (None, None, 0, 0), count)
    images = x.reshape(count, group, *x.shape[1:])
    outputs, updated = of_groups(variables, key, images, jnp.arange(count))
    if module.is_mutable_collection('batch_stats'):
        for name, value in updated['batch_stats'].items():
            # The average of equal values may differ from them in the last digit.
            if name in live:
                value = jax.tree.map(lambda leaf: leaf.mean(0), value)
                module.put_variable('batch_stats', name, value)
    return [y.reshape(rows, *y.shape[2:]) for y in outputs]
