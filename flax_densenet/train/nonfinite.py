"""What to do about a loss or gradient that is not finite: stop and show, or skip.

The compiled step leaves everything unchanged and reports a loss that is not finite
(`step.make_train_step`). The loop reads each loss anyway and so notices.
"""

import dataclasses
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_densenet.data import labeled_images
from flax_densenet.distributed import mesh, processes
from flax_densenet.errors import UserError
from flax_densenet.system import atomic
from flax_densenet.train import step, training_run

DUMP_FILE, ARRAYS_FILE = 'nonfinite.json', 'nonfinite.npz'
IN_A_ROW, SHARE = 10, 0.01


class NonFiniteGuard:
    """Counts the bad steps of an epoch, and ends the run if there are too many.

    Args:
      steps: number of steps of the whole epoch.
      skipped: steps of this epoch that were skipped before the run was resumed.
    """

    def __init__(
        self, run: training_run.TrainingRun, epoch: int, steps: int, skipped: int = 0
    ):
        self._run = run
        self._epoch = epoch
        self._most = max(IN_A_ROW, int(SHARE * steps))
        self._in_a_row = 0
        self.skipped = skipped

    def see(self, number: int, loss: float, state: step.TrainState):
        """Checks the loss of a step, counted from 1.

        Args:
          state: the state after the step.

        Raises:
          UserError: the loss is not finite, and too many were not.
        """
        if np.isfinite(loss):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self.skipped += 1
        skip = self._run.settings.train.on_nonfinite == 'skip'
        if skip and self._in_a_row <= IN_A_ROW and self.skipped <= self._most:
            return
        with jax.transfer_guard('allow'):
            save_dump(self._run, state, number, self._epoch)
            rate = float(self._run.schedule(number - 1))
        path = os.path.join(self._run.workdir, DUMP_FILE)
        what = 'the loss or its gradient is not finite'
        if skip:
            what += f' for the {self.skipped}th step of this epoch'
        raise UserError(
            f'step {number}, epoch {self._epoch}: {what}; {path} shows where. Lower '
            f'optimizer.learning_rate={rate:g}, set optimizer.gradient_clip'
            + ('' if skip else ' or train.on_nonfinite=skip')
            + '; checkpoints before it are kept'
        )


def save_dump(
    run: training_run.TrainingRun, state: step.TrainState, number: int, epoch: int
):
    """Writes `nonfinite.json` and `nonfinite.npz` about a step into the run's folder.

    The JSON file has the step, its loss and gradient norm; for each example of the
    batch its position in the training part, file, label, loss and range of values; and
    for the parameters, gradients and new batch norm statistics of each layer the range
    and the number of values that are not finite. The other file has the batch's arrays.

    Args:
      state: before the step's update; its gradient is computed again.
      number: the step, counted from 1.
    """
    batch = run.place_batch(_batch_of(run, number))
    positions = batch.pop('position')
    options = run.step_options(run.plan.frozen_in(epoch))
    differentiate = step.make_gradients(run.module, options)

    def look(state, batch):
        # The counter has advanced; the dropout key depends on it.
        state = state.replace(step=jnp.full_like(state.step, number - 1))
        gradients, (losses, _, batch_stats) = differentiate(state, batch)
        trees = {
            'parameters': state.params,
            'gradients': gradients,
            'batch norm': batch_stats,
        }
        norm = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradients)))
        return losses.reshape(-1), norm, jax.tree.map(_measure, trees)

    whole = mesh.replicated(run.mesh)
    with mesh.computing(run.mesh):
        found = jax.jit(look, out_shardings=whole)(state, batch)
    batch = {name: _rows_of(run, value) for name, value in batch.items()}
    positions = _rows_of(run, positions)
    losses, norm, layers = jax.device_get(found)
    if mesh.is_writer():
        _write(run, number, epoch, positions, batch, (losses, norm, layers))
    processes.barrier('dumped')  # others wait for the writing


def _write(run, number, epoch, positions, batch, found):
    losses, norm, layers = found
    content = {
        'step': number,
        'epoch': epoch,
        'learning_rate': float(run.schedule(number - 1)),
        'loss': float(losses.mean()),
        'gradient_norm': float(norm),
        'examples': [
            _describe(run, int(position), losses[row], batch, row)
            for row, position in enumerate(positions)
        ],
        'layers': _by_layer(layers),
    }
    with atomic.replacing(os.path.join(run.workdir, DUMP_FILE)) as file:
        json.dump(content, file, indent=1)
    arrays = batch | {'position': positions, 'losses': losses}
    with atomic.replacing(os.path.join(run.workdir, ARRAYS_FILE), 'wb') as file:
        np.savez(file, **arrays)


def _rows_of(run, value):
    """The rows of all hosts and micro-batches."""
    rows = mesh.gather(value)
    return rows if run.accumulate_steps == 1 else rows.reshape(-1, *rows.shape[2:])


def _batch_of(run, number):
    """The batch of a step again, with each row's `position` in the training part.

    With several hosts it is this host's part.
    """
    source = run.features or run.source
    source = dataclasses.replace(source, train=labeled_images.Numbered(source.train))
    batches = training_run.train_batches(run, source, number - 1, workers=0)
    try:
        return next(batches)
    finally:
        batches.close()


def _measure(array):
    """Smallest and largest of the finite values, and how many are not finite."""
    finite = jnp.isfinite(array)
    return {
        'min': jnp.min(jnp.where(finite, array, jnp.inf)),
        'max': jnp.max(jnp.where(finite, array, -jnp.inf)),
        'nonfinite': jnp.sum(~finite),
    }


def _describe(run, position, loss, batch, row) -> dict[str, Any]:
    values = batch['features' if 'features' in batch else 'image'][row]
    return {
        'position': position,
        'name': run.source.train.name(position),
        'label': np.asarray(batch['label'][row]).tolist(),
        'loss': float(loss),
        'min': float(values.min()),
        'max': float(values.max()),
    }


def _by_layer(layers):
    """`{'conv0/kernel': {'parameters': {'min': ...}, ...}}`, in the model's order."""
    found = {}
    for kind, tree in layers.items():
        leaves, _ = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda node: 'nonfinite' in node
        )
        for path, values in leaves:
            name = '/'.join(key.key for key in path)
            found.setdefault(name, {})[kind] = {
                key: float(value) for key, value in values.items()
            }
    return found
