"""Names of RDNet's weights in timm, and files of them."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.weights import rdnet_names, torch_content, weight_file
from helpers.rdnets import shaken, tiny


def test_names_there_and_back():
    """Every array has a name of timm's, which leads back to it."""
    module = tiny(squeeze_blocks=(1,), block_sizes=(1, 2))
    variables = shaken(module)
    arrays = rdnet_names.torch_arrays(
        module, traverse_util.flatten_dict(variables, sep='/')
    )
    assert arrays['dense_stages.1.2.dense_block1.layers.layers.2.weight'].shape == (
        64, 16, 1, 1,
    )  # fmt: skip
    assert arrays['dense_stages.0.0.dense_block0.layers.layers.5.fc.bias'].shape == (8,)
    assert arrays['dense_stages.1.1.weight'].shape == (8, 16, 2, 2)
    found = weight_file._from_torch(
        'x', torch_content.find('x', {'m.' + k: v for k, v in arrays.items()})
    )
    assert found.family == 'rdnet' and found.module == module.clone(layer_scale=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
    with pytest.raises(UserError, match=r"epsilon=0.001: timm's RDNet has 1e-06"):
        rdnet_names.torch_arrays(module.clone(epsilon=1e-3), {})


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'head.norm.bias': None}, '1 missing: head.norm.bias'),
        ({'extra.weight': np.zeros((1, 2))}, '1 unexpected: extra.weight'),
        (
            {'stem.1.bias': np.zeros(9)},
            r'of another shape: stem.1.bias \[9\], not \[8\]',
        ),
        (
            {'dense_stages.1.1.weight': None},
            'an incomplete RDNet: dense_stages.1.1.weight is missing',
        ),
        (
            {'dense_stages.900.2.dense_block900.gamma': np.zeros(8)},
            'holds an incomplete RDNet: blocks of',
        ),
        (
            {'dense_stages.0.0.dense_block900.gamma': np.zeros(8)},
            r'holds an incomplete RDNet: blocks of \[901, 1\] layers',
        ),
        (
            {'dense_stages.0.0.dense_block0.layers.layers.4.weight': np.zeros(8)},
            'an incomplete RDNet: .*layers.4.weight is missing',
        ),
        (
            {'stem.0.weight': np.zeros((8, 3, 0, 0))},
            'an incomplete RDNet: stem.0.weight',
        ),
        (
            {'head.fc.weight': np.zeros((0, 24, 1))},
            'unexpected: head.fc.bias, head.fc.weight',
        ),
    ],
)
def test_files_that_are_not_whole(change, message):
    module = tiny()
    arrays = rdnet_names.torch_arrays(
        module, traverse_util.flatten_dict(init_variables(module, 0), sep='/')
    )
    arrays = {k: v for k, v in (arrays | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        weight_file._from_torch('x', torch_content.find('x', arrays))


@pytest.mark.parametrize(
    ('name', 'base'),
    [
        ('rdnet_large.nv_in1k_ft_in1k_384', 'rdnet_large'),
        ('tv_densenet121', 'densenet121'),
        ('densenetblur121d.ra_in1k', 'densenetblur121d'),
    ],
)
def test_names_of_weights(name, base):
    with pytest.raises(
        UserError, match=f'{name} names weights; use model.variant={base}'
    ):
        create_model(name, num_classes=2)
