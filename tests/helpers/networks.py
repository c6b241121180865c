"""Networks compiled as single programs."""

import functools

import jax


def compiled(module, **options):
    """`module.apply` with some options, compiled as one program."""
    return jax.jit(functools.partial(module.apply, **options))
