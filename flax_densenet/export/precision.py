"""Converts weights to 16 bits for storage; files still compute in float32.

This halves the size of the file. Programs convert the weights to float32 when they load
it, so the speed is the same.
"""

import numpy as np

from flax_densenet.errors import UserError

PRECISIONS = ('float32', 'float16', 'bfloat16')


def convert(array: np.ndarray, precision: str, name: str) -> np.ndarray:
    """Converts an array to another precision, one of `PRECISIONS`.

    Args:
      array: float32 or float64.
      precision: one of `PRECISIONS`.
      name: name of the array, for error messages.

    Raises:
      UserError: a value is too large for float16.
    """
    if precision == 'float16':
        largest = float(np.finfo(np.float16).max)
        if np.abs(array).max(initial=0, where=np.isfinite(array)) > largest:
            raise UserError(
                f'--precision=float16: {name} has values above {largest:g}; use '
                'bfloat16 or float32'
            )
        return array.astype(np.float16)
    if precision == 'bfloat16':
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    return array
