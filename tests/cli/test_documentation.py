"""Every command that the documentation and the recipes show is one that is parsed."""

import re
import shlex

import pytest

from flax_densenet.cli import command_line, commands
from helpers.paths import ROOT

_PLACES = ('README.md', 'docs/*.md', 'configs/*.py', 'deploy/*', 'tests/data/v0/*.md')


def find_commands():
    for path in sorted(path for place in _PLACES for path in ROOT.glob(place)):
        text = path.read_text(encoding='utf-8').replace('\\\\\n', '\\\n')
        text = re.sub(r'\\\n\s*', ' ', text)
        program = r'(?:python launch\.py|flax-densenet)'
        indented = rf'^ *(?:srun )?{program}(?: (.*))?$'
        quoted = rf'`{program} (--[^`]*|[a-z_]+ [^`]*)`'
        for pattern in (indented, quoted):
            for found in re.findall(pattern, text, re.M):
                words = shlex.split(found.replace('\n', ' '), comments=True)
                words = [word for word in words if word[0] != '$']  # of the shell
                stands_for_others = re.search(r'\.\.\.|COMMAND|--help', found)
                if words and not stands_for_others:
                    yield path.name, words


DOCUMENTED = list(find_commands())


def test_there_are_many():
    assert len(DOCUMENTED) > 40
    assert {words[0] for _, words in DOCUMENTED} >= {
        *('train', 'eval', 'report', 'predict', 'export', 'serve'),
        *('sweep', 'lr_find', 'pack', 'summary'),
    }


@pytest.mark.parametrize(
    'words', [words for _, words in DOCUMENTED], ids=lambda words: ' '.join(words)[:60]
)
def test_documented(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('photos', 'imagenet', 'others', 'x-rays'):
        (tmp_path / name).mkdir()
    (tmp_path / 'densenet121.pth').touch()
    words = [re.sub(r'\bsweep=@.*', 'sweep=a=1', word) for word in words]
    found = command_line.parse(['launch.py', *words], commands.COMMANDS)
    named = [word.removeprefix('--mode=') for word in words]
    named = [name for name in named if name in commands.COMMANDS]
    assert found.command.name == [*named, 'train'][0]
