"""What all processes do at the same step: stopping at a signal, saving by a clock.

A signal reaches processes at different steps, or one of them alone, and their clocks
differ. After each step each process gives its wish, and all hear the largest one after
the step behind it, when the devices have it anyway: nothing waits for it. It costs an
exchange of two numbers.
"""

import jax
import numpy as np

from flax_densenet.distributed import mesh as mesh_lib


class Agreement:
    """Exchanges wishes between the processes of a mesh.

    All processes call the methods in the same order.
    """

    def __init__(self, mesh):
        self._mesh = mesh
        self._alone = jax.process_count() == 1
        self._coming = None
        self._largest = jax.jit(
            lambda wishes: wishes.max(0), out_shardings=mesh_lib.replicated(mesh)
        )

    def exchange(self, *wishes: int) -> tuple[int, ...]:
        """Gives this process's wishes, each 0 or more.

        Returns:
          Of each the largest of all processes: of one process, those given now; of
          several, those given at the call before, or zeros at the first.
        """
        if self._alone:
            return wishes
        coming, self._coming = self._coming, self._start(wishes)
        if coming is None:
            return (0,) * len(wishes)
        return tuple(jax.device_get(coming).tolist())

    def forget(self):
        """Drops what is on its way: it has been acted on."""
        self._coming = None

    def _start(self, wishes):
        rows = np.tile(np.asarray(wishes, np.int32), (len(self._mesh.local_devices), 1))
        return self._largest(mesh_lib.to_global(rows, self._mesh))
