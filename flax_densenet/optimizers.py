"""Optimizers and learning rates, from the fields of `config.optimizer`; optax's.

>>> schedule = make_schedule(
...     learning_rate=0.1, schedule='cosine', drop_at=(), warmup_epochs=0.0,
...     epochs=10, steps_per_epoch=10.0,
... )
>>> round(float(schedule(50)), 4)
0.05
"""

import math

import optax

from flax_densenet import state_shards
from flax_densenet.errors import UserError

OPTIMIZERS = ('adam', 'adamw', 'sgd')
SCHEDULES = ('constant', 'cosine', 'steps')


def make_schedule(
    *,
    learning_rate: float,
    schedule: str,
    drop_at,
    warmup_epochs: float,
    epochs: int,
    steps_per_epoch: float,
) -> optax.Schedule:
    """Learning rate by step; warm-up first, then `schedule` over what is left."""
    if schedule not in SCHEDULES:
        raise UserError(
            f'optimizer.schedule={schedule} is not known; use {", ".join(SCHEDULES)}'
        )
    if not 0 < learning_rate < math.inf:
        raise UserError(f'optimizer.learning_rate={learning_rate} must be above 0')
    if not 0 <= warmup_epochs < epochs:
        raise UserError(
            f'optimizer.warmup_epochs={warmup_epochs:g} must be below '
            f'train.epochs={epochs}'
        )
    total = math.ceil(epochs * steps_per_epoch)
    warmup = round(warmup_epochs * steps_per_epoch)
    if schedule == 'cosine':
        after = optax.cosine_decay_schedule(learning_rate, total - warmup)
    elif schedule == 'steps':
        drops = {round(share * total) - warmup: 0.1 for share in drop_at}
        after = optax.piecewise_constant_schedule(learning_rate, drops)
    else:
        after = optax.constant_schedule(learning_rate)
    if not warmup:
        return after
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str,
    momentum: float,
    weight_decay: float,
    shard_over=None,
) -> optax.GradientTransformation:
    """Adam (torch's constants), AdamW, or SGD with Nesterov momentum.

    Weight decay is the paper's: of all parameters, added to the gradient (AdamW:
    to the update).

    Args:
      shard_over: a mesh over which the state is spread (`state_shards`); None: whole
        on every device.
    """
    if name not in OPTIMIZERS:
        raise UserError(
            f'optimizer.name={name} is not known; use {", ".join(OPTIMIZERS)}'
        )
    if name == 'adamw':
        update = optax.adamw(schedule, weight_decay=weight_decay)
    elif name == 'adam':
        update = optax.adam(schedule)
    else:
        update = optax.sgd(schedule, momentum=momentum, nesterov=momentum > 0)
    if weight_decay and name != 'adamw':
        update = optax.chain(optax.add_decayed_weights(weight_decay), update)
    # As one vector: the 121 has 364 parameter arrays, and a dozen operations on each
    # took a third of the time that tracing and loading the step takes.
    if shard_over is not None:
        return state_shards.flatten(update, shard_over)
    return optax.flatten(update)
