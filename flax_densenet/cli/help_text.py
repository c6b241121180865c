"""The text of --help."""

import difflib
import os
import shutil
import textwrap

from flax_densenet._version import __version__
from flax_densenet.cli import options
from flax_densenet.errors import UserError

_HELP = ('help', 'h', '?', 'helpfull', 'helpshort')
_COMMON = (
    ('train on photos/CLASS/*.jpg', 'train photos'),
    ('train a recipe', 'train --config=cifar:quick --workdir=ckpt/quick'),
    ('change settings', 'train photos --config.train.epochs=20'),
    ('measure it', 'eval ckpt/densenet121'),
    ('use it', 'predict ckpt/densenet121 new_photos'),
)


def find(argv: list[str], commands: dict[str, options.Command]) -> str | None:
    """The text requested with --help, `help` or --version.

    Returns:
      The text, or None if none is requested.

    Raises:
      UserError: the topic is unknown.
    """
    program, arguments = name_program(argv[0]), argv[1:]
    if arguments[:1] == ['help']:
        return _topic(program, arguments[1:2], arguments[2:], commands)
    if '--' in arguments:
        arguments = arguments[: arguments.index('--')]
    for argument in arguments:
        name, equals, topic = argument.lstrip('-').partition('=')
        if not argument.startswith('-'):
            continue
        if name == 'version' and not equals:
            return f'flax_densenet {__version__}'
        if name in _HELP:
            if equals:
                return _topic(program, [topic], [], commands)
            named = _command_in(arguments, commands)
            if named:
                return describe_command(program, named)
            return _overview(program, commands)
    return None


def name_program(path: str) -> str:
    """How this program was started, for examples."""
    name = os.path.basename(path)
    if name == '__main__.py':
        return 'python -m flax_densenet'
    return f'python {name}' if name.endswith('.py') else 'flax-densenet'


def width() -> int:
    """The width of the text: that of the terminal, from 80 to 100 columns."""
    return min(max(shutil.get_terminal_size((88, 24)).columns, 80), 100)


def wrap(text: str, indent: str, first: str | None = None) -> str:
    """A paragraph, indented."""
    return textwrap.fill(
        text,
        width(),
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _command_in(arguments, commands):
    found = [a.lstrip('-').removeprefix('mode=') for a in arguments]
    return next((commands[name] for name in found if name in commands), None)


def _topic(program, topic, rest, commands):
    if not topic:
        return _overview(program, commands)
    name = topic[0]
    if name == 'settings':
        from flax_densenet.cli import settings

        return settings.describe(rest)
    if name not in commands:
        close = difflib.get_close_matches(name, commands, 1)
        hint = f'did you mean {close[0]}? ' if close else ''
        raise UserError(
            f'there is no help on {name}; {hint}The topics are {", ".join(commands)}'
        )
    return describe_command(program, commands[name])


def _overview(program, commands):
    default = next(iter(commands))
    pad = max(map(len, commands)) + 2
    rows = [
        wrap(command.summary, ' ' * (pad + 2), f'  {name:<{pad}}')
        for name, command in commands.items()
    ]
    return '\n'.join(
        [
            'Train, evaluate and use DenseNet image classifiers.',
            '',
            'Usage:',
            f'  {program} COMMAND [ARGUMENTS] [FLAGS]',
            f'  {program} [FLAGS]    the same as `{default}`',
            '',
            'Commands:',
            *rows,
            '',
            'Common usage:',
            *_format_examples(program, _COMMON),
            '',
            'Recipes and settings:',
            wrap(
                '--config=RECIPE picks a recipe, by name (cifar) or file (mine.py); '
                'some take an argument (cifar:quick). --config.FIELD=VALUE changes one '
                'setting, such as --config.optimizer.learning_rate=1e-3.',
                '  ',
            ),
            '',
            'More:',
            f'  {program} COMMAND --help     arguments and flags of a command',
            f'  {program} settings [WORD]    all settings, or those about a word',
            '  README.md and docs/ describe everything with examples.',
        ]
    )


def describe_command(program: str, command: options.Command) -> str:
    """The help on one command."""
    usage = ' '.join(filter(None, (program, command.name, command.usage)))
    lines = [command.summary, '', 'Usage:', f'  {usage} [FLAGS]', '']
    for paragraph in command.details:
        lines += [wrap(paragraph, ''), '']
    if command.examples:
        lines += ['Examples:', *_format_examples(program, command.examples), '']
    for group, flags in command.flags.items():
        lines += [f'{group}:']
        for flag in flags:
            lines += _flag(flag)
        lines += ['']
    if command.fields:
        lines += _settings(program, command)
    return '\n'.join(lines).rstrip()


def _format_examples(program, examples):
    lines = [
        # Over several lines, in a form that a shell accepts.
        wrap(f'{program} {arguments}', '      ', '  ').replace('\n', ' \\\n')
        for _, arguments in examples
    ]
    pad = max(map(len, lines)) + 2
    notes = [note for note, _ in examples]
    if all(pad + len(note) + 2 <= width() for note in notes):
        return [
            f'{line:<{pad}}# {note}' for line, note in zip(lines, notes, strict=True)
        ]
    pairs = zip(notes, lines, strict=True)
    return [text for note, line in pairs for text in (f'  # {note}', line)]


def _flag(flag):
    name = f'--{flag.name}'
    if flag.kind is not bool:
        name += f'={flag.value or "VALUE"}'
    if flag.alias:
        name += f', --{flag.alias}'
    shown = flag.kind is not bool and flag.default not in (None, '')
    if flag.default_text or shown:
        text = f'{flag.help} Default: {flag.default_text or flag.default}.'
    else:
        text = flag.help
    return [f'  {name}', wrap(text, '      ')]


def _settings(program, command):
    return [
        'Settings:',
        '  --config=RECIPE[:ARGUMENT]',
        wrap('Name or file of a recipe.', '      '),
        '  --config.FIELD=VALUE',
        wrap(
            f'Changes a setting. {command.fields} `{program} settings` lists them.',
            '      ',
        ),
        '',
        wrap(
            'Flags can also be written as `--flag VALUE`, or in a file, one per line, '
            'with --flagfile=FILE.',
            '',
        ),
    ]
