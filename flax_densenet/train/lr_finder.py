"""The learning-rate range test: suggests a learning rate after a hundred steps.

The rate grows by the same factor at each step, and the loss shows where training
begins, where it is fastest and where it diverges (Smith, "Cyclical Learning Rates for
Training Neural Networks", 2015, https://arxiv.org/abs/1506.01186, section 3.3).

The suggestion is a tenth of the rate with the lowest mean loss. Other tools suggest the
rate of the steepest descent. In 16 curves (digits, photographs, CIFAR-10; Adam and SGD;
two seeds) that rate was noise near 1e-7 in 4 cases, and 1.2 to 4 times below the
minimum in the others. The minimum differed by a factor of 1.2 to 2.1 between seeds, and
once by 4.4.

>>> losses = np.concatenate([np.full(50, 2.3), np.linspace(2.3, 1, 30), np.full(20, 9)])
>>> suggest(losses, 100)
0.024
"""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from flax_densenet import settings as settings_lib
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import source_names
from flax_densenet.distributed import mesh
from flax_densenet.errors import UserError
from flax_densenet.models import naming
from flax_densenet.train import announce, prepare, training_run

_LOGGER = logging.getLogger(__name__)

LOWEST, HIGHEST = 1e-7, 10.0
MIN_STEPS = 40  # with fewer, noise looks like a decrease
FILE = 'lr_find.json'
_DIVERGED = 4.0  # times the lowest mean


def find(
    settings: settings_lib.Settings | Mapping[str, Any],
    workdir: str,
    *,
    steps: int = 100,
) -> dict[str, Any]:
    """Runs the test and writes `lr_find.json` into the workdir.

    It takes the same first steps as training (`train.seed`, `init_from`), with the same
    batches, augmentation and optimizer. The state is dropped, and checkpoints in the
    workdir are neither read nor changed. If a run would first train its head alone
    (`train.head_warmup_epochs`), the test trains everything that trains later, since
    most of the training does. The relative rates of the parts are kept.

    Args:
      settings: of `settings.from_config`, or a config that it takes.
      workdir: folder of the file; created if missing.
      steps: number of steps from `LOWEST` to `HIGHEST`, regardless of the length of an
        epoch. A hundred steps are twelve for each factor of 10; small or noisy data
        sets need more.

    Returns:
      The content of `lr_find.json`: the names of the `data` and the `network`;
      `suggestion`, None if the loss did not fall; `lowest_at`, the rate with the lowest
      mean loss; `stopped`, why the test ended early, or None; lists of
      `learning_rate`, `loss` and its `mean` for each step.

    Raises:
      UserError: a field or the data cannot be used, too few steps, or a loss that is
        not finite from the start.
    """
    if steps < MIN_STEPS:
        raise UserError(f'--steps={steps} are too few; use {MIN_STEPS} or more')
    run = _prepare(settings, workdir, steps)
    checkpoint_reader.make_workdir(workdir)
    announce.announce(run)
    _LOGGER.info(
        f'range test of {steps} steps, learning rates from {LOWEST:g} to {HIGHEST:g}, '
        'starting as a new run would'
    )
    losses, stopped = _measure(run, steps)
    if len(losses) <= _first(steps):
        raise UserError(
            f'{stopped} after {len(losses)} steps at learning rates near {LOWEST:g}; '
            'look at data.mean, data.std and the weights of init_from'
        )
    rates, means = make_rates(steps)[: len(losses)], smooth(losses, steps)
    result = {
        'data': source_names.public_source(run.source.name),
        'network': naming.describe(
            run.module,
            run.settings.model.variant,
            channels=run.source.train.preparation.channels,
        ),
        'suggestion': suggest(losses, steps),
        'lowest_at': float(rates[_lowest(means)]),
        'stopped': stopped,
        'learning_rate': rates.tolist(),
        'loss': list(losses),
        'mean': means.tolist(),
    }
    if mesh.is_writer():
        with open(os.path.join(workdir, FILE), 'w') as file:
            json.dump(result, file, indent=2)
    return result


def _prepare(settings, workdir, steps):
    """A run as in training, except for the learning rate and the head's warm-up."""
    run = prepare.prepare(settings, workdir, resume=False)
    plan, schedule = dataclasses.replace(run.plan, head_epochs=0), make_schedule(steps)
    optimizer = prepare.make_optimizer(
        run.settings, plan, schedule, run.mesh, head_steps=0
    )
    return dataclasses.replace(run, plan=plan, schedule=schedule, optimizer=optimizer)


