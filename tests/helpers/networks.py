"""Networks as one program each."""

import functools

import jax


def compiled(module, **options):
    """`module.apply` with some options; by itself it compiles one operation by one."""
    return jax.jit(functools.partial(module.apply, **options))
