"""Small RDNets."""

import jax
import numpy as np

from flax_densenet import create_model, init_variables

TINY = dict(
    growth_rates=(8, 8),
    block_sizes=(1, 1),
    halvings=(1,),
    squeeze_blocks=(2,),
    stem_features=8,
    patch_size=2,
)


def tiny(**fields):
    fields = {'num_classes': 3, 'layer_scale': 0.5} | TINY | fields
    return create_model('rdnet_tiny', **fields)


def make_images(size=(9, 12), count=3, seed=1):
    return np.random.default_rng(seed).standard_normal((count, *size, 3)).astype('f4')


def shaken(module):
    """Variables without any 0 or 1."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (leaf + rng.uniform(0.1, 0.3, leaf.shape)).astype(leaf.dtype),
        init_variables(module, 0),
    )
