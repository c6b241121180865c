"""Turns arguments into an `Invocation`: the command, its flags and its settings.

absl and ml_collections parse the values. Before that, this module brings the arguments
into the form that both accept (`--name=value`, the recipe first), names the positional
arguments, and reports mistakes.
"""

import dataclasses
import difflib
import os
import re

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from flax_densenet import settings
from flax_densenet.cli import options, recipes
from flax_densenet.errors import UserError
from flax_densenet.settings import sizes

# What other programs call these settings.
_SHORT = {'lr': 'optimizer.learning_rate', 'wd': 'optimizer.weight_decay'}
_TRUE_FALSE = ('true', 'false', 'True', 'False')


@dataclasses.dataclass(frozen=True)
class _Given:
    """A flag as it was given; `value` is None for a boolean flag without a value."""

    name: str
    value: str | None

    def __str__(self):
        return f'--{self.name}' + ('' if self.value is None else f'={self.value}')


def parse(argv: list[str], commands: dict[str, options.Command]) -> options.Invocation:
    """Parses a command line.

    Args:
      argv: the program and its arguments.
      commands: by name; the first is the default.

    Raises:
      UserError: a mistake, in one line.
    """
    fields = _field_kinds()
    arguments = _expand_flag_files(argv[1:])
    given, positionals = _split(arguments, commands, fields)
    command, positionals = _find_command(given, positionals, commands)
    given = [flag for flag in given if flag.name != 'mode']
    for flag in given:
        _check_name(flag.name, command, commands, fields)
    if command.implied:
        pairs = command.implied({flag.name: flag.value for flag in given})
        given += [_Given(*pair) for pair in pairs]
    given += _place(command, given, positionals)
    values = absl_flags.FlagValues()
    for flag in dict.fromkeys(command.all_flags().values()):
        flag.define(values)
    recipe, fields = None, []
    if command.fields:
        recipe, fields = _parse_settings(values, given)
    rest = [str(flag) for flag in given if not _is_setting(flag.name)]
    _call_absl(values, [*fields, *rest])
    return options.Invocation(
        command,
        values,
        recipe,
        tuple(str(flag) for flag in given if _is_setting(flag.name)),
        tuple(positionals),
    )


def _field_kinds():
    """The type of every field of configs/base.py, by full name."""
    config, found = recipes.load_base(), {}
    for name in config:
        if isinstance(config[name], ConfigDict):
            kinds = {f'{name}.{f}': config[name].get_type(f) for f in config[name]}
            found |= kinds
        else:
            found[name] = config.get_type(name)
    return found


def _expand_flag_files(arguments):
    """Replaces `--flagfile=FILE` by the flags in the file."""
    try:
        values = absl_flags.FlagValues()
        return values.read_flags_from_files(arguments, force_gnu=True)
    except (absl_flags.Error, OSError, ValueError) as error:
        raise UserError(' '.join(str(error).split())) from error


def _is_setting(name):
    return name == 'config' or name.startswith(('config.', 'noconfig.'))


def _split(arguments, commands, fields):
    """Separates flags and positional arguments, using the flags of all commands."""
    known = {'mode': options.Flag('mode', '')}
    for command in commands.values():
        known |= command.all_flags()
    given, positionals, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == '--':
            positionals += rest
            break
        if not argument.startswith('-') or argument == '-':
            positionals.append(argument)
            continue
        name, equals, value = argument.lstrip('-').partition('=')
        if name.startswith('config.'):
            name = f'config.{settings.current_name(name.removeprefix("config."))}'
        if equals:
            given.append(_Given(name, value))
            continue
        field = name.removeprefix('config.')
        kind = fields.get(field) if field != name else None
        if kind is bool or (name in known and known[name].kind is bool):
            value = rest.pop(0) if rest[:1] and rest[0] in _TRUE_FALSE else None
        elif kind or name == 'config' or name in known:
            if not rest:
                raise UserError(f'--{name} needs a value: --{name}=VALUE')
            value = rest.pop(0)
        else:  # --noNAME, or an unknown flag
            value = None
        given.append(_Given(name, value))
    return given, positionals


def _find_command(given, positionals, commands):
    """The command and the remaining positional arguments."""
    default = next(iter(commands))
    modes = [flag.value for flag in given if flag.name == 'mode']
    if modes:
        name = modes[-1]
        if name not in commands:
            raise UserError(f'--mode={name} is not known; {_suggest(name, commands)}')
        if positionals[:1] and positionals[0] in commands:
            first = positionals.pop(0)
            if first != name:
                raise UserError(f'both {first} and --mode={name}; give one command')
        return commands[name], positionals
    if not positionals:
        return commands[default], positionals
    name = positionals[0]
    if name not in commands:
        hint = _suggest(name, commands)
        if os.path.exists(name):
            hint = f'the command comes first, as in `train {name}`; {hint}'
        raise UserError(f'{name} is not a command; {hint}')
    return commands[name], positionals[1:]


def _suggest(name, known):
    close = difflib.get_close_matches(name, known, 1)
    hint = f'did you mean {close[0]}? The' if close else 'the'
    return f'{hint} commands are {", ".join(known)}'


