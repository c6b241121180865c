"""Agreement between processes: stop at a signal, save by a clock, at the same step.

A signal reaches processes at different steps, or only one of them, and their clocks
differ. After each step each process submits its wish, and all get the maximum after the
next step, when the devices have it anyway, so nothing waits for it. The cost is an
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
        """Submits this process's wishes, each 0 or more.

        Returns:
          The maximum of each wish over all processes. With one process, these are the
          wishes submitted now; with several, those of the previous call, or zeros at
          the first call.
        """
        if self._alone:
            return wishes
        coming, self._coming = self._coming, self._start(wishes)
        if coming is None:
            return (0,) * len(wishes)
        return tuple(jax.device_get(coming).tolist())

    def forget(self):
        """Drops pending wishes, which have been acted on."""
        self._coming = None

    def _start(self, wishes):
        rows = np.tile(np.asarray(wishes, np.int32), (len(self._mesh.local_devices), 1))
        return self._largest(mesh_lib.to_global(rows, self._mesh))
