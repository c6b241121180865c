"""`settings`: every setting with its type, default and meaning.

The text comes from the comments of `configs/base.py`: above a field or behind it.
"""

import ast
import dataclasses
import difflib
import io
import tokenize
from typing import Any

from ml_collections import ConfigDict

from flax_densenet.cli import help_text, options, recipes
from flax_densenet.errors import UserError

# Names for types that have none, such as that of data.image_size.
_KINDS = {object: 'int or tuple'}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of configs/base.py.

    Attributes:
      name: full name, such as `train.epochs`.
      kind: type of its values.
      text: its description.
    """

    name: str
    kind: type
    default: Any
    text: str


def find_all() -> tuple[dict[str, str], list[Setting]]:
    """The description of each section, and all settings, in the order of the file."""
    source = (recipes.folder() / 'base.py').read_text(encoding='utf-8')
    config, texts = recipes.load_base(), _read_comments(source)
    sections, found = {}, []
    for name, text in texts.items():
        section, _, field = name.rpartition('.')
        owner = config[section] if section else config
        value = owner[field]
        if isinstance(value, ConfigDict):
            sections[name] = text
        else:
            found.append(Setting(name, owner.get_type(field), value, text))
    return sections, found


def _read_comments(source):
    """The comments of each `config.NAME = ...`, by name."""
    lines, comments = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('# ').strip()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign):
            continue
        name = ast.unparse(node.targets[0])
        if not name.startswith('config.'):
            continue
        above, line = [], node.lineno - 1
        while line in comments and lines[line - 1].lstrip().startswith('#'):
            above.insert(0, comments[line])
            line -= 1
        behind = [comments[node.end_lineno]] if node.end_lineno in comments else []
        text = ' '.join([*above, *behind])
        found[name.removeprefix('config.')] = text
    return found


def describe(words: list[str]) -> str:
    """The list as text: all settings, or those that contain all words.

    Raises:
      UserError: no setting contains them.
    """
    sections, settings = find_all()
    words = [word.lower().removeprefix('--config.') for word in words]
    shown = [
        setting
        for setting in settings
        if all(word in f'{setting.name} {setting.text}'.lower() for word in words)
    ]
    if not shown:
        known = {s.name.rpartition('.')[2]: s.name for s in settings}
        known |= {setting.name: setting.name for setting in settings}
        close = difflib.get_close_matches(' '.join(words), known, 1)
        hint = f'; did you mean {known[close[0]]}?' if close else ''
        raise UserError(f'no setting contains {" ".join(words)}{hint}')
    lines = []
    if not words:
        lines += [
            help_text.wrap(
                'All settings, with their types and defaults. Recipes change defaults; '
                '--config.NAME=VALUE sets one, such as --config.train.epochs=20. '
                "Values of type tuple need quotes: --config.model.block_sizes='(6,6)'.",
                '',
            ),
            '',
        ]
    for setting in shown:
        section = setting.name.rpartition('.')[0]
        if not words and section in sections:
            lines += [help_text.wrap(f'{section}: {sections.pop(section)}', ''), '']
        lines += _format(setting)
    return '\n'.join(lines).rstrip()


def _format(setting):
    default = setting.default
    shown = (
        'not set' if default is None else 'empty' if default in ('', ()) else default
    )
    kind = _KINDS.get(setting.kind, setting.kind.__name__)
    name = f'  {setting.name}  ({kind}, default: {shown})'
    return [name, help_text.wrap(setting.text, '      '), '']


def run(invocation: options.Invocation):
    """Prints the list."""
    print(describe(list(invocation.positionals)))


COMMAND = options.Command(
    'settings',
    'List all settings, or those about a topic, with their defaults.',
    run,
    usage='[WORD...]',
    details=('Lists the settings whose name or description contains all words.',),
    examples=(('all', 'settings'), ('about the learning rate', 'settings learning')),
    place=lambda positionals: [],
)
