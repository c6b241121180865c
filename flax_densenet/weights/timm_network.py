"""Finds the name and the arguments of our networks in timm.

>>> from flax_densenet.models import factory
>>> from flax_densenet.weights import timm_network
>>> timm_network.find(factory.create_model('densenet161', num_classes=2))
('densenet161', {})
>>> timm_network.find(factory.create_model('densenet264', num_classes=2))
('densenet121', {'block_config': [6, 12, 64, 48]})
>>> timm_network.find(factory.create_model('BC-L100k12', num_classes=2)) is None
True
"""

from typing import Any

from flax_densenet.models import factory, network, rdnet

_DENSENETS = {
    ('imagenet', False): ('densenet121', 'densenet161', 'densenet169', 'densenet201'),
    ('deep', False): ('densenet264d',),
    ('deep', True): ('densenetblur121d',),
}


def find(module: network.Network, *, channels: int = 3):
    """The name and the arguments of a network in timm.

    Returns:
      `(architecture, model_args)`, or None if timm has no such network.
    """
    names, ours = _NAMES[module.family](module), arguments(module)
    if not names:
        return None

    def changed(name):
        own = arguments(factory.create_model(name, num_classes=1))
        return {key: value for key, value in ours.items() if value != own[key]}

    name = min(names, key=lambda name: len(changed(name)))
    more = {} if channels == 3 else {'in_chans': channels}
    return name, changed(name) | more


def _densenet_names(module):
    if (
        module.padding != 'torch'
        or not module.has_usual_head()
        or module.compression != 0.5
        or module.bottleneck < 1
        or module.stem_features != 2 * module.growth_rate
    ):
        return ()
    return _DENSENETS.get((module.stem, module.blur_pool), ())


def arguments(module: network.Network) -> dict[str, Any]:
    """The arguments of timm's class that determine the arrays of the network."""
    return _ARGUMENTS[module.family](module)


def _densenet_arguments(module):
    return {
        'growth_rate': module.growth_rate,
        'block_config': list(module.block_sizes),
        'bn_size': module.bottleneck,
        'stem_type': 'deep' if module.stem == 'deep' else '',
    }


def _rdnet_arguments(module):
    numbers = range(1, len(module.block_sizes) + 1)
    kinds = ('Block', 'BlockESE')
    return {
        'growth_rates': list(module.growth_rates),
        'num_blocks_list': list(module.block_sizes),
        'block_type': [kinds[n in module.squeeze_blocks] for n in numbers],
        # These describe the transition before each block.
        'is_downsample_block': [None, *(n in module.halvings for n in numbers[:-1])],
        'bottleneck_width_ratio': float(module.bottleneck),
        'transition_compression_ratio': float(module.compression),
        'ls_init_value': 1e-6 if module.layer_scale else 0.0,
        'patch_size': module.patch_size,
        'num_init_features': module.stem_features,
    }


# By `Network.family`: networks of timm that differ from a module only in `arguments`,
# and these arguments.
_NAMES = {'densenet': _densenet_names, 'rdnet': lambda module: tuple(rdnet.VARIANTS)}
_ARGUMENTS = {'densenet': _densenet_arguments, 'rdnet': _rdnet_arguments}
# By `Network.family`: timm's names of the first convolution and of the classifier.
FIRST_AND_LAST = {
    'densenet': ('features.conv0', 'classifier'),
    'rdnet': ('stem.0', 'head.fc'),
}
