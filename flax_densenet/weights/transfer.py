"""Applies imported weights to a run: its model, its images, its initial variables.

A field that the config leaves open (None, 0) comes from the weights, else from the
defaults here. If the config and the weights disagree about the architecture, an error
names both. For other fields the config wins, and a line is printed.
"""

import dataclasses
import logging
from typing import Any

import numpy as np
from flax import traverse_util

from flax_densenet import settings as settings_lib
from flax_densenet.data import bands
from flax_densenet.errors import UserError, list_first, printable
from flax_densenet.weights import architecture, heads, weight_file
from flax_densenet.weights import channels as channels_lib
from flax_densenet.weights import choices as choices_lib

_VARIANT = 'densenet121'
_PREPARATION = dict(
    image_size=0,
    resize='stretch',
    crop_fraction=1.0,
    interpolation='bilinear',
    channels=3,
    mean=weight_file.IMAGENET_MEAN,
    std=weight_file.IMAGENET_STD,
)
_ZERO_IS_OPEN = ('image_size', 'channels', 'bit_depth')
_LOGGER = logging.getLogger(__name__)


def resolve(
    settings: settings_lib.Settings, weights: weight_file.Weights | None
) -> settings_lib.Settings:
    """The settings with the open fields of the model and the preparation filled in.

    Raises:
      UserError: see `resolve_model` and `resolve_preparation`.
    """
    return dataclasses.replace(
        settings,
        model=resolve_model(settings.model, weights),
        preparation=resolve_preparation(settings.preparation, weights),
    )


def resolve_from_checkpoint(
    settings: settings_lib.Settings, saved: settings_lib.Settings
) -> settings_lib.Settings:
    """The settings, with open fields filled in from a saved run."""
    data = settings.data
    if data.groups == 'auto':
        data = dataclasses.replace(data, groups=saved.data.groups)
    return dataclasses.replace(
        settings,
        data=data,
        model=_fill(settings.model, saved.model),
        preparation=_fill(settings.preparation, saved.preparation),
    )


def _fill(fields, saved):
    is_open = {k: v for k, v in vars(saved).items() if _is_open(k, getattr(fields, k))}
    return dataclasses.replace(fields, **is_open)


def _is_open(name, value):
    return value is None or (name in _ZERO_IS_OPEN and value == 0)


def settle(
    weights: weight_file.Weights, fields: dict[str, Any], class_names=None
) -> weight_file.Weights:
    """Completes weights to train from: class names and the preparation of images.

    A line reports an assumed preparation of images.

    Args:
      fields: fields of `PreparationSettings`.
      class_names: in the order of the outputs, or None.

    Raises:
      UserError: the number of names differs from the number of outputs, or the file
        prepares images in a way that cannot be read.
    """
    if class_names:
        choices_lib.check_count(weights.path, class_names, weights.num_classes)
        weights = dataclasses.replace(weights, class_names=tuple(class_names))
    if weights.is_own:
        return weights
    if weights.module.has_usual_head():  # other heads start new
        for line in weights.notes:
            _LOGGER.warning(line)
    names = choices_lib.PREPARATION
    chosen = {n: fields[n] for n in names if not _is_open(n, fields[n])}
    choices_lib.check_read(weights, chosen)
    settled = weights.preprocessing | chosen
    if told := choices_lib.describe_preparation(weights, chosen, settled):
        _LOGGER.warning(told)
    return weights


def resolve_model(
    model: settings_lib.ModelSettings, weights: weight_file.Weights | None
) -> settings_lib.ModelSettings:
    """The settings of the model, with open fields filled in.

    Raises:
      UserError: the config and the weights have different architectures.
    """
    given = {name: value for name, value in vars(model).items() if value is not None}
    if weights is None:
        return dataclasses.replace(model, variant=given.get('variant', _VARIANT))
    check_architecture(given, weights)
    others = weights.module.head_fields
    theirs = {k: v for k, v in weights.fields.items() if k not in others}
    for name in ('epsilon', 'padding'):
        if name in theirs and given.get(name, theirs[name]) != theirs[name]:
            _log_choice(weights, f'model.{name}', given[name], theirs[name])
    ours = {name: value for name, value in given.items() if name != 'variant'}
    return dataclasses.replace(model, **{**theirs, **ours})


def check_architecture(given, weights):
    """Raises `UserError` if the config describes another network than the weights."""
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


def _architecture_fields(fields):
    names = ('variant', *architecture.FIELDS)
    return {name: fields[name] for name in names if name in fields}


def _plain(value):
    return tuple(value) if isinstance(value, list | tuple) else value