def make_rates(steps: int) -> np.ndarray:
    """The learning rate of each step, `[steps]`."""
    return np.geomspace(LOWEST, HIGHEST, steps)


def make_schedule(steps: int) -> optax.Schedule:
    """`make_rates` as a function of the step, from 0."""
    growth = (HIGHEST / LOWEST) ** (1 / (steps - 1))
    return optax.exponential_decay(LOWEST, transition_steps=1, decay_rate=growth)


def _measure(run, steps):
    """Trains the steps. Returns their losses, and why they ended early or None."""
    state = run.place_state(run.new_state(training_run.first_variables(run)))
    run.features = training_run.cache_features(run, state)
    compiled = training_run.compile_step(run, state, run.plan.frozen)
    batches = training_run.train_batches(run, run.features or run.source, 0)
    guess = _guess_loss(run)
    losses = []
    bar = tqdm(total=steps, unit=' steps', leave=False, disable=None)
    try:
        with bar, jax.transfer_guard('disallow'):
            for _ in range(steps):
                batch = run.place_batch(next(batches))
                state, loss = compiled(state, batch)
                loss = float(jax.device_get(loss))
                if not math.isfinite(loss):
                    return losses, 'the loss was not finite'
                losses.append(loss)
                bar.update()
                bar.set_postfix(loss=f'{loss:.3f}')
                if has_diverged(smooth(losses, steps), guess):
                    return losses, 'the loss diverged'
    finally:
        batches.close()
    return losses, None


def _guess_loss(run):
    """The loss of guessing."""
    return math.log(2 if run.source.multi_label else len(run.source.class_names))


def smooth(losses, steps: int) -> np.ndarray:
    """The exponential mean of the losses up to each step, corrected for its start.

    It covers about a tenth of the test, so more steps make it smoother.

    Args:
      losses: the losses of the first steps.
      steps: number of steps of the whole test.
    """
    kept, mean, means = _kept(steps), 0.0, []
    for step, loss in enumerate(losses, start=1):
        mean = kept * mean + (1 - kept) * loss
        means.append(mean / (1 - kept**step))
    return np.asarray(means)


def _kept(steps):
    """The share of the mean that is kept at each step."""
    return 1 - 10 / steps


def has_diverged(means, guess: float) -> bool:
    """Whether the last mean is above four times the lowest, and above guessing.

    Weights that fit already have losses near 0, and four times the lowest of these is
    noise; hence the second condition.
    """
    return bool(means[-1] > max(_DIVERGED * np.min(means), guess))


def suggest(losses, steps: int) -> float | None:
    """A tenth of the rate with the lowest mean loss, to two digits.

    Args:
      losses: the losses of the first steps, more than a fifth of all.
      steps: number of steps of the whole test.

    Returns:
      The rate, or None if the mean did not fall below that of the first steps, whose
      rates change nothing, by more than noise.
    """
    start, means = np.asarray(losses[: _first(len(losses))]), smooth(losses, steps)
    kept, lowest = _kept(steps), _lowest(means)
    # The standard deviation of the mean of losses that are pure noise. In one of 25
    # such curves, the lowest mean is this far down.
    noise = start.std() * math.sqrt((1 - kept) / (1 + kept))
    if means[lowest] >= start.mean() - 4.4 * noise:
        return None
    return float(f'{make_rates(steps)[lowest] / 10:.1e}')


def _first(steps):
    """How many of the first steps show the loss before anything changed."""
    return steps // 5


def _lowest(means):
    """The step with the lowest mean, without the first ones, which average too few."""
    first = _first(len(means))
    return first + int(np.argmin(means[first:]))


def describe(result: dict[str, Any]) -> str:
    """The suggestion of `find` in words."""
    stopped = f'; {result["stopped"]} at ' if result['stopped'] else ''
    if stopped:
        stopped += f'{result["learning_rate"][-1]:.2g}'
    if result['suggestion'] is None:
        return (
            'no suggestion: the loss did not fall by more than its noise; try more '
            f'--steps, unless the model fits the data already{stopped}'
        )
    return (
        f'suggested: --config.optimizer.learning_rate={result["suggestion"]:g} (a '
        f'tenth of the rate with the lowest mean loss){stopped}'
    )
