"""Pages of the documentation site that are generated, and its readability.

mkdocs calls these functions while it builds the site (`make docs`): `settings.md` and
`commands.md` are made from the program itself, `changelog.md` and `contributing.md`
from the files at the top of the repository.
"""

import pathlib
import re
import sys

import mkdocs.exceptions
import mkdocs.plugins
import textstat
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package as it lies here

from flax_densenet.cli import commands, help_text, settings  # noqa: E402

REPOSITORY_FILES = {
    'changelog.md': 'CHANGELOG.md',
    'contributing.md': 'CONTRIBUTING.md',
}
# Pages that a newcomer reads, whose Flesch reading ease is checked.
TUTORIALS = ('index.md', 'get_started.md', 'train.md', 'report.md', 'predict.md')
LEAST_READING_EASE = 50
_LOGGER = mkdocs.plugins.get_plugin_logger('readability')


def make_settings_page() -> str:
    """Every setting with its type, default and meaning, by section."""
    sections, found = settings.find_all()
    lines = [
        '# Settings',
        '',
        'Every setting has a default in `configs/base.py`. Recipes change some of '
        'them, and `--config.NAME=VALUE` changes one for a run:',
        '',
        '```bash',
        'python launch.py train photos --config.train.epochs=20',
        '```',
        '',
        'Search this list on the command line with `python launch.py settings WORD`.',
        '',
    ]
    current = None
    for setting in found:
        section = setting.name.rpartition('.')[0]
        if section != current:
            current = section
            if section:
                lines += [f'## {section}', '', sections.get(section, ''), '']
        default = {None: 'not set', '': 'empty', (): 'empty'}.get(
            setting.default, f'`{setting.default}`'
        )
        lines += [
            f'### `{setting.name}` {{ #{setting.name} }}',
            '',
            f'Type `{setting.kind.__name__}`, default {default}.',
            '',
            _escape(setting.text),
            '',
        ]
    return '\n'.join(lines)


def make_commands_page() -> str:
    """The help text of every command."""
    program = 'flax-densenet'
    lines = [
        '# Commands',
        '',
        '`flax-densenet COMMAND`, `python launch.py COMMAND` in a checkout, and '
        '`python -m flax_densenet COMMAND` are the same program.',
        '',
    ]
    for name, command in commands.COMMANDS.items():
        text = help_text.describe_command(program, command)
        lines += [f'## {name}', '', '```text', text, '```', '']
    return '\n'.join(lines)


def _escape(text):
    """Text as Markdown shows it, without markup of its own."""
    return re.sub(r'([*_<>\[\]#])', r'\\\1', text)


def on_files(files, config):
    """Adds the generated pages."""
    pages = {'settings.md': make_settings_page(), 'commands.md': make_commands_page()}
    for name, source in REPOSITORY_FILES.items():
        text = (ROOT / source).read_text(encoding='utf-8')
        # Links are relative to the top of the repository.
        text = re.sub(r'\]\(docs/', '](', text)
        pages[name] = text
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def measure_reading_ease(markdown: str) -> float:
    """Flesch reading ease of a page's sentences, without code, tables and headings."""
    text = re.sub(r'```.*?```', '', markdown, flags=re.S)
    text = re.sub(r'^(\||#|!|<|\s{4}).*$', '', text, flags=re.M)
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', text)
    text = re.sub(r'`([^`]*)`', 'it', text)  # a name counts as a short word
    return textstat.flesch_reading_ease(text)


def on_page_markdown(markdown, page, config, files):
    """Prints the reading ease of tutorial pages; a hard page fails the build."""
    if page.file.src_path in TUTORIALS:
        ease = measure_reading_ease(markdown)
        _LOGGER.info('%s: Flesch reading ease %.0f', page.file.src_path, ease)
        if ease < LEAST_READING_EASE:
            raise mkdocs.exceptions.PluginError(
                f'{page.file.src_path}: reading ease {ease:.0f}, '
                f'at least {LEAST_READING_EASE} is required; shorten its sentences'
            )


def on_post_build(config):
    """Prints the reading ease of the README."""
    ease = measure_reading_ease((ROOT / 'README.md').read_text(encoding='utf-8'))
    _LOGGER.info('README.md: Flesch reading ease %.0f', ease)
    if ease < LEAST_READING_EASE:
        raise mkdocs.exceptions.PluginError(
            f'README.md: reading ease {ease:.0f}, '
            f'at least {LEAST_READING_EASE} is required; shorten its sentences'
        )
