"""The steps of an epoch: their metrics, and what happens between them."""

import collections
import dataclasses
import time
from typing import Any

import jax
from tqdm import tqdm

from flax_densenet.checkpoints import writer as checkpoint_writer
from flax_densenet.checkpoints.reader import Checkpoint
from flax_densenet.distributed import agreement as agreement_lib
from flax_densenet.distributed import processes, zero
from flax_densenet.system import platforms, process, signals
from flax_densenet.train import ema, nonfinite, step, tensorboard, training_run


@dataclasses.dataclass
class Loop:
    """State of the loop over a run's steps.

    Attributes:
      every: how often to save within an epoch.
      records: the records of the finished epochs.
      skipped: steps of the current epoch that were skipped before this start.
      saved_at: time of the last save, in seconds of `time.monotonic`.
    """

    run: training_run.TrainingRun
    saver: checkpoint_writer.Saver
    stop: signals.Stop
    shown: tensorboard.TensorBoardWriter
    every: checkpoint_writer.Every
    records: list[dict[str, Any]]
    agreement: agreement_lib.Agreement
    skipped: int = 0
    saved_at: float = dataclasses.field(default_factory=time.monotonic)

    def save_middle(self, state, number: int, epoch: int, skipped: int):
        """Saves a state within an epoch, after the step `number`."""
        self.saver.save(
            Checkpoint(number, finished=False),
            **checkpoint_items(state),
            metadata=self.run.metadata | {'epoch': epoch - 1, 'skipped_steps': skipped},
            records=self.records,
        )
        self.saved_at = time.monotonic()
        self.agreement.forget()

    def save_epoch(self, state):
        """Saves the state after the last record."""
        record = self.records[-1]
        self.saver.save(
            Checkpoint(record['step']),
            **checkpoint_items(state),
            metadata=self.run.metadata | {'epoch': record['epoch']},
            records=self.records,
            metrics=record,
        )
        self.saved_at, self.skipped = time.monotonic(), 0
        self.agreement.forget()

    def agree(self, number: int) -> tuple[bool, bool]:
        """Whether to stop and whether to save after the step `number`.

        All processes get the same answer, and all of them must call this.
        """
        since = time.monotonic() - self.saved_at
        by_clock = processes.is_first() and self.every.due(since)
        signum, due = self.agreement.exchange(self.stop.signum, int(by_clock))
        self.stop.agreed = signum
        return bool(signum), bool(due) or self.every.due_at(number)

    def stop_if_asked(self, state, number: int, epoch: int, skipped: int):
        """Saves and raises `signals.Stopped` if a signal came; all must call it."""
        if self.agree(number)[0]:
            self.stop_here(state, number, epoch, skipped)

    def stop_here(self, state, number: int, epoch: int, skipped: int):
        """Saves and raises `signals.Stopped`."""
        self.save_middle(state, number, epoch, skipped)
        self.wait_for_saved()
        raise self.stop.stopped(f'step {number}, in epoch {epoch}, is saved')

    def wait_for_saved(self):
        """Waits until everything that was saved is on the disk, on all processes."""
        self.saver.wait()
        processes.barrier('saved')


def checkpoint_items(state: step.TrainState) -> dict[str, Any]:
    """The trees of arrays of a checkpoint; with several hosts, all must call this."""
    items = ema.to_items(state)
    return {
        'model': items.pop('model'),
        'train': {
            'step': state.step,
            'opt_state': zero.replicated(state.opt_state),
            'running': state.running,
            **items,
        },
    }


def from_items(model, train: dict[str, Any]) -> step.TrainState:
    """The state from the items that `checkpoint_items` made."""
    rest = {name: train[name] for name in ('step', 'opt_state', 'running')}
    return step.TrainState(**ema.from_items(model, train.get('raw')), **rest)


