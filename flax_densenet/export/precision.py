"""Weights stored in 16 bits, to be computed with as float32.

Half of the file; what reads it makes float32 of them again, so it is as fast as before.
"""

import numpy as np

from flax_densenet.errors import UserError

PRECISIONS = ('float32', 'float16', 'bfloat16')


def convert(array: np.ndarray, precision: str, name: str) -> np.ndarray:
    """The array in another precision, one of PRECISIONS.

    Args:
      name: of the array, for the message.

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
