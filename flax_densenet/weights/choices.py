"""Choices and assumptions for weights that do not describe themselves.

Class names, the choice between a softmax and sigmoids, and the preparation of images:
each comes from the user if given, otherwise from the file, otherwise from the number of
outputs if it is well known (`heads.find_known`). If all of these are silent, a default
is assumed. One line reports each assumption and the setting that changes it.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flax_densenet import settings
from flax_densenet.data import bands, deep, images
from flax_densenet.errors import UserError
from flax_densenet.models import layers
from flax_densenet.settings import sizes
from flax_densenet.system import arguments
from flax_densenet.weights import channels as channels_lib
from flax_densenet.weights import heads, weight_file

_LOGGER = logging.getLogger(__name__)
PREPARATION = (
    'image_size',
    'resize',
    'crop_fraction',
    'interpolation',
    'channels',
    'mean',
    'std',
)
# For images with more than 8 bits; nothing is assumed about them.
DEEP = ('window', 'bit_depth')
# A larger mean or std is for pixels from 0 to 255. Even torchxrayvision, whose range is
# -1024 to 1024, has a mean of 0.5 and a std of 1/2048 on the scale of 0 to 1.
_LARGEST = 2
_OF_NAMES = '--class_names=FILE or A,B,...'
_OF_OUTPUTS = '--outputs=sigmoid, softmax or none'


@dataclasses.dataclass(frozen=True)
class Choices:
    """The user's choices for weights.

    Attributes:
      class_names: in the order of the outputs. One output may have two names: negative
        and positive.
      outputs: one of `heads.OUTPUTS`.
      data: the fields of `config.data` named in PREPARATION and DEEP.
      binary: turn one output for two classes into two outputs with the same
        probabilities: the softmax of the two is the sigmoid of the one.
      own_data: also accept fields that resize images for models of this program.
      recipe: fields of a recipe, used if neither `data` nor the file sets them.
      raw: leave out what was fitted after training (`decisions`): calibration,
        thresholds and so on.
    """

    class_names: tuple[str, ...] | None = None
    outputs: str | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    binary: bool = True
    own_data: bool = False
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    raw: bool = False

    def __post_init__(self):
        if self.outputs not in (None, *heads.OUTPUTS):
            raise UserError(
                f'--outputs={self.outputs} is not known; use {", ".join(heads.OUTPUTS)}'
            )


NO_CHOICES = Choices()


def make(class_names=None, outputs=None, data=None, **options) -> Choices:
    """Checks the choices made in a call from Python.

    Args:
      class_names: names, or text that `heads.read_names` accepts.

    Raises:
      UserError: a name appears twice, a field is unknown, or a value is of another
        type.
    """
    if isinstance(class_names, str | os.PathLike):
        class_names = heads.read_names(os.fspath(class_names))
    elif class_names is not None:
        if not isinstance(class_names, Iterable):
            raise UserError(
                f'class_names={arguments.describe(class_names)} must be a list of '
                'names, or a file of names'
            )
        class_names = tuple(map(str, class_names))
        heads.check_names('class_names', class_names)
    return Choices(class_names, outputs, _convert(data), **options)


def _convert(data):
    """Fields of `data` with the types of the settings; checks names and types."""
    if data is not None and not isinstance(data, Mapping):
        raise UserError(
            f'data={arguments.describe(data)} must be a mapping such as '
            "{'image_size': 224}"
        )
    known = (*PREPARATION, *DEEP)
    for name in data or {}:
        if name not in known:
            raise UserError(f'data: {name} is not one of {", ".join(known)}')
    return {
        name: None if value is None else settings.convert(f'data.{name}', value)
        for name, value in (data or {}).items()
    }


class Notes(dict):
    """Lines about assumptions, by subject; `tell` logs each of them once."""

    def tell(self):
        """Logs the lines that have not been logged yet."""
        for name in list(self):
            _LOGGER.warning(self.pop(name))


@dataclasses.dataclass(frozen=True)
class Settled:
    """Weights with every open choice made.

    Attributes:
      weights: with the preparation of images and the chosen number of channels.
      class_names: None if neither the user nor the file names them.
      outputs: one of `heads.OUTPUTS`; None if a softmax is only assumed.
      known: the known head, if the number of outputs determined the names.
      notes: lines about what was assumed.
    """

    weights: weight_file.Weights
    class_names: tuple[str, ...] | None
    outputs: str | None
    known: heads.KnownHead | None
    notes: Notes


def settle(weights: weight_file.Weights, choices: Choices) -> Settled:
    """Resolves what weights from other programs leave open.

    Raises:
      UserError: a choice does not fit the weights, or the file prepares images in a way
        that cannot be read and neither data.mean nor data.std is given.
    """
    notes, path, count = Notes(), weights.path, weights.num_classes
    if choices.outputs == heads.SOFTMAX and count == 1:
        raise UserError(
            f'--outputs=softmax: {path} has one output, and the softmax of one output '
            'is always 1; use sigmoid'
        )
    names = choices.class_names or weights.class_names
    outputs: str | None = choices.outputs or weights.outputs
    known = None
    check_count(path, names, count)
    if names is None and count > 1:
        known = heads.find_known(count, channels=weights.preprocessing['channels'])
        names, line = _describe_names(path, count, known, outputs)
        notes['names'] = line
        outputs = outputs or (known.outputs if known else None)
    if outputs is None and count > 1:
        notes['outputs'] = (
            f'{path} does not say whether its classes exclude each other; a softmax '
            f'over its outputs is assumed; to change it: {_OF_OUTPUTS}'
        )
    if count == 1:
        outputs = outputs or heads.SIGMOID
        if names is None and outputs != heads.NONE:
            known = heads.KnownHead('', heads.BINARY, heads.SOFTMAX)
            names = heads.BINARY
            notes['names'] = (
                f'{path} has one output; its sigmoid is used as the probability of '
                f'{names[1]}, the rest for {names[0]}; to name both: '
                '--class_names=A,B; for another meaning: --outputs=none'
            )
    weights = prepare(weights, choices.data, notes, choices.recipe)
    if count == 1 and names and len(names) == 2:
        if outputs == heads.NONE:
            raise UserError(
                f'--outputs=none: {path} has one output, which needs one class name'
            )
        if choices.binary or known is None:
            weights, outputs = _split_output(weights), heads.SOFTMAX
        else:
            names = names[1:]
    return Settled(weights, names, outputs, known, notes)


def check_count(path: str, names, count: int):
    """Raises unless each output has a name; one output may have two."""
    if names is None or len(names) == count or (count == 1 and len(names) == 2):
        return
    raise UserError(
        f'--class_names: {len(names)} names, but {path} has {count} '
        f'output{"s" * (count > 1)}; give a name for each'
    )


def _describe_names(path, count, known, outputs):
    if known is None:
        return None, (
            f'{path} does not name its classes, so they are numbered from 0; to name '
            f'them: {_OF_NAMES}'
        )
    first = ', '.join(known.class_names[:3])
    each = 'a softmax' if known.outputs == heads.SOFTMAX else 'each with a sigmoid'
    assumption = f'{known.what} ({first}, ...)' + ('' if outputs else f', {each},')
    remedy = _OF_NAMES if outputs else f'{_OF_NAMES}; {_OF_OUTPUTS}'
    return known.class_names, (
        f'{path} does not name its {count} outputs; {assumption} are assumed; '
        f'to change it: {remedy}'
    )


def _split_output(weights):
    """The head with two outputs, -z/2 and z/2, in place of one output z.

    The softmax of -z/2 and z/2 is the sigmoid of z.
    """
    params = dict(weights.variables['params'])
    *others, last = layers.linear_layers(params['classifier'])
    half = {name: array / 2 for name, array in last.items()}
    both = {name: np.concatenate([-half[name], half[name]], -1) for name in half}
    named = {f'layer{n}': layer for n, layer in enumerate([*others, both], start=1)}
    params['classifier'] = named if others else both
    variables = weights.variables | {'params': params}
    return dataclasses.replace(weights, variables=variables, num_classes=2)


def prepare(
    weights: weight_file.Weights,
    chosen: Mapping[str, Any],
    notes: Notes,
    recipe: Mapping[str, Any] | None = None,
) -> weight_file.Weights:
    """Weights with the chosen preparation of images; a note lists assumptions.

    Args:
      recipe: fields to use if neither `chosen` nor the file has them.

    Raises:
      UserError: a field has a value that cannot be used.
    """
    chosen = _closed(chosen)
    more = {
        name: value
        for name, value in _closed(recipe or {}).items()
        if name not in chosen and name not in weights.prepared
    }
    if more:
        shown = ', '.join(f'data.{name}={_short(more[name])}' for name in more)
        notes['recipe'] = f'{weights.path}: {shown} of the recipe'
    chosen = {**more, **chosen}
    check_read(weights, chosen)
    settled = dict(weights.preprocessing)
    channels = chosen.get('channels') or settled['channels']
    if channels != settled['channels']:
        bands.check_count(channels)
        weights, old = _with_channels(weights, channels), settled['channels']
        line = channels_lib.describe_conversion(old, channels)
        notes['channels'] = f'{weights.path}: {line}'
        settled = channels_lib.with_channels(settled, channels)
    settled |= chosen
    _check(settled)
    check_scale({name: chosen.get(name) for name in ('mean', 'std')})
    check_crop(chosen, settled['resize'])
    weights.module.check_image_size(sizes.pair(settled['image_size']))
    size = settled['image_size']
    if weights.size_note and size != weights.preprocessing['image_size']:
        notes['size'] = f'{weights.path}: data.image_size={size}: {weights.size_note}'
    if told := describe_preparation(weights, chosen, settled):
        notes['preparation'] = told
    return dataclasses.replace(weights, preprocessing=settled)


def _closed(fields):
    """Fields that have a value; a 0 leaves a field open."""
    numbers = 'channels', 'image_size', 'bit_depth'
    found = {
        name: value
        for name, value in fields.items()
        if value is not None and (value or name not in numbers)
    }
    if 'image_size' in found:
        found['image_size'] = sizes.parse(found['image_size'])
    return found


def check_crop(chosen: Mapping[str, Any], resize: str):
    """Raises if a field is set that has no effect: `crop_fraction` without a crop."""
    share = chosen.get('crop_fraction')
    if share not in (None, 1) and resize != 'crop':
        raise UserError(
            f'data.crop_fraction={share} has no effect with data.resize={resize}; add '
            'data.resize=crop'
        )


def check_scale(chosen: Mapping[str, Any]):
    """Raises if a `mean` or `std` is for values from 0 to 255, not from 0 to 1.

    Args:
      chosen: both as the user or the recipe sets them; None if neither does.
    """
    for name, numbers in chosen.items():
        if not all(isinstance(n, int | float) for n in numbers or ()) or not all(
            map(math.isfinite, numbers or ())
        ):
            raise UserError(f'data.{name}={_short(numbers)} must be finite numbers')
        if max(map(abs, numbers or (0,))) > _LARGEST:
            scaled = _short(tuple(round(number / 255, 4) for number in numbers))
            raise UserError(
                f'data.{name}={_short(numbers)} is for pixels from 0 to 255, but they '
                f'are from 0 to 1 here; divide it by 255: data.{name}={scaled}'
            )


def check_read(weights: weight_file.Weights, chosen: Mapping[str, Any]):
    """Raises if the file prepares images in a way that could not be read.

    With the user's `mean` and `std`, a line says that only these are applied.
    """
    if weights.unread and chosen.get('mean') and chosen.get('std'):
        _LOGGER.warning(
            f'{weights.path}: {weights.unread} prepares images in a way that cannot be '
            'read; only data.mean and data.std are applied'
        )
    elif weights.unread:
        raise UserError(
            f'{weights.path}: {weights.unread} prepares images in a way that cannot be '
            'read; set data.mean and data.std to do the same for images from 0 to 1'
        )


def describe_preparation(
    weights: weight_file.Weights,
    chosen: Mapping[str, Any],
    settled: Mapping[str, Any],
) -> str | None:
    """The line about fields that neither the file nor the user sets, or None."""
    assumed = [
        name
        for name in PREPARATION
        if name not in chosen and name not in weights.prepared and name != 'channels'
    ]
    if not assumed:
        return None
    assumption = ', '.join(f'{name}={_short(settled[name])}' for name in assumed)
    family = weight_file.FAMILIES.get(weights.family, weights.family)
    return (
        f'{weights.path} does not say how images are prepared; as usual with {family}, '
        f'{assumption} are assumed; to change it: --config.data.{assumed[-1]}=... '
        'and so on'
    )


def _short(value):
    return f'{value}'.replace(' ', '')


def _with_channels(weights, channels):
    params = dict(weights.variables['params'])
    first = dict(params['conv0'])
    first['kernel'] = channels_lib.convert_channels(first['kernel'], channels)
    params['conv0'] = first
    return dataclasses.replace(
        weights, variables=weights.variables | {'params': params}
    )


def _check(fields):
    deep.check(fields.get('window'))
    deep.check_bit_depth(fields.get('bit_depth'))
    known = {'resize': images.RESIZES, 'interpolation': tuple(images.INTERPOLATIONS)}
    for name, values in known.items():
        if fields[name] not in values:
            raise UserError(
                f'data.{name}={fields[name]} is not known; use {", ".join(values)}'
            )
    bands.check_count(fields['channels'])
    sizes.check(fields['image_size'])
    if not 0 < fields['crop_fraction'] <= 1:
        raise UserError(
            f'data.crop_fraction={fields["crop_fraction"]} must be above 0 and '
            'at most 1'
        )
    for name in ('mean', 'std'):
        numbers = fields[name]
        if len(numbers) != fields['channels'] or not all(
            isinstance(number, int | float) for number in numbers
        ):
            raise UserError(
                f'data.{name}={_short(numbers)}: give a number for each of '
                f'{fields["channels"]} channels'
            )
    if min(fields['std']) <= 0:
        raise UserError(f'data.std={_short(fields["std"])} must be above 0')
