"""The plan of a sweep from its flags: settings and seeds, all checked."""

import itertools
import json
import math
from typing import Any

from flax_densenet import settings as settings_lib
from flax_densenet.errors import UserError
from flax_densenet.sweeps import space
from flax_densenet.train import prepare

# These settings do not affect results.
FREE = (
    *('data.threads', 'data.workers', 'data.cache', 'data.cache_limit_gib'),
    *('train.checkpoint_every', 'train.tensorboard', 'train.report'),
    *('train.unusual', 'train.unusual_share', 'train.unusual_images'),
    *('train.calibrate', 'train.threshold', 'train.positive_class'),
    *('model.fast', 'model.kernel', 'model.remat'),
)
_LEFT_OUT = 'which is left out; values can only be added'
_CHECKED = 200  # settings of a grid that are all prepared before the first is trained


def join(fields: dict[str, Any]) -> str:
    """`NAME=VALUE NAME=VALUE`."""
    return ' '.join(f'{name}={value}' for name, value in fields.items())


class Plan:
    """The settings to train.

    Attributes:
      seeds: the seeds to train each setting with.
      trials: number of settings to search for, or None.
      parameters: parameters of a search, as for `optuna_study.Tuner`.
    """

    def __init__(self, settings, flags, override, trials, prune):
        self.settings, self._override = settings_lib.from_config(settings), override
        self.trials, self.prune = trials, prune
        self.space = space.parse(flags)
        if trials is None and self.space.ranges:
            one = self.space.ranges[0]
            raise UserError(
                f'--sweep={one.field}={one.low}..{one.high}: a range needs --trials=N, '
                'how many settings to try'
            )
        if trials is not None and (trials < 1 or not self.space.axes):
            raise UserError(
                f'--trials={trials} must be at least 1, and needs a field to search'
            )
        if prune != 'none' and 'train.epochs' in self.space.fields:
            raise UserError(
                f'--prune={prune} compares runs epoch by epoch, so they need the same '
                'train.epochs; leave out one of the two'
            )
        if prune != 'none' and not self.settings.train.epochs:
            raise UserError(
                f'--prune={prune} compares runs epoch by epoch; say how many there are '
                'with --config.train.epochs'
            )
        self.values = {}  # of fields and texts that were looked up
        seeds = self.space.seeds or (str(self.settings.train.seed),)
        self.seeds = [self.value(space.SEED, text) for text in seeds]
        self.parameters = {}
        if trials is not None:
            self.parameters = dict(map(self._parameter, self.space.axes))

    @property
    def count(self) -> int:
        """Number of settings of the grid, or to search for."""
        return self.trials or math.prod(len(axis.options) for axis in self.space.axes)

    def override(self, fields: dict[str, str]) -> settings_lib.Settings:
        """The settings with some fields changed, given by name as text."""
        return settings_lib.from_config(self._override(fields))

    def value(self, field: str, text: str):
        """A value in its field's type, in the form that JSON returns."""
        if (field, text) not in self.values:
            found = settings_lib.flatten(self.override({field: text}))[field]
            self.values[field, text] = json.loads(json.dumps(found))
        return self.values[field, text]

    def _parameter(self, axis):
        name = ' '.join(axis.fields)
        if isinstance(axis, space.Choices):
            return name, [join(option) for option in axis.options]
        ends = [self.value(axis.field, text) for text in (axis.low, axis.high)]
        if not all(type(end) in (int, float) for end in ends):
            raise UserError(
                f'--sweep={axis.field}={axis.low}..{axis.high}: the field is not '
                'a number; list its values, separated by commas'
            )
        return name, (*ends, axis.log)

    def fields_of(self, parameters: dict[str, Any]) -> dict[str, str]:
        """The fields, as text, of a setting from a search."""
        fields: dict[str, str] = {}
        for axis in self.space.axes:
            value = parameters[' '.join(axis.fields)]
            if isinstance(axis, space.Choices):
                fields |= next(o for o in axis.options if join(o) == value)
            else:  # four digits are enough, and a command can repeat them
                text = str(value) if isinstance(value, int) else f'{value:.4g}'
                fields[axis.field] = text
        return fields

    def values_of(self, fields: dict[str, str]) -> dict[str, Any]:
        """The key of a setting's fields."""
        return {name: self.value(name, text) for name, text in fields.items()}

    def definition(self) -> dict[str, Any]:
        """The definition of the sweep, in the form that JSON returns."""
        swept = {*self.space.fields, space.SEED, *FREE}
        shared = settings_lib.flatten(self.settings)
        axes = []
        for axis in self.space.axes:
            options = [self.values_of(option) for option in axis.options]
            found: dict[str, Any] = {'fields': list(axis.fields), 'options': options}
            if isinstance(axis, space.Range):
                found['range'] = 'log' if axis.log else 'linear'
            axes.append(found)
        sweep = {
            'config': {n: value for n, value in shared.items() if n not in swept},
            'axes': axes,
            'seeds': self.seeds,
            'search': self.trials is not None,
            'prune': self.prune,
        }
        return json.loads(json.dumps(sweep))

    def check(self):
        """Prepares settings without training them, so that all mistakes show early.

        For a grid it prepares all settings; for a search, or very many settings, each
        value once. The seeds are prepared with the first setting.

        Raises:
          UserError: a field, a value or the data cannot be used.
        """
        options = [option for axis in self.space.axes for option in axis.options]
        for option in options:
            self.values_of(option)
        first = next(self.space.grid())
        if self.trials is None and self.count <= _CHECKED:
            grid = list(self.space.grid())
        else:
            grid = [first | option for option in options]
        grid += [first | {space.SEED: str(seed)} for seed in self.seeds]
        sources = {}
        for fields in grid:
            settings = self.override(fields)
            # Listing a large folder takes longer than everything else.
            key = settings.init_from, settings.data, settings.preparation
            try:
                sources[key] = prepare.prepare(
                    settings, '', resume=False, source=sources.get(key)
                ).source
            except UserError as error:
                raise UserError(f'--sweep: with {join(fields)}: {error}') from error


def find_difference(old, new):
    """How an old sweep differs from the new one; empty if it can continue.

    A grid can have new values and seeds; a search cannot, since it would be another
    search.
    """
    for name in old['config'].keys() & new['config'].keys():
        before, now = old['config'][name], new['config'][name]
        if before != now:
            return f'with {name}={before}, not {now}'
    before, now = ([axis['fields'] for axis in x['axes']] for x in (old, new))
    if sorted(before) != sorted(now):
        texts = [
            '; '.join(' '.join(f) for f in x) or 'seeds alone' for x in (before, now)
        ]
        return f'over {texts[0]}, not {texts[1]}'
    for name in ('search', 'prune'):
        if old[name] != new[name]:
            flag = '--trials' if name == 'search' else '--prune'
            return f'with another {flag}'
    if new['search']:
        for name in ('axes', 'seeds'):
            if old[name] != new[name]:
                return f'that searches among other values ({_first_of(old, new, name)})'
    later = {tuple(axis['fields']): axis['options'] for axis in new['axes']}
    for axis in old['axes']:
        for option in axis['options']:
            if option not in later[tuple(axis['fields'])]:
                return f'with {join(option)}, {_LEFT_OUT}'
    for seed in old['seeds']:
        if seed not in new['seeds']:
            return f'with {space.SEED}={seed}, {_LEFT_OUT}'
    return ''


def _first_of(old, new, name):
    """The first difference of two lists."""
    pairs = itertools.zip_longest(old[name], new[name])
    return next(f'{json.dumps(a)}, not {json.dumps(b)}' for a, b in pairs if a != b)
