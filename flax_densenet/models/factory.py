"""Creates networks by name: `create_model`, and the table of published variants.

Variables have the same names as in torchvision (`denseblock1/denselayer1/norm1`, ...),
so that published weights map onto them by a single rule.

>>> from flax_densenet import create_model, init_variables
>>> import jax
>>> import jax.numpy as jnp
>>> model = create_model('BC-L100k12', num_classes=10, block_sizes=(2, 2, 2))
>>> variables = init_variables(model, seed=0)
>>> jax.jit(model.apply)(variables, jnp.zeros((1, 32, 32, 3))).shape
(1, 10)
"""

import dataclasses
import numbers
import re
from collections.abc import Sequence
from typing import Any

import jax

from flax_densenet import settings
from flax_densenet.errors import UserError
from flax_densenet.models import densenet, network, rdnet
from flax_densenet.models import layers as layers_lib

# Table 1 of the paper. The fifth ImageNet model of the paper is 264 (figure 3);
# torchvision has no weights for it.
_IMAGENET = {
    'densenet121': dict(growth_rate=32, block_sizes=(6, 12, 24, 16)),
    'densenet161': dict(growth_rate=48, block_sizes=(6, 12, 36, 24), stem_features=96),
    'densenet169': dict(growth_rate=32, block_sizes=(6, 12, 32, 32)),
    'densenet201': dict(growth_rate=32, block_sizes=(6, 12, 48, 32)),
    'densenet264': dict(growth_rate=32, block_sizes=(6, 12, 64, 48)),
    # Variants of timm, with a stem of three 3x3 convolutions.
    'densenetblur121d': dict(
        growth_rate=32, block_sizes=(6, 12, 24, 16), stem='deep', blur_pool=True
    ),
    'densenet264d': dict(
        growth_rate=48, block_sizes=(6, 12, 64, 48), stem='deep', stem_features=96
    ),
}
_CIFAR_NAME = re.compile(r'(?:(BC|B|C)-)?L(\d{1,9})k(\d{1,9})')


def cifar_fields(name: str) -> dict[str, Any] | None:
    """Fields of a DenseNet for small images, named by depth and growth rate.

    See section 4 of the paper.

    Args:
      name: `L40k12` (plain), `B-L100k12` (bottleneck), `C-L40k12` (compression) or
        `BC-L100k12` (both). The depth L includes the stem, the transitions and the
        classifier, so L - 4 is a multiple of 3, or of 6 with a bottleneck.

    Returns:
      Fields of `DenseNet`, or None if the name does not have this form.

    Raises:
      UserError: no network of three equal blocks has this depth.
    """
    match = _CIFAR_NAME.fullmatch(name)
    if match is None:
        return None
    kind, depth, growth_rate = match[1] or '', int(match[2]), int(match[3])
    convolutions = 6 if 'B' in kind else 3
    size, rest = divmod(depth - 4, convolutions)
    if rest or size < 1 or growth_rate < 1:
        lower = depth - rest if size >= 1 else 4 + convolutions
        raise UserError(
            f'model.variant={name}: depth {depth} is not 4 + {convolutions} x layers '
            f'per block; use L{lower} or L{lower + convolutions} with a growth rate '
            'of at least 1'
        )
    return dict(
        growth_rate=growth_rate,
        block_sizes=(size,) * 3,
        bottleneck=4 if 'B' in kind else 0,
        compression=0.5 if 'C' in kind else 1.0,
        stem='cifar',
        stem_features=2 * growth_rate if kind == 'BC' else 16,
    )


_CIFAR = ('L40k12', 'L100k12', 'L100k24', 'BC-L100k12', 'BC-L250k24', 'BC-L190k40')
VARIANTS = _IMAGENET | {name: cifar_fields(name) for name in _CIFAR} | rdnet.VARIANTS

NETWORKS = (densenet.DenseNet, rdnet.RDNet)
INITIALIZERS = layers_lib.INITIALIZERS
DTYPES = ('float32', 'bfloat16', 'float16', 'float64')
# Larger networks are a mistake or an attack: they would take all memory, and hours.
# DenseNet-264 has 130 layers and 33 million parameters.
MOST_LAYERS = 500
MOST_PARAMETERS = 2**31
_KINDS = {
    'int': (numbers.Integral, 'a whole number'),
    'float': (numbers.Real, 'a number'),
    'str': (str, 'a name'),
    'bool': (bool, 'True or False'),
    'Sequence[int]': (Sequence, 'whole numbers in brackets, such as (6, 12, 24, 16)'),
}


def create_model(variant: str, *, num_classes: int, **fields: Any) -> network.Network:
    """Creates a DenseNet (arXiv 1608.06993) or an RDNet (arXiv 2403.19588) by name.

    Args:
      variant: a name from `list_models`, or any `L<depth>k<growth rate>`, optionally
        with the prefix `B-`, `C-` or `BC-` (see `cifar_fields`).
      num_classes: width of the classifier. With 0 there is no classifier, and the
        outputs are the pooled features.
      **fields: fields of `DenseNet` or `RDNet` to override; None keeps the value of the
        variant.

    Returns:
      A Flax Linen module. With `variables` from `init_variables` or trained weights,
      `model.apply(variables, images)` maps normalized float images `[N, H, W, C]` to
      float32 logits `[N, num_classes]`. In training, `model.apply(variables, images,
      train=True, mutable=['batch_stats'])` also returns the updated batch norm
      statistics.

    Raises:
      UserError: the variant or a field is unknown, or a value is invalid.
    """
    kind, defaults = _find_variant(variant)
    chosen = _choose_fields(kind, variant, fields)
    model = kind(num_classes=num_classes, **(defaults | chosen))
    _check_fields(model)
    return model


