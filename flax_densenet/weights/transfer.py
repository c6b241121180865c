"""What imported weights mean for a run: its model, its images, its first variables.

A field that the config leaves open (None, 0) is taken from the weights, else from the
defaults here. Where the config and the weights both speak and disagree, the model's
architecture is an error that says both; of other fields the config's is taken, and a
line says so.
"""

from typing import Any

import numpy as np
from flax import traverse_util

from flax_densenet.errors import UserError, list_first, printable
from flax_densenet.weights import architecture, weight_file
from flax_densenet.weights import channels as channels_lib

_VARIANT = 'densenet121'
_PREPROCESSING = dict(
    image_size=0,
    resize='stretch',
    crop_fraction=1.0,
    interpolation='bilinear',
    channels=3,
    mean=weight_file.IMAGENET_MEAN,
    std=weight_file.IMAGENET_STD,
)


def _is_open(name, value):
    return value is None or (name in ('image_size', 'channels') and value == 0)


def resolve_from_checkpoint(
    fields: dict[str, Any], saved: dict[str, Any]
) -> dict[str, Any]:
    """Fields with those that are open as they were saved with a run."""
    saved = weight_file.to_tuples(saved)
    return {
        name: saved.get(name, value) if _is_open(name, value) else value
        for name, value in fields.items()
    }


def resolve_model(
    fields: dict[str, Any], weights: weight_file.Weights | None
) -> dict[str, Any]:
    """The model's fields, those that are open filled in.

    Raises:
      UserError: the config's architecture is not the weights'.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if weights is None:
        return {**fields, 'variant': given.get('variant', _VARIANT)}
    theirs = architecture.of_variant(**_architecture_fields(weights.fields))
    ours = {k: v for k, v in given.items() if k in architecture.FIELDS}
    if 'variant' in given:
        ours = architecture.of_variant(given['variant'], **ours)
    if strange := [name for name in ours if name not in theirs]:  # DenseNet and RDNet
        wrong = 'variant' if 'variant' in given else strange[0]
        raise UserError(
            f'init_from={weights.path} holds a {weights.fields["variant"]}; the config '
            f'says model.{wrong}={_plain(given[wrong])}: leave it out, or use other '
            'weights'
        )
    different = {k: v for k, v in ours.items() if _plain(v) != _plain(theirs[k])}
    if different:
        says = ', '.join(f'{k}={_plain(theirs[k])}' for k in different)
        config = ', '.join(f'{k}={_plain(v)}' for k, v in different.items())
        wrong = [name for name in different if name in given] or ['variant']
        wrong = ' and '.join(f'model.{name}' for name in wrong)
        raise UserError(
            f'init_from={weights.path} holds a {weights.fields["variant"]} with '
            f'{says}; the config says {config}: leave {wrong} out, or use other weights'
        )
    found = dict(weights.fields)
    for name in ('epsilon', 'padding'):
        if name in found and given.get(name, found[name]) != found[name]:
            _print_choice(weights, f'model.{name}', given[name], found[name])
    return fields | found | {k: v for k, v in given.items() if k != 'variant'}


def _architecture_fields(fields):
    names = ('variant', *architecture.FIELDS)
    return {name: fields[name] for name in names if name in fields}


def _plain(value):
    return tuple(value) if isinstance(value, list | tuple) else value


def resolve_data(
    fields: dict[str, Any], weights: weight_file.Weights | None
) -> dict[str, Any]:
    """The fields of `config.data`, those about the images' preparation filled in."""
    wanted = _PREPROCESSING if weights is None else weights.preprocessing
    if fields['channels'] not in (0, 1, 3):
        raise UserError(f'data.channels={fields["channels"]} is not known; use 1, 3')
    if fields['channels']:
        wanted = channels_lib.with_channels(wanted, fields['channels'])
    settled = dict(fields)
    for name, value in wanted.items():
        if _is_open(name, settled[name]):
            settled[name] = value
        elif weights is not None and _plain(settled[name]) != _plain(value):
            _print_choice(weights, f'data.{name}', settled[name], value)
    return settled


def _print_choice(weights, name, ours, theirs):
    print(
        f'{weights.path}: made with {name}={_plain(theirs)}; the config says '
        f'{_plain(ours)}, which is taken',
        flush=True,
    )


def first_variables(
    weights: weight_file.Weights, fresh: dict[str, Any], class_names
) -> dict[str, Any]:
    """The weights' variables as the start of a run.

    Two things may differ, and a line says so: the head, which starts anew where the
    classes are others, and the number of channels of the images (see
    `channels_lib.convert_channels`).

    Args:
      fresh: newly drawn variables of the run's model, numpy arrays.
      class_names: of the run.

    Returns:
      `{'params', 'batch_stats'}` of numpy arrays.
    """
    flat = traverse_util.flatten_dict(weights.variables, sep='/')
    wanted = traverse_util.flatten_dict(fresh, sep='/')
    reason = _other_classes(weights, class_names)
    heads = [name for name in wanted if name.startswith('params/classifier/')]
    if reason:
        print(f'{weights.path}: {reason}: the classifier starts anew', flush=True)
        flat = {k: v for k, v in flat.items() if '/classifier/' not in k}
        flat |= {name: wanted[name] for name in heads}
    first = 'params/conv0/kernel'
    channels, old = wanted[first].shape[2], flat[first].shape[2]
    if channels != old:
        print(
            f'{weights.path}: made for images of {old} channel(s); its first '
            f'convolution is converted to {channels}',
            flush=True,
        )
        flat[first] = channels_lib.convert_channels(flat[first], channels)
    wrong = sorted(
        name
        for name in flat.keys() | wanted.keys()
        if np.shape(flat.get(name)) != np.shape(wanted.get(name))
        or (name in flat) != (name in wanted)
    )
    if wrong:
        raise UserError(
            f'init_from={weights.path}: {len(wrong)} arrays do not fit the model: '
            f'{list_first(wrong)}'
        )
    flat = {name: np.asarray(flat[name], wanted[name].dtype) for name in wanted}
    made = traverse_util.unflatten_dict(flat, sep='/')
    return {'batch_stats': {}} | made  # none without batch norm


def _other_classes(weights, class_names):
    """Why the head cannot be kept, or None."""
    count = len(class_names)
    if not weights.num_classes:
        return 'it has no classifier'
    if weights.num_classes != count:
        return f'{weights.num_classes} classes there, {count} here'
    if weights.class_names and tuple(weights.class_names) != tuple(class_names):
        names = list_first(weights.class_names, 3)
        return printable(f'other classes there ({names})')
    return None