class _Losses:
    """Losses of steps that the devices are still computing, read in order."""

    def __init__(self, guard, bar, shown):
        self._guard, self._bar, self._shown = guard, bar, shown
        self._waiting = collections.deque()

    def add(self, number, loss):
        self._waiting.append((number, loss))

    @property
    def devices_are_done(self):
        return not self._waiting or self._waiting[-1][1].is_ready()

    def read(self, state, *, but=0):
        """Reads all losses except the last ones."""
        while len(self._waiting) > but:
            number, loss = self._waiting.popleft()
            loss = float(jax.device_get(loss))
            self._guard.see(number, loss, state)
            self._bar.set_postfix(loss=f'{loss:.3f}')
            self._shown.add_loss(number, loss)


def take_epoch(loop: Loop, compiled, state, batches, epoch: int):
    """Trains the remaining steps of an epoch.

    Returns:
      The state, and the training metrics for the epoch's record.

    Raises:
      signals.Stopped: a signal came; the state is saved.
      UserError: a loss or gradient was not finite, or saving failed for good.
    """
    run = loop.run
    count, rows = len(run.source.train), run.batch_size
    first, before = int(state.step), step.last_step_of_epoch(epoch - 1, count, rows)
    last = step.last_step_of_epoch(epoch, count, rows)
    guard = nonfinite.NonFiniteGuard(run, epoch, last - before, loop.skipped)
    started, waited = time.perf_counter(), 0.0
    # A GPU gets its next step before it has finished this one. On a CPU that would gain
    # nothing and need the memory of two steps.
    ahead = 0 if jax.default_backend() == 'cpu' else 1
    bar = tqdm(
        total=count,
        initial=round((first - before) / (last - before) * count),
        desc=f'epoch {epoch}/{run.settings.train.epochs}',
        unit=' images',
        leave=False,
        disable=None,  # no progress bar if stderr is a file
    )
    with bar, jax.transfer_guard('disallow'):
        losses = _Losses(guard, bar, loop.shown)
        for number in range(first + 1, last + 1):
            asked = time.perf_counter()
            batch = run.place_batch(next(batches))
            if losses.devices_are_done:  # they had nothing to do
                waited += time.perf_counter() - asked
            losses.read(state, but=ahead)
            state, loss = compiled(state, batch)
            losses.add(number, loss)
            if number == first + 1:
                process.release_memory()
            bar.update(round((number - before) / (last - before) * count) - bar.n)
            loop.saver.check()
            asked, due = loop.agree(number)
            if asked:
                losses.read(state)
                loop.stop_here(state, number, epoch, guard.skipped)
            if due and number < last:
                losses.read(state)
                loop.save_middle(state, number, epoch, guard.skipped)
        jax.block_until_ready(state)
        losses.read(state)
    loop.skipped = guard.skipped
    seconds = time.perf_counter() - started
    return state, {
        'epoch': epoch,
        'step': last,
        **_epoch_metrics(jax.device_get(state.running)),
        'learning_rate': float(run.schedule(last - 1)),
        'skipped_steps': guard.skipped,
        'seconds': round(seconds, 3),
        'images_per_second': round((last - first) * rows / seconds, 2),
        'input_wait_share': round(waited / seconds, 4),
        'peak_memory_gib': round(peak_memory_gib(), 3),
        'memory_gib': round(memory_gib(), 3),
    }


def _epoch_metrics(running):
    seen = int(running['count'][0])
    return {
        'train_accuracy': float(running['correct'][0] / max(seen, 1)),
        'train_loss': float(running['loss'][0] / max(seen, 1)),
        'train_count': seen,
    }


def peak_memory_gib() -> float:
    """Peak memory of the device if it reports it, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and 'peak_bytes_in_use' in stats:
        return stats['peak_bytes_in_use'] / 2**30
    return platforms.peak_memory_bytes() / 2**30


def memory_gib() -> float:
    """Memory of this process now; its peak if the system does not report the former."""
    return platforms.memory_bytes() / 2**30
