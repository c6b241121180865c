"""Settings from a config and back: the only place where fields are read by name.

A config is what `configs/base.py` makes, or a mapping of the same shape:
`{'init_from': ..., 'model': {...}, 'data': {...}, 'optimizer': {...}, 'train': {...},
'report': {...}}`.

>>> settings = from_config({'data': {'batch_size': 64}})
>>> settings.loader.batch_size, settings.train.epochs
(64, 40)
>>> to_config(settings)['data']['batch_size']
64
"""

import dataclasses
import difflib
import logging
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from flax_densenet.errors import UserError
from flax_densenet.settings import sizes
from flax_densenet.settings.fields import Settings

# Section of a config -> the groups of `Settings` that share its fields.
SECTIONS = {
    'model': ('model',),
    'data': ('data', 'preparation', 'augmentation', 'loader', 'evaluation'),
    'optimizer': ('optimizer', 'schedule'),
    'train': ('train', 'loss', 'decisions'),
    'report': ('report',),
}
# Earlier names of fields, which are still read.
RENAMED = {'data.colour_jitter': 'data.color_jitter'}
# Other words for values of fields.
_SYNONYMS = {
    ('data.blank_labels', 'ignore'): 'unknown',
    ('data.uncertain_labels', 'ignore'): 'unknown',
}

_LOGGER = logging.getLogger(__name__)
_GROUPS: dict[str, Any] = {
    field.name: field.type for field in dataclasses.fields(Settings)
}
# 'data.batch_size' -> the group and the type of the field.
_FIELDS = {
    f'{section}.{name}': (group, kind)
    for section, groups in SECTIONS.items()
    for group in groups
    for name, kind in typing.get_type_hints(_GROUPS[group]).items()
}
_KINDS = {
    bool: 'True or False',
    int: 'a whole number',
    float: 'a number',
    str: 'text',
    tuple: "values in brackets, as '(1,2)'",
}


def from_config(config: Settings | Mapping[str, Any] | Any) -> Settings:
    """Checks names and types of the fields of a config.

    Args:
      config: a ConfigDict or a mapping as above; what it leaves out has its default.
        `Settings` are returned as they are.

    Raises:
      UserError: a field has no such name, or a value is of another type.
    """
    if isinstance(config, Settings):
        return config
    if not hasattr(config, 'items'):
        shown = f'{config!r:.60}'
        raise UserError(
            f'config={shown} is not a config; give get_config(NAME), or a mapping such '
            "as {'data': {'source': 'folder:photos'}}"
        )
    given = dict(_flat(config))
    for old in RENAMED.keys() & given.keys():
        value, new = given.pop(old), current_name(old)
        # If a recipe sets the old name, the new one is there too, with its default.
        given[new] = given.get(new) or value
    return _from_fields(given, _raise_unknown)


def from_saved(saved: Mapping[str, Any]) -> Settings:
    """Settings that were saved with a run: `config.json`, or a checkpoint's metadata.

    Fields that are missing from the file get their defaults, which describe the
    behavior before the field existed. Unknown entries are left out.

    Raises:
      UserError: a value is of another type.
    """
    known = {name: saved[name] for name in ('init_from', *SECTIONS) if name in saved}
    return _from_fields(dict(_flat(with_current_names(known))), lambda name: None)


def convert(name: str, value: Any) -> Any:
    """A value for a field as its type has it: a tuple for a list or an array.

    >>> convert('data.mean', [0.5]), convert('data.channels', 1)
    ((0.5,), 1)

    Raises:
      UserError: the value is of another type.
    """
    return _convert(name, _plain(value), _FIELDS[name][1])


def to_config(settings: Settings) -> dict[str, Any]:
    """The nested dict that `from_config` accepts, sorted by name, of JSON values."""
    found: dict[str, Any] = {'init_from': settings.init_from}
    for section, groups in SECTIONS.items():
        fields: dict[str, Any] = {}
        for group in groups:
            fields |= vars(getattr(settings, group))
        found[section] = dict(sorted(fields.items()))
    return dict(sorted(found.items()))


