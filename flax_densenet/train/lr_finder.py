"""The learning-rate range test: a rate to train at, from a hundred steps.

The rate grows from step to step, always by the same factor, and the loss tells where
training begins, where it is fastest and where it breaks (Smith, "Cyclical Learning
Rates for Training Neural Networks", 2015, https://arxiv.org/abs/1506.01186, section
3.3).

The suggestion is a tenth of the rate with the lowest mean loss. Of 16 curves (digits,
photographs, CIFAR-10; Adam and SGD; two seeds) the steepest descent, which is suggested
elsewhere, lay in the noise at 1e-7 in 4 and else 1.2 to 4 times below the minimum. The
minimum moved 1.2 to 2.1 times between seeds, once 4.4 times.

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
from flax_densenet.distributed import mesh
from flax_densenet.errors import UserError
from flax_densenet.train import announce, prepare, training_run

_LOGGER = logging.getLogger(__name__)

LOWEST, HIGHEST = 1e-7, 10.0
MIN_STEPS = 40  # with fewer, noise passes for a fall
FILE = 'lr_find.json'
_DIVERGED = 4.0  # times the lowest mean


def find(
    settings: settings_lib.Settings | Mapping[str, Any],
    workdir: str,
    *,
    steps: int = 100,
) -> dict[str, Any]:
    """Runs the test and writes `lr_find.json` into the workdir.

    Steps, batches, augmentation and optimizer are those that training would begin with
    (`train.seed`, `init_from`); the state is dropped and checkpoints in the workdir are
    neither read nor changed. Where a run would train its head alone at first
    (`train.head_warmup_epochs`) all that trains later is tested, for most of the
    training; the shares of the rate that parts have stay as they are.

    Args:
      settings: of `settings.from_config`, or a config that it takes.
      workdir: folder of the file; made where absent.
      steps: of the test, from `LOWEST` to `HIGHEST`, whatever the epoch's length. A
        hundred are twelve for each factor of 10; small or noisy sets need some more.

    Returns:
      What `lr_find.json` holds: `suggestion`, None where the loss did not fall;
      `lowest_at`, the rate where the mean loss is lowest; `stopped`, why it ended early
      or None; lists of `learning_rate`, `loss` and its `mean` for each step.

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
    """A run as training has it, but for the learning rate and the head's warm-up."""
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
    """Takes the steps; returns their losses, and why they ended early or None."""
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
    """The loss of one who knows nothing."""
    return math.log(2 if run.source.multi_label else len(run.source.class_names))


def smooth(losses, steps: int) -> np.ndarray:
    """The exponential mean of the losses up to each step, corrected for its start.

    It reaches back over a tenth of the test, so more steps make it smoother.

    Args:
      losses: of the first steps.
      steps: of the whole test.
    """
    kept, mean, means = _kept(steps), 0.0, []
    for step, loss in enumerate(losses, start=1):
        mean = kept * mean + (1 - kept) * loss
        means.append(mean / (1 - kept**step))
    return np.asarray(means)


def _kept(steps):
    """The share of the mean that a step keeps."""
    return 1 - 10 / steps


def has_diverged(means, guess: float) -> bool:
    """True where the last mean is above four times the lowest, and above guessing.

    Of weights that fit already the losses are near 0, and four times the lowest of them
    is noise: hence the second condition.
    """
    return bool(means[-1] > max(_DIVERGED * np.min(means), guess))


def suggest(losses, steps: int) -> float | None:
    """A tenth of the rate where the mean is lowest, to two digits.

    Args:
      losses: of the first steps, more than a fifth.
      steps: of the whole test.

    Returns:
      None where the mean did not fall below that of the first steps, at rates that
      change nothing, by more than noise.
    """
    start, means = np.asarray(losses[: _first(len(losses))]), smooth(losses, steps)
    kept, lowest = _kept(steps), _lowest(means)
    # The standard deviation of the mean of losses that only vary. The lowest of all
    # means lies this much down in one of 25 such curves.
    noise = start.std() * math.sqrt((1 - kept) / (1 + kept))
    if means[lowest] >= start.mean() - 4.4 * noise:
        return None
    return float(f'{make_rates(steps)[lowest] / 10:.1e}')


def _first(steps):
    """How many of the steps tell how it was before anything changed."""
    return steps // 5


def _lowest(means):
    """The step where the mean is lowest; the first ones are means of too few."""
    first = _first(len(means))
    return first + int(np.argmin(means[first:]))


def describe(result: dict[str, Any]) -> str:
    """The suggestion of `find` in words."""
    stopped = f'; {result["stopped"]} at ' if result['stopped'] else ''
    if stopped:
        stopped += f'{result["learning_rate"][-1]:.1e}'
    if result['suggestion'] is None:
        return (
            'no suggestion: the loss fell by no more than its noise; try more --steps, '
            f'unless what is trained fits already{stopped}'
        )
    return (
        f'suggested: --config.optimizer.learning_rate={result["suggestion"]:g} (a '
        f'tenth of the rate with the lowest mean loss){stopped}'
    )
