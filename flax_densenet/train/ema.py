"""The exponential moving average of parameters and batch norm statistics (EMA).

The average is evaluated, kept as the best checkpoint, used for predictions and
exported. The values that training continues with are stored next to it, in the
checkpoint's `train` item.

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992, in
the exponential form of today's recipes. The statistics are averaged in the same way as
the parameters, because the statistics of the last step belong to other parameters.

>>> average = start({'params': {'a': np.zeros(1)}, 'batch_stats': {}}, ['a'])
>>> average = update(average, {'a': np.ones(1)}, {}, decay=0.999, step=0)
>>> round(float(average['params']['a'][0]), 4)
0.9
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_densenet.errors import UserError


def check_decay(decay: float):
    """Raises for an invalid `train.ema`."""
    if not 0 <= decay < 1:
        raise UserError(
            f'train.ema={decay:g} must be 0 (off) or a decay per step below 1, such as '
            '0.999'
        )


def start(variables, live) -> dict[str, Any]:
    """The average before the first step: copies of the first values, on the host.

    Args:
      variables: `{'params', 'batch_stats'}`.
      live: names of the model's parts that train at any time. A frozen part equals its
        average and takes no memory here.
    """
    return {
        collection: {
            # The step gets both copies and may overwrite either of them.
            name: jax.tree.map(np.array, part)
            for name, part in variables[collection].items()
            if name in live
        }
        for collection in ('params', 'batch_stats')
    }


def update(average, params, batch_stats, *, decay: float, step):
    """The average after a step, for the parts that the step trained.

    Args:
      params, batch_stats: the new values of parts that are in the average.
      decay: share of the average that is kept. It is less in early steps: at most (1 +
        step) / (10 + step), as in TensorFlow's `ExponentialMovingAverage`. With a
        constant 0.9999, the average after a thousand steps would still consist to nine
        tenths of the random initial values.
      step: number of steps taken before this one.
    """
    # 1 - min(decay, (1 + step) / (10 + step)), without the loss of digits in the
    # subtraction.
    rate = jnp.maximum(1 - decay, 9 / (10 + step)).astype(jnp.float32)
    new = {'params': params, 'batch_stats': batch_stats}
    return {
        collection: parts
        | optax.incremental_update(
            new[collection], {name: parts[name] for name in new[collection]}, rate
        )
        for collection, parts in average.items()
    }


def evaluated(state) -> dict[str, Any]:
    """`{'params', 'batch_stats'}` to evaluate and to keep.

    Args:
      state: a `step.TrainState`. If it has no average, its own values are returned.
    """
    average = state.average or {'params': {}, 'batch_stats': {}}
    return {
        'params': state.params | average['params'],
        'batch_stats': state.batch_stats | average['batch_stats'],
    }


def to_items(state) -> dict[str, Any]:
    """The items of a checkpoint: `model`, and `raw` if there is an average.

    `raw` has the values that training continues with, for the parts that are averaged.
    """
    if state.average is None:
        return {'model': evaluated(state)}
    raw = {
        collection: {name: getattr(state, collection)[name] for name in parts}
        for collection, parts in state.average.items()
    }
    return {'model': evaluated(state), 'raw': raw}


def from_items(model, raw=None) -> dict[str, Any]:
    """`params`, `batch_stats` and `average` from the items that `to_items` made."""
    if raw is None:
        return {**model, 'average': None}
    average = {
        collection: {name: model[collection][name] for name in parts}
        for collection, parts in raw.items()
    }
    return {name: model[name] | raw[name] for name in model} | {'average': average}
