"""timm's names of networks."""

import json

import pytest

from flax_densenet import create_model
from flax_densenet.export import formats
from flax_densenet.weights import timm_network, weight_file
from helpers.weight_files import (
    tiny,
    trained_of,
)


@pytest.mark.parametrize(
    ('variant', 'fields', 'expected'),
    [
        ('densenet169', {}, ('densenet169', {})),
        ('densenetblur121d', {}, ('densenetblur121d', {})),
        ('densenet264d', {}, ('densenet264d', {})),
        ('densenet121', {'block_sizes': (6, 12, 64, 48)},
         ('densenet121', {'block_config': [6, 12, 64, 48]})),
        ('rdnet_base', {}, ('rdnet_base', {})),
        ('rdnet_tiny', {'layer_scale': 0.0}, ('rdnet_tiny', {'ls_init_value': 0.0})),
        ('BC-L100k12', {}, None),
        ('densenet121', {'compression': 0.7}, None),
        ('densenet121', {'stem_features': 32}, None),
        ('densenet121', {'bottleneck': 0}, None),
        ('densenet121', {'blur_pool': True}, None),
        ('densenet121', {'padding': 'same'}, None),
    ],
)  # fmt: skip
def test_names_in_timm(variant, fields, expected):
    module = create_model(variant, num_classes=2, **fields)
    assert timm_network.find(module) == expected
    if expected:
        more = timm_network.find(module, channels=1)
        assert more == (expected[0], expected[1] | {'in_chans': 1})


def test_a_network_that_timm_lacks(tmp_path):
    """timm does not take it for one of its own, whose arrays have the same shapes."""
    module, variables = tiny(blur_pool=True)
    trained = trained_of(module, variables)
    trained.metadata['model']['blur_pool'] = True
    formats.save(str(tmp_path / 'hub'), trained, 'huggingface')
    config = json.loads((tmp_path / 'hub' / 'config.json').read_text())
    assert config['architecture'] == 'flax_densenet/densenet121'
    assert weight_file.load(str(tmp_path / 'hub')).module.blur_pool
