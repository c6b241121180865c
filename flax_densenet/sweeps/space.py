"""Parses `--sweep`: the values of fields, or the ranges to search.

One flag is one axis; several make a grid of all combinations.

  optimizer.learning_rate=0.03,0.1       these values
  model.block_sizes=(6,6),(6,12)         commas in brackets or quotes do not part them
  optimizer.learning_rate=1e-4..1e-1     a range to search, even in its logarithm
  model.dropout_rate=0.05..0.3:linear    even in itself, as ranges from 0 and integers
  optimizer.name=sgd optimizer.learning_rate=0.1; optimizer.name=adam
                                         sets of fields that change together
  @sets.txt                              such a set in each line of a file

>>> [option for option in parse(['train.epochs=2,3']).axes[0].options]
[{'train.epochs': '2'}, {'train.epochs': '3'}]
>>> parse(['optimizer.learning_rate=1e-4..1e-1']).axes[0].log
True
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from flax_densenet import settings
from flax_densenet.errors import UserError
from flax_densenet.system import paths

SEED = 'train.seed'
_WHOLE_PROCESS = ('train.deterministic',)


@dataclasses.dataclass(frozen=True)
class Choices:
    """An axis of values.

    Attributes:
      options: for each, the fields that it sets, as text.
    """

    options: tuple[dict[str, str], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that it changes."""
        return tuple(dict.fromkeys(name for row in self.options for name in row))


@dataclasses.dataclass(frozen=True)
class Range:
    """An axis to search.

    Attributes:
      low, high: the ends, inclusive, as text.
      log: whether to draw uniformly on a logarithmic scale.
    """

    field: str
    low: str
    high: str
    log: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """The field that it changes."""
        return (self.field,)

    @property
    def options(self) -> tuple[dict[str, str], ...]:
        """Its ends."""
        return {self.field: self.low}, {self.field: self.high}


@dataclasses.dataclass(frozen=True)
class Space:
    """All axes except that of the seeds.

    Attributes:
      axes: the axes in the order of their flags.
      seeds: the seeds to train each setting with, as text; empty for the config's own.
    """

    axes: tuple[Choices | Range, ...]
    seeds: tuple[str, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that differ between settings."""
        return tuple(name for axis in self.axes for name in axis.fields)

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The axes that need a search."""
        return tuple(axis for axis in self.axes if isinstance(axis, Range))

    def grid(self) -> Iterator[dict[str, str]]:
        """The fields of each setting as text; both ends of ranges."""
        for options in itertools.product(*(axis.options for axis in self.axes)):
            yield {name: text for option in options for name, text in option.items()}


def parse(flags: list[str]) -> Space:
    """Parses values of `--sweep` to axes, whose fields and values are not checked yet.

    Raises:
      UserError: a flag cannot be parsed, a value is empty, or a field occurs twice.
    """
    if not flags:
        raise UserError(
            'sweep needs --sweep=FIELD=VALUE,VALUE, as '
            "--sweep='optimizer.learning_rate=0.03,0.1'"
        )
    axes, seeds, seen = [], (), set()
    for flag in flags:
        axis = _parse_axis(flag)
        for name in axis.fields:
            if name in seen:
                raise UserError(f'--sweep={flag}: {name} is already in another --sweep')
            if name in _WHOLE_PROCESS:
                raise UserError(
                    f'--sweep={flag}: {name} applies to the whole process; set it with '
                    f'--config.{name}'
                )
            seen.add(name)
        if axis.fields != (SEED,):
            axes.append(axis)
        elif isinstance(axis, Range):
            raise UserError(f'--sweep={flag}: seeds are a list, as {SEED}=0,1,2')
        else:
            seeds = tuple(option[SEED] for option in axis.options)
    if any(SEED in axis.fields for axis in axes):
        raise UserError(f'--sweep: {SEED} needs a flag of its own, as {SEED}=0,1,2')
    return Space(tuple(axes), seeds)


def _parse_axis(flag):
    if flag.startswith('@'):
        return _parse_sets(flag, _read_lines(flag))
    if len(parts := _split(flag, ';')) > 1:
        return _parse_sets(flag, [part for part in parts if part])
    name, equals, text = flag.partition('=')
    if not equals or not name:
        raise UserError(f'--sweep={flag} needs the form FIELD=VALUE,VALUE')
    name, values = settings.current_name(name), _split(text, ',')
    if len(values) == 1 and (found := _parse_range(flag, name, values[0])):
        return found
    if not all(values):
        raise UserError(
            f"--sweep={flag}: a value is empty; write '' in quotes for an empty text"
        )
    return Choices(_no_repeats(flag, [{name: _unquote(value)} for value in values]))


def _read_lines(flag):
    path = paths.resolve(flag[1:], '--sweep=@')
    try:
        with open(path, encoding='utf-8') as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        message = getattr(error, 'strerror', None) or error
        raise UserError(
            f'--sweep={flag}: the file cannot be read ({message})'
        ) from error
    return [line for line in lines if line and not line.startswith('#')]


def _parse_sets(flag, lines):
    options = []
    for line in lines:
        option = {}
        for word in _split(line, ' '):
            name, equals, text = word.partition('=')
            if not word:
                continue
            if not equals or not name or not text or len(_split(text, ',')) > 1:
                raise UserError(
                    f'--sweep={flag}: {word} needs the form FIELD=VALUE with one '
                    'value, in quotes if it has blanks or commas'
                )
            option[settings.current_name(name)] = _unquote(text)
        options.append(option)
    if not options:
        raise UserError(f'--sweep={flag} names no field')
    return Choices(_no_repeats(flag, options))


def _parse_range(flag, name, text):
    """A `Range` if the text has that form, else None."""
    ends, _, scale = text.partition(':')
    low, dots, high = ends.partition('..')
    try:
        numbers = float(low), float(high)
    except ValueError:
        return None
    if not dots:
        return None
    if not numbers[0] < numbers[1] < math.inf or math.isinf(numbers[0]):
        raise UserError(
            f'--sweep={flag}: a range must go from a lower to a higher number'
        )
    if scale not in ('', 'log', 'linear'):
        raise UserError(
            f'--sweep={flag}: {scale} is not known; use {ends}:log or {ends}:linear'
        )
    if scale == 'log' and numbers[0] <= 0:
        raise UserError(f'--sweep={flag}: a logarithmic range starts above 0')
    # Integers are drawn uniformly unless `log` is given.
    whole = low.lstrip('-').isdecimal() and high.lstrip('-').isdecimal()
    even = scale == 'linear' or (not scale and (whole or numbers[0] <= 0))
    return Range(name, low, high, log=not even)


def _no_repeats(flag, options):
    for place, option in enumerate(options):
        if option in options[:place]:
            message = ' '.join(f'{name}={text}' for name, text in option.items())
            raise UserError(f'--sweep={flag}: {message} comes twice')
    return tuple(options)


def _split(text, mark):
    """Splits at separators outside of brackets and quotes; strips the parts."""
    parts, depth, quote = [''], 0, ''
    for character in text:
        if quote:
            quote = '' if character == quote else quote
        elif character in '\'"' and (depth or parts[-1].strip()[-1:] in ('', '=')):
            quote = character
        elif character in '([{':
            depth += 1
        elif character in ')]}':
            depth -= 1
        if character == mark and depth <= 0 and not quote:
            parts.append('')
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _unquote(text):
    inside = text[1:-1]
    if len(text) > 1 and text[0] == text[-1] and text[0] in '\'"':
        return inside
    return text
