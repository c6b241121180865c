"""First values of variables."""

import jax
import jax.numpy as jnp

from flax_densenet import create_model, init_variables


def test_fields_may_be_lists():
    """As JSON has them; the shapes are the same."""
    lists, tuples = (
        create_model('densenet121', num_classes=2, growth_rate=4, block_sizes=sizes)
        for sizes in ([1, 1], (1, 1))
    )
    made = jax.tree.map(jnp.shape, init_variables(lists, 0))
    assert made == jax.tree.map(jnp.shape, init_variables(tuples, 0))