def from_settings(
    model: settings.ModelSettings, *, num_classes: int
) -> network.Network:
    """Calls `create_model` with the fields of the settings."""
    return create_model(num_classes=num_classes, **vars(model))


def _find_variant(variant):
    """The class of a variant and its fields."""
    if not isinstance(variant, str):
        raise UserError(f'model.variant={variant!r} must be a name like densenet121')
    if variant in rdnet.VARIANTS:
        return rdnet.RDNet, rdnet.VARIANTS[variant]
    defaults = VARIANTS.get(variant) or cifar_fields(variant)
    if defaults is None:
        base = variant.partition('.')[0].removeprefix('tv_')
        if base != variant and base in VARIANTS:
            raise UserError(
                f'model.variant={variant} names weights; use model.variant={base}, '
                'with --config.init_from=FILE for weights'
            )
        raise UserError(
            f'model.variant={variant} is not known; use one of {", ".join(VARIANTS)}, '
            'or [B-|C-|BC-]L<depth>k<growth rate>'
        )
    return densenet.DenseNet, defaults


def field_defaults(kind) -> dict[str, Any]:
    """`{field: default}` of `DenseNet` or `RDNet`; None for a required field."""
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(kind)
        if field.name not in ('parent', 'name')
    }


def _choose_fields(kind, variant, fields):
    """The values that were set in `fields`, which must all be fields of `kind`.

    A config has the fields of all networks. A field of another network is ignored if
    it has its default value.
    """
    known, chosen = field_defaults(kind), {}
    others = {k: v for one in NETWORKS for k, v in field_defaults(one).items()}
    for name, value in fields.items():
        if name in known:
            if value is not None:
                chosen[name] = value
        elif name not in others:
            raise UserError(
                f'model.{name} is not a field of the model; it has '
                f'{", ".join(sorted(known))}'
            )
        elif value is not None and value != others[name]:
            raise UserError(
                f'model.{name}={value}: {variant} has no such field; leave it out '
                f'(it has {", ".join(sorted(known))})'
            )
    return chosen


def _check_kinds(model):
    """Raises if the value of a field does not have the declared type."""
    for field in dataclasses.fields(model):
        if field.name in ('parent', 'name'):
            continue
        kind = getattr(field.type, '__name__', None) or str(field.type)
        kind = 'Sequence[int]' if 'Sequence' in str(field.type) else kind
        kind, meaning = _KINDS[kind]
        value = getattr(model, field.name)
        # Otherwise True would pass as 1, and a string as a sequence.
        if (
            not isinstance(value, kind)
            or (kind is not bool and isinstance(value, bool))
            or (kind is Sequence and isinstance(value, str))
        ):
            raise UserError(f'model.{field.name}={value!r} must be {meaning}')


def _check_size(model):
    """Raises for a network of absurd size, before anything is allocated."""
    layers = sum(model.block_sizes)
    if layers > MOST_LAYERS:
        raise UserError(
            f'model.block_sizes={tuple(model.block_sizes)}: {layers} dense layers are '
            f'more than {MOST_LAYERS}'
        )
    for name in ('growth_rate', 'stem_features', 'bottleneck', 'num_classes'):
        if model.fields().get(name, 0) > MOST_PARAMETERS:
            raise UserError(f'model.{name} is above {MOST_PARAMETERS:.3g} parameters')
    count = model.count_parameters()
    if count > MOST_PARAMETERS:
        growth = model.growth_field
        raise UserError(
            f'this model would have {count:.3g} parameters, more than '
            f'{MOST_PARAMETERS:.3g}: lower model.{growth}={getattr(model, growth)}, '
            f'model.stem_features={model.stem_features}, '
            f'model.bottleneck={model.bottleneck} or the number of classes, '
            f'{model.num_classes}'
        )


def _check_fields(model):
    _check_kinds(model)
    network.check_choices(
        model, dtype=DTYPES, initializer=tuple(INITIALIZERS), remat=('none', 'block')
    )
    if model.dtype == 'float64' and not jax.config.jax_enable_x64:
        raise UserError(
            'model.dtype=float64 needs double precision in JAX: set JAX_ENABLE_X64=1'
        )
    blocks = model.block_sizes
    if not blocks or not all(type(n) is int and n > 0 for n in blocks):
        raise UserError(
            f'model.block_sizes={blocks} must be integers above 0, '
            'one for each dense block, such as (6, 12, 24, 16)'
        )
    network.check_ranges(
        model,
        num_classes=(model.num_classes >= 0, 'at least 0'),
        stem_features=(model.stem_features >= 1, 'at least 1'),
        compression=(0 < model.compression <= 1, 'above 0, and at most 1'),
        dropout_rate=(0 <= model.dropout_rate < 1, 'at least 0, and below 1'),
        drop_path_rate=(0 <= model.drop_path_rate < 1, 'at least 0, and below 1'),
        epsilon=(0 < model.epsilon <= 1, 'above 0, and at most 1'),
    )
    model.check_fields()
    _check_size(model)
