"""Calls that do not fit a C++ kernel end in an error instead of a wrong result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.blocks import require_native

KEYS = jnp.zeros(2, jnp.uint32)
RATE = np.float32(0.5)


def call(arguments, result='uint8', results=1, **attributes):
    types = (jax.ShapeDtypeStruct((4,), result),) * results
    # Without the side effect, XLA would drop a call that has no results.
    function = jax.ffi.ffi_call(
        'flax_densenet_DropoutKeep', types, has_side_effect=True
    )
    return jax.jit(lambda: function(*arguments, **attributes))()


@pytest.mark.parametrize(
    ('arguments', 'fields', 'message'),
    [
        ([KEYS], dict(rate=RATE), 'too few arguments'),
        ([KEYS] * 3, dict(rate=RATE), 'too many arguments'),
        ([KEYS, jnp.zeros(2)], dict(rate=RATE), 'an argument of another type'),
        ([KEYS] * 2, dict(rate=RATE, results=0), 'too few results'),
        ([KEYS] * 2, dict(rate=RATE, results=2), 'too many results'),
        ([KEYS] * 2, dict(rate=RATE, result='float32'), 'a result of another type'),
        ([KEYS] * 2, {}, 'too few attributes'),
        ([KEYS] * 2, dict(rate=RATE, size=np.int64(1)), 'unknown attributes'),
        ([KEYS] * 2, dict(rate=np.int64(1)), 'an attribute of another type'),
    ],
)
def test_calls_that_do_not_fit(arguments, fields, message):
    require_native()
    assert call([KEYS, KEYS], rate=RATE)[0].shape == (4,)
    with pytest.raises(Exception, match=f'a CPU kernel was called with {message}'):
        jax.block_until_ready(call(arguments, **fields))
