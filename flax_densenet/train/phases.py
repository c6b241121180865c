"""What the epochs of a run share until one needs other batches or another step.

Images grow (`data.size_schedule`), and a head that trained alone is joined by the rest
(`train.head_warmup_epochs`): then the step is compiled again.
"""

import contextlib

from flax_densenet.settings import sizes
from flax_densenet.train import training_run


class Phase:
    """The batches and the compiled step of an epoch.

    Attributes:
      batches: of the training part, from the epoch's first step that is left.
      compiled: see `training_run.compile_step`.
    """

    def __init__(self, run: training_run.TrainingRun):
        self._run = run
        self._frozen: int | None = None
        self._size: sizes.Size | None = None
        self.batches = self.compiled = None

    def enter(self, state, epoch: int):
        """Recreates what differs from the epoch before.

        Args:
          state: before the epoch's first step that is left.
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
        """Ends the reading."""
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