def resolve_preparation(
    preparation: settings_lib.PreparationSettings,
    weights: weight_file.Weights | None,
) -> settings_lib.PreparationSettings:
    """The preparation of images, with open fields filled in.

    Raises:
      UserError: `data.channels` cannot be determined.
    """
    wanted: dict[str, Any] = _PREPARATION if weights is None else weights.preprocessing
    channels = preparation.channels
    if channels:
        bands.check_count(channels)
        wanted = channels_lib.with_channels(wanted, channels)
    if weights is None and bands.are_kept(wanted['channels']):
        _tell_assumed(preparation, wanted)
    filled: dict[str, Any] = {}
    for name, value in wanted.items():
        ours = getattr(preparation, name)
        if _is_open(name, ours):
            filled[name] = value
        elif weights is not None and _plain(ours) != _plain(value):
            _log_choice(weights, f'data.{name}', ours, value)
    settled = dataclasses.replace(preparation, **filled)
    if preparation.crop_fraction not in (None, 1) and settled.resize != 'crop':
        _LOGGER.warning(
            f'data.crop_fraction={preparation.crop_fraction} has no effect with '
            f'data.resize={settled.resize}; set data.resize=crop to use it'
        )
    return settled


def _tell_assumed(preparation, wanted):
    """Reports values assumed for channels that are neither gray nor color."""
    assumed = [name for name in ('mean', 'std') if getattr(preparation, name) is None]
    if assumed:
        shown = ' and '.join(f'data.{name}={wanted[name][0]:.3g}' for name in assumed)
        _LOGGER.warning(
            f'{shown} {"are" if len(assumed) > 1 else "is"} assumed for each of '
            f'{wanted["channels"]} channels, the average of ImageNet; to change '
            f'them: --config.{shown.partition("=")[0]}=... and so on'
        )


def _log_choice(weights, name, ours, theirs):
    _LOGGER.info(
        f'{weights.path}: made with {name}={_plain(theirs)}; the config says '
        f'{_plain(ours)}, which is used'
    )


def first_variables(
    weights: weight_file.Weights, fresh: dict[str, Any], class_names
) -> dict[str, Any]:
    """The variables of the weights as the start of a run.

    Two things may differ, and a line is printed for each: the head, which starts new if
    the classes differ, and the number of image channels (see
    `channels_lib.convert_channels`).

    Args:
      fresh: randomly initialized variables of the run's model, numpy arrays.
      class_names: class names of the run.

    Returns:
      `{'params', 'batch_stats'}` of numpy arrays.
    """
    weights = _pair(weights, tuple(class_names))
    flat = traverse_util.flatten_dict(weights.variables, sep='/')
    wanted = traverse_util.flatten_dict(fresh, sep='/')
    reason = _other_classes(weights, class_names)
    heads = [name for name in wanted if name.startswith('params/classifier/')]
    if reason:
        _LOGGER.info(f'{weights.path}: {reason}: the classifier starts new')
        flat = {k: v for k, v in flat.items() if '/classifier/' not in k}
        flat |= {name: wanted[name] for name in heads}
    first = 'params/conv0/kernel'
    channels, old = wanted[first].shape[2], flat[first].shape[2]
    if channels != old:
        flat[first] = channels_lib.convert_channels(flat[first], channels)
        _LOGGER.info(
            f'{weights.path}: {channels_lib.describe_conversion(old, channels)}'
        )
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


def _pair(weights, names):
    """The weights with outputs in the run's order, if the classes are the same.

    A line is printed if the weights do not name their classes.
    """
    count = weights.num_classes
    if weights.is_own or count != len(names) or count < 2:
        return weights
    if not weights.module.has_usual_head():
        return weights  # the head is not kept
    theirs = weights.class_names
    if theirs is None:
        channels = weights.preprocessing['channels']
        known = heads.find_known(count, channels=channels)
        theirs = known.spelled_as(names) if known else None
        if theirs:
            _LOGGER.warning(
                f'{weights.path} does not name its outputs; {known.what} are '
                'assumed; to change them: --class_names=FILE or A,B,...'
            )
    if theirs is None:
        _LOGGER.warning(heads.describe_order(weights.path, names))
        return weights
    if theirs == names or set(theirs) != set(names):
        return weights
    order = np.array([theirs.index(name) for name in names])
    params = dict(weights.variables['params'])
    params['classifier'] = {
        name: array[..., order] for name, array in params['classifier'].items()
    }
    return dataclasses.replace(
        weights, variables=weights.variables | {'params': params}, class_names=names
    )


def _other_classes(weights, class_names):
    """Why the head cannot be kept, or None."""
    count = len(class_names)
    if weights.head:
        return f'its head cannot be computed ({list_first(weights.head)})'
    if not weights.num_classes:
        return 'it has no classifier'
    if not weights.module.has_usual_head():
        return 'its head is not a single layer after mean pooling'
    if weights.num_classes != count:
        return f'it has {weights.num_classes} classes, not {count}'
    if weights.class_names and tuple(weights.class_names) != tuple(class_names):
        names = list_first(weights.class_names, 3)
        return printable(f'it has other classes ({names})')
    return None
