"""Phases of a run: epochs that share their batches and their compiled step.

A new phase begins when images grow (`data.size_schedule`) or when the rest of the
network joins a head that trained alone (`train.head_warmup_epochs`); then the step is
compiled again.
"""

import contextlib

from flax_densenet.settings import sizes
from flax_densenet.train import training_run


class Phase:
    """The batches and the compiled step of an epoch.

    Attributes:
      batches: training batches from the epoch's first remaining step.
      compiled: see `training_run.compile_step`.
    """

    def __init__(self, run: training_run.TrainingRun):
        self._run = run
        self._frozen: int | None = None
        self._size: sizes.Size | None = None
        self.batches = self.compiled = None

    def enter(self, state, epoch: int):
        """Recreates what differs from the previous epoch.

        Args:
          state: before the epoch's first remaining step.
          epoch: counted from 1.
        """
        run, start = self._run, int(state.step)
        frozen, size = run.plan.frozen_in(epoch), run.size_in(epoch)
        resized = size != self._size
        if resized:
            self.close()
            source = run.features or run.source
            self.batches = training_run.train_batches(run, source, start)
        if resized or frozen != self._frozen:
            self.compiled = training_run.compile_step(run, state, frozen, start)
        self._frozen, self._size = frozen, size

    def close(self):
        """Stops reading data."""
        if self.batches is not None:
            self.batches.close()


@contextlib.contextmanager
def open_phase(run: training_run.TrainingRun):
    """Yields a phase that is closed at the end."""
    phase = Phase(run)
    try:
        yield phase
    finally:
        phase.close()
