"""Names of networks for people: `DenseNet-121, 7.98 M parameters`.

>>> from flax_densenet import create_model
>>> describe(create_model('densenet121', num_classes=1000), 'densenet121')
'DenseNet-121, 7.98 M parameters'
>>> fields = dict(growth_rate=16, block_sizes=(2, 4, 6, 4))
>>> small = create_model('densenet121', num_classes=2, **fields)
>>> describe(small, 'densenet121')
'DenseNet-BC (2, 4, 6, 4), growth 16, 0.28 M parameters'
"""

import re

from flax_densenet.models import factory, network


def describe(module: network.Network, variant: str | None, *, channels: int = 3) -> str:
    """The name of a network and its number of parameters.

    Args:
      module: the network.
      variant: as in `config.model.variant`; None if unknown.
      channels: number of image channels.
    """
    count = module.count_parameters(channels=channels)
    return f'{name(module, variant)}, {format_count(count)} parameters'


def name(module: network.Network, variant: str | None) -> str:
    """The published name if the network has one, else its structure."""
    if module.members > 1:
        return f'{module.members} × {name(module.member, variant)}'
    fields = module.fields()
    if variant and not _changes(module, variant):
        match = re.fullmatch(r'densenet(\d+)', variant)
        return f'DenseNet-{match[1]}' if match else variant
    blocks = ', '.join(map(str, module.block_sizes))
    if module.family != 'densenet':
        return f'{module.family.replace("rdnet", "RDNet")} ({blocks})'
    kind = 'B' * bool(fields['bottleneck']) + 'C' * (fields['compression'] < 1)
    return (
        f'DenseNet{"-" if kind else ""}{kind} ({blocks}), growth {module.growth_rate}'
    )


def _changes(module, variant):
    """Whether the module differs from the architecture of the variant."""
    usual = factory.create_model(variant, num_classes=module.num_classes)
    return usual.architecture() != module.architecture()


def format_count(count: int) -> str:
    """`7.98 M`, `0.28 M`, `8,500`."""
    if count >= 10_000:
        return f'{count / 1e6:.2f} M'
    return f'{count:,}'
