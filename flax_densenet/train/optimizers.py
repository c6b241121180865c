"""Optimizers and learning rates of optax, from the fields of `config.optimizer`.

>>> schedule = make_schedule(
...     learning_rate=0.1, schedule='cosine', drop_at=(), warmup_epochs=0.0,
...     epochs=10, steps_per_epoch=10.0,
... )
>>> round(float(schedule(50)), 4)
0.05
"""

import itertools
import logging
import math

import jax
import optax

from flax_densenet.distributed import zero
from flax_densenet.errors import UserError

_LOGGER = logging.getLogger(__name__)

OPTIMIZERS = ('adam', 'adamw', 'sgd', 'lamb')
SCHEDULES = ('constant', 'cosine', 'steps', 'one_cycle')
DECAYS = ('all', 'kernels')


def make_schedule(
    *,
    learning_rate: float,
    schedule: str,
    drop_at,
    warmup_epochs: float,
    epochs: int,
    steps_per_epoch: float,
) -> optax.Schedule:
    """The learning rate by step: a warm-up, then `schedule` over the remaining steps.

    `one_cycle` (Smith and Topin, arXiv 1708.07120) has its own warm-up: half a cosine
    from 1/25 of the rate, over `warmup_epochs` or, if these are 0, over 0.3 of
    training. It is torch's `OneCycleLR`, except that the momentum does not change.
    """
    _check(schedule=(schedule, SCHEDULES))
    if not 0 < learning_rate < math.inf:
        raise UserError(f'optimizer.learning_rate={learning_rate} must be above 0')
    if not 0 <= warmup_epochs < epochs:
        raise UserError(
            f'optimizer.warmup_epochs={warmup_epochs:g} must be 0 or above, and below '
            f'train.epochs={epochs}'
        )
    _check_drops(drop_at, schedule)
    total = math.ceil(epochs * steps_per_epoch)
    warmup = round(warmup_epochs * steps_per_epoch)
    if schedule == 'one_cycle':
        return _one_cycle(learning_rate, warmup or round(0.3 * total), total)
    if schedule == 'cosine':
        # In a short run a warm-up may be rounded to all steps; optax rejects 0.
        after = optax.cosine_decay_schedule(learning_rate, max(total - warmup, 1))
    elif schedule == 'steps':
        drops = {round(share * total) - warmup: 0.1 for share in drop_at}
        after = optax.piecewise_constant_schedule(learning_rate, drops)
    else:
        after = optax.constant_schedule(learning_rate)
    if not warmup:
        return after
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    return optax.join_schedules([rise, after], [warmup])


_USUAL_DROPS = (0.5, 0.75)  # the default of configs/base.py


def _check_drops(drop_at, schedule):
    """Raises for values that are not rising shares; warns if they have no effect."""
    shown = f'optimizer.drop_at={drop_at}'.replace(' ', '')
    bounds = 0, *drop_at, 1
    numbers = all(isinstance(share, int | float) for share in drop_at)
    if not numbers or not all(a < b for a, b in itertools.pairwise(bounds)):
        raise UserError(
            f'{shown} must be rising shares of training, above 0 and below 1, such as '
            '(0.5,0.75); for epochs divide by train.epochs'
        )
    if schedule != 'steps' and drop_at and tuple(drop_at) != _USUAL_DROPS:
        _LOGGER.warning(
            f'warning: {shown} has no effect with optimizer.schedule={schedule}; to '
            'use it: optimizer.schedule=steps'
        )


def _one_cycle(learning_rate, warmup, total):
    """Highest at the step `warmup`, counted from 1, and lowest at the last one."""
    # optax.cosine_onecycle_schedule in whole steps instead of shares.
    peak = max(warmup - 1, 1)
    return optax.piecewise_interpolate_schedule(
        'cosine',
        learning_rate / 25,
        {peak: 25.0, max(total - 1, peak + 1): 1 / (25 * 1e4)},
    )


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str,
    momentum: float,
    weight_decay: float,
    decay: str = 'all',
    shard_over=None,
) -> optax.GradientTransformation:
    """Adam (torch's constants), AdamW, LAMB, or SGD with Nesterov momentum.

    Weight decay is added to the gradient (AdamW, LAMB: to the update).

    LAMB (You et al., arXiv 1904.00962) is `optax.lamb`: the update of each parameter
    array is scaled to the norm of the array, times the rate. With `decay='kernels'`
    this applies to kernels only, as in timm and NVIDIA's code; norms and biases take
    Adam's step.

    Args:
      decay: `all` parameters, as in the paper, or `kernels`: of convolutions and the
        classifier, not norms and biases.
      shard_over: a mesh over which the state is sharded (`state_shards`); None keeps a
        complete copy on every device.

    Raises:
      UserError: a name is unknown or a number is out of range.
    """
    _check(name=(name, OPTIMIZERS), decay=(decay, DECAYS))
    if not 0 <= weight_decay < math.inf:
        raise UserError(f'optimizer.weight_decay={weight_decay} must be 0 or above')
    if not 0 <= momentum < 1:
        raise UserError(
            f'optimizer.momentum={momentum:g} must be 0 or above, and below 1'
        )
    mask = None if decay == 'all' else _kernels
    decayed = optax.add_decayed_weights(weight_decay, mask)
    scaled = optax.scale_by_learning_rate(schedule)

    def flat(update):
        # As one vector: the 121 has 364 parameter arrays, and a dozen operations on
        # each took a third of the time that tracing and loading the step takes.
        if shard_over is not None:
            return zero.flatten(update, shard_over)
        return optax.flatten(update)

    if name == 'lamb':
        # Applied to separate arrays after Adam, since each has its own norm; it has no
        # state, so that Adam's can be sharded.
        trust = optax.scale_by_trust_ratio()
        trust = trust if mask is None else optax.masked(trust, mask)
        return optax.chain(flat(optax.scale_by_adam(eps=1e-6)), decayed, trust, scaled)
    if name == 'adamw' and mask is not None:
        return optax.chain(flat(optax.scale_by_adam()), decayed, scaled)
    if name == 'adamw':
        return flat(optax.adamw(schedule, weight_decay=weight_decay))
    if name == 'adam':
        update = optax.adam(schedule)
    else:
        update = optax.sgd(schedule, momentum=momentum, nesterov=momentum > 0)
    if weight_decay and mask is not None:
        return optax.chain(decayed, flat(update))
    return flat(optax.chain(decayed, update) if weight_decay else update)


def _kernels(params):
    """True for arrays of more than one dimension."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _check(**choices):
    for field, (value, valid) in choices.items():
        if value not in valid:
            raise UserError(
                f'optimizer.{field}={value} is not known; use {", ".join(valid)}'
            )