def flatten(settings: Settings) -> dict[str, Any]:
    """`{'data.batch_size': 32, ...}`: every field by the name of its flag."""
    return dict(_flat(to_config(settings)))


def current_name(name: str) -> str:
    """The current name of a field; a former name is reported in a line."""
    if name not in RENAMED:
        return name
    _LOGGER.warning(
        f'warning: {name} is now called {RENAMED[name]}; the old name still works'
    )
    return RENAMED[name]


def with_current_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config with the fields under their current names."""
    found = dict(config)
    for old, new in RENAMED.items():
        section, _, name = old.partition('.')
        fields = found.get(section)
        if isinstance(fields, dict) and name in fields:
            value, now = fields[name], new.partition('.')[2]
            fields = {k: v for k, v in fields.items() if k != name}
            found[section] = fields | {now: fields.get(now) or value}
    if isinstance(found.get('data'), dict):
        found['data'] = with_former_split(found['data'])
    return found


def with_former_split(data: dict[str, Any]) -> dict[str, Any]:
    """Saved fields of `data`, with images grouped as when they were saved.

    Versions without `data.val_fraction` looked for groups only in tables and packs.
    """
    kind = str(data.get('source')).partition(':')[0]
    if 'val_fraction' in data or kind not in ('folder', 'tar', 'hf', 'parquet', 'tfds'):
        return data
    if data.get('labels') or data.get('groups', 'auto') != 'auto':
        return data
    return data | {'groups': 'none'}


def _flat(config):
    """Pairs of name and value; names are `section.name`, or `name` outside of
    sections."""
    for section, fields in config.items():
        if hasattr(fields, 'items'):
            yield from ((f'{section}.{name}', value) for name, value in fields.items())
        elif section in SECTIONS:
            raise UserError(f'{section}={fields!r} must be a section of fields')
        else:
            yield section, fields


def _from_fields(given: dict[str, Any], reject: Callable[[str], None]) -> Settings:
    groups: dict[str, dict[str, Any]] = {}
    top = {}
    for name, value in given.items():
        if name == 'init_from':
            top[name] = _convert(name, value, str)
        elif name in _FIELDS:
            group, kind = _FIELDS[name]
            field = name.partition('.')[2]
            value = _convert(name, value, kind)
            if kind is str:
                value = _SYNONYMS.get((name, value), value)
            groups.setdefault(group, {})[field] = value
        else:
            reject(name)
    return Settings(
        **top, **{group: _GROUPS[group](**fields) for group, fields in groups.items()}
    )


def _raise_unknown(name):
    known = ['init_from', *_FIELDS]
    close = [field for field in known if field.startswith(f'{name}_')]
    close = close or difflib.get_close_matches(name, known, 1)
    section = [field for field in known if field.startswith(name.split('.')[0] + '.')]
    shown = section or ['init_from', *(f'{name}.*' for name in SECTIONS)]
    raise UserError(
        f'{name} is not a field; '
        + (f'did you mean {close[0]}? The' if close else 'the')
        + f' fields are {", ".join(shown)}'
    )


def _convert(name, value, kind):
    """The value as its field's type has it: tuples for lists, floats for integers."""
    if kind == sizes.Size:
        return sizes.parse(value, name)
    if isinstance(kind, types.UnionType):  # with None
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    kind = typing.get_origin(kind) or kind
    if kind is tuple and isinstance(value, list | tuple):
        return _to_tuple(value)
    accepted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    # True would be a 1.
    if not isinstance(value, accepted) or (
        isinstance(value, bool) and kind is not bool
    ):
        raise UserError(f'{name}={value!r} must be {_KINDS[kind]}')
    return kind(value)


def _plain(value):
    """Arrays as lists, and numbers of numpy as Python's."""
    if hasattr(value, 'tolist'):
        return value.tolist()
    if isinstance(value, list | tuple):
        return type(value)(_plain(one) for one in value)
    return value


def _to_tuple(value):
    return tuple(_to_tuple(v) if isinstance(v, list | tuple) else v for v in value)
