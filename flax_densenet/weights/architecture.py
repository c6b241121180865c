"""Derives the architecture of a network from the shapes of its arrays."""

import re
from typing import Any

from flax_densenet.errors import UserError, list_first
from flax_densenet.models import factory
from flax_densenet.weights import rdnet_names

# All fields of networks that the shapes of the arrays determine.
FIELDS = tuple(
    dict.fromkeys(
        name for kind in factory.NETWORKS for name in kind.architecture_fields
    )
)


def find_fields(path, arrays):
    """The variant and `FIELDS` of a network, from the shapes of its arrays.

    Args:
      path: the file, for error messages.
      arrays: `{our name: array}`, such as `params/conv0/kernel`.

    Raises:
      UserError: the arrays are not a DenseNet or an RDNet.
    """
    if rdnet_names.is_rdnet(arrays):
        fields = rdnet_names.find_fields(path, arrays)
        # It is not in `FIELDS`, because training changes its value.
        scaled = 'params/denseblock1/denselayer1/gamma' in arrays
        others = {} if scaled else {'layer_scale': 0.0}
        return _name_variant(fields, 'rdnet_tiny') | others
    sizes = {}
    for name in arrays:
        if match := re.match(r'params/denseblock(\d+)/denselayer(\d+)/', name):
            block, layer = map(int, match.groups())
            sizes[block] = max(sizes.get(block, 0), layer)
    first = arrays.get('params/conv0/kernel')
    last = arrays.get('params/conv2/kernel', first)  # only in a deep stem
    layer = 'params/denseblock1/denselayer1/'
    inner = arrays.get(layer + 'conv1/kernel')
    outer = arrays.get(layer + 'conv2/kernel', inner)
    blocks = tuple(sizes.get(number, 0) for number in range(1, len(sizes) + 1))
    known = [first, last, inner, outer]
    # At least two arrays per layer; otherwise one name could claim a million layers.
    is_complete = all(blocks) and 2 * sum(blocks) <= len(arrays)
    if any(a is None or a.ndim != 4 or not a.size for a in known) or not is_complete:
        names = sorted(arrays)
        raise UserError(
            f'{path} holds no DenseNet: it has {len(names)} arrays, such as '
            f'{list_first(names, 3)}'
        )
    growth = outer.shape[3]
    fields = dict(
        growth_rate=growth,
        block_sizes=blocks,
        bottleneck=0 if outer is inner else inner.shape[3] // growth,
        compression=_find_compression(arrays, blocks, last.shape[3], growth),
        stem='imagenet' if first.shape[0] == 7 else 'cifar',
        stem_features=last.shape[3],
    )
    # No array shows whether pooling blurs. timm's variant with this shape does.
    if last is not first:
        fields['stem'] = 'deep'
    return _name_variant(fields, 'densenet121')


def _name_variant(fields, otherwise):
    """The variant with exactly these fields, or `otherwise` with these fields."""
    for variant in factory.VARIANTS:
        if of_variant(variant) == fields:
            return {'variant': variant}
    return {'variant': otherwise} | fields


def differing(
    path: str, arrays: dict[str, Any], fields: dict[str, Any]
) -> dict[str, Any]:
    """Those of `fields` that the variant of the arrays does not have anyway."""
    if not fields:
        return {}
    variant = find_fields(path, arrays)['variant']
    own = factory.create_model(variant, num_classes=1)
    return {k: value for k, value in fields.items() if getattr(own, k) != value}


def of_variant(variant: str, **overrides) -> dict[str, Any]:
    """The `FIELDS` of a variant, with `overrides` in place of its own values."""
    module = factory.create_model(variant, num_classes=1, **overrides)
    return module.architecture()


def _find_compression(arrays, blocks, channels, growth):
    """The share of channels that all transitions keep, a round number if possible."""
    pairs = []
    for number, size in enumerate(blocks[:-1], start=1):
        channels += size * growth
        kernel = arrays.get(f'params/transition{number}/conv/kernel')
        if kernel is None or kernel.ndim != 4:
            break
        pairs.append((channels, kernel.shape[3]))
        channels = kernel.shape[3]
    if not pairs:
        return 0.5
    exact = (pairs[0][1] + 0.5) / pairs[0][0]
    guesses = (0.5, 1.0, *(n / 20 for n in range(1, 20)), min(exact, 1.0))
    for guess in guesses:
        if all(int(before * guess) == after for before, after in pairs):
            return guess
    return 0.5
