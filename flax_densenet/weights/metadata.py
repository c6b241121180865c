"""Checks the metadata of a checkpoint before any of it is used.

The JSON of a checkpoint or of one of our safetensors files may come from a stranger, or
from a failing disk. Everything that the program relies on is checked here, once, except
the model's fields, which `factory.create_model` checks.
"""

import math
from typing import Any

from flax_densenet import settings
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import bands, images
from flax_densenet.errors import UserError
from flax_densenet.models import tta
from flax_densenet.settings import sizes

MOST_CLASSES = 10**6


def load(workdir: str, step: checkpoint_reader.Checkpoint) -> dict[str, Any]:
    """Loads the metadata of a checkpoint, which `prepare.make_metadata` creates.

    Raises:
      UserError: the metadata cannot be read, or this program did not write it.
    """
    metadata = checkpoint_reader.load_json(workdir, step, 'metadata')
    place = f'the checkpoint {step} of {workdir}'
    return check(place, metadata)


def check(place: str, metadata: Any, *, named: bool = True) -> dict[str, Any]:
    """Returns `metadata` if it has everything that the program needs.

    Metadata from earlier versions gets the grouping of images that they used.

    Args:
      place: where the metadata comes from, for error messages.
      metadata: any value read from JSON.
      named: whether `class_names` are required. They can be null in exports of imported
        weights.

    Raises:
      UserError: a field is missing or has an invalid value.
    """
    _check_parts(place, '', {'': metadata}, {'': _is_object})
    parts = dict(_PARTS)
    if not named and metadata.get('class_names', 0) is None:
        del parts['class_names']
    _check_parts(place, '', metadata, parts)
    if metadata.get('operating_points') is not None:
        _check_parts(place, '', metadata, {'operating_points': _are_points})
    # Fields without a value are null or absent.
    known = {k: v for k, v in metadata['data'].items() if v is not None}
    if 'images' in metadata:  # older versions did not count them
        _check_parts(place, '', metadata, {'images': _are_counts})
    _check_parts(place, 'data.', known, {k: _DATA[k] for k in _DATA if k in known})
    for fields in (metadata, {**metadata, **known}):
        if len(fields['mean']) != len(fields['std']):
            raise UserError(f'{place}: its mean and std differ in length')
    data = settings.with_former_split(metadata['data'])
    return metadata if data is metadata['data'] else metadata | {'data': data}


def _check_parts(place, prefix, fields, wanted):
    for name, is_good in wanted.items():
        if not is_good(fields.get(name)):
            value = 'missing' if name not in fields else repr(fields[name])[:60]
            raise UserError(
                f'{place}: its metadata is not that of a trained model '
                f'({prefix}{name or "all of it"} is {value}); use an intact copy'
            )


def _is_object(value):
    return isinstance(value, dict)


def _is_model(value):
    return _is_object(value) and isinstance(value.get('variant'), str)


def _are_names(value):
    return (
        isinstance(value, list)
        and 0 < len(value) <= MOST_CLASSES
        and all(isinstance(name, str) for name in value)
    )


def _is_size(value):
    try:
        sizes.check(sizes.parse(value))
    except UserError:
        return False
    return type(value) is not str


def _are_numbers(value):
    return (
        isinstance(value, list)
        and 1 <= len(value) <= bands.MOST
        and all(type(n) in (int, float) and math.isfinite(n) for n in value)
    )


def _are_counts(value):
    if not _is_object(value):
        return False
    names = ('train', 'val', 'test') if 'val' in value else ('train', 'test')
    return all(type(value.get(name)) is int and value[name] >= 0 for name in names)


def _is_window(value):
    """Two ascending numbers, or none."""
    return value == [] or (
        isinstance(value, list)
        and len(value) == 2
        and all(type(n) in (int, float) and abs(n) < 1e300 for n in value)
        and value[0] < value[1]
    )


def _is_bit_depth(value):
    """From 8 to 16; 0 in configs means that it is determined from the images."""
    return type(value) is int and (value == 0 or 8 <= value <= 16)


def _are_points(value):
    return isinstance(value, list) and all(
        point is None or (type(point) is float and 0 < point < 1) for point in value
    )


def _is_share(value):
    return type(value) in (int, float) and 0.01 <= value <= 1


_PARTS = {
    'model': _is_model,
    'class_names': _are_names,
    'image_size': _is_size,
    'mean': _are_numbers,
    'std': _are_numbers,
    'data': _is_object,
}
_DATA = {
    'resize': lambda value: value in images.RESIZES,
    'interpolation': lambda value: (
        isinstance(value, str) and value in images.INTERPOLATIONS
    ),
    'crop_fraction': _is_share,
    'tta': lambda value: isinstance(value, str) and value in tta.VIEWS,
    'mean': _are_numbers,
    'std': _are_numbers,
    'window': _is_window,
    'bit_depth': _is_bit_depth,
}