def _check_name(name, command, commands, fields):
    """Raises for a flag that the command does not have."""
    if _is_setting(name):
        if not command.fields:
            raise UserError(f'--{name}: {command.name} has no settings')
        if '.' in name:
            _check_field(name.partition('.')[2], fields)
        return
    own = command.all_flags()
    bare = name.removeprefix('no')
    if name in own or (bare in own and own[bare].kind is bool):
        return
    others = [c.name for c in commands.values() if name in c.all_flags()]
    if not others:
        others = [c.name for c in commands.values() if bare in c.all_flags()]
    if others:
        raise UserError(
            f'--{name} is a flag of {_join(others)}; {command.name} does not take it'
        )
    raise UserError(
        f'--{name} is not a flag of {command.name}; '
        + _suggest_flag(name, own, fields)
        + f'see `{command.name} --help`'
    )


def _join(names):
    if len(names) == 1:
        return names[0]
    return f'{", ".join(names[:-1])} and {names[-1]}'


def _suggest_flag(name, own, fields):
    """The flag or setting that was probably meant."""
    if name in _SHORT:
        return f'did you mean --config.{_SHORT[name]}? '
    known = {flag: f'--{flag}' for flag in ('config', 'mode', 'help', *own)}
    known |= {field: f'--config.{field}' for field in fields}
    last = {field.rpartition('.')[2]: f'--config.{field}' for field in fields}
    plain = name.replace('-', '_')
    close = difflib.get_close_matches(plain, known, 1, 0.75)
    if close:
        return f'did you mean {known[close[0]]}? '
    close = difflib.get_close_matches(plain, last, 1, 0.75)
    return f'did you mean {last[close[0]]}? ' if close else ''


def check_field(field: str):
    """Raises for a setting that configs/base.py does not have."""
    _check_field(field, _field_kinds())


def _check_field(field, fields):
    if field in fields:
        return
    close = [known for known in fields if known.startswith(f'{field}_')]
    close = close or difflib.get_close_matches(field, fields, 1, 0.7)
    if not close:  # a field of another section
        last = {known.rpartition('.')[2]: known for known in fields}
        close = difflib.get_close_matches(field.rpartition('.')[2], last, 1, 0.8)
        close = [last[found] for found in close]
    section = [n for n in fields if n.startswith(field.partition('.')[0] + '.')]
    raise UserError(
        f'--config.{field} is not a field; '
        + (f'did you mean {close[0]}? The' if close else 'the')
        + f' fields are {", ".join(section or fields)}'
    )


def _place(command, given, positionals):
    """Converts positional arguments to the flags that they stand for."""
    if not positionals:
        return []
    if command.place is None:
        raise UserError(
            f'{positionals[0]}: {command.name} takes no arguments but flags, which '
            'start with --'
        )
    names = {flag.name for flag in given}
    placed = []
    for name, value in command.place(positionals):
        # A recipe may come with its data.
        if name == 'config' and name in names:
            continue
        same = {name, 'config.init_from'} if name == 'workdir' else {name}
        if both := sorted(same & names):
            hint = ''
            if 'files' in names:  # the shell may have expanded the pattern
                hint = "; put a pattern in quotes: --files='photos/*.jpg'"
            raise UserError(
                f'{value} and --{both[0]} mean the same; give one of them{hint}'
            )
        placed.append(_Given(name, value))
    return placed


def _parse_settings(values, given):
    """The recipe, and the arguments for ml_collections."""
    named = [flag.value for flag in given if flag.name == 'config']
    recipe = recipes.find(named[-1]) if named else None
    config = recipes.load(recipe or recipes.find('base'))
    fields = [
        str(_with_size(f)) for f in given if _is_setting(f.name) and f.name != 'config'
    ]
    config_flags.DEFINE_config_dict(
        'config', config, '', flag_values=values, sys_argv=['', *fields]
    )
    return recipe, fields


def _with_size(flag):
    """A flag with its value in the form that ml_collections reads, if it is a size."""
    if flag.name != 'config.data.image_size' or flag.value is None:
        return flag
    size = sizes.parse(flag.value, f'--{flag.name}')
    return _Given(flag.name, sizes.plain(size))


def load_config(text: str) -> ConfigDict:
    """The settings of a recipe, `PATH[:ARGUMENT]` or `NAME[:ARGUMENT]`.

    Raises:
      UserError: there is no such recipe, or it raises an error.
    """
    values = absl_flags.FlagValues()
    _parse_settings(values, [_Given('config', text)])
    _call_absl(values, [])
    return values.config


# What Python says of a wrong value, and what it means.
_CONVERSIONS = (
    (r'invalid literal for int\(\) with base \d+: .*', 'it must be a whole number'),
    (r'could not convert string to float: .*', 'it must be a number'),
    (r"\('Non-boolean argument to boolean flag', .*\)", 'it must be true or false'),
)


def one_line(message: str) -> str:
    """What absl says of a wrong value, in words and on one line."""
    for said, meant in _CONVERSIONS:
        message = re.sub(said, meant, message)
    return ' '.join(message.removeprefix('flag ').split())


def _call_absl(values, arguments):
    """Parses the values; a wrong one is a UserError of one line."""
    try:
        left = values(['', *arguments])
    except (absl_flags.Error, TypeError, ValueError) as error:
        raise UserError(one_line(str(error))) from error
    if len(left) > 1:  # no known case; absl would ignore it
        raise UserError(f'{left[1]} is not a flag')
