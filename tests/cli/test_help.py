"""Help is complete, fits a terminal, and ends with 0."""

import re
import subprocess
import sys

import pytest

from configs import base
from flax_densenet.cli import commands, help_text, settings
from flax_densenet.errors import UserError
from helpers import commands as helper
from helpers.paths import ROOT

COMMANDS = commands.COMMANDS
ALL = list(COMMANDS)


@pytest.fixture
def main(monkeypatch, capfd):
    run = helper.make_main(monkeypatch, capfd)

    def succeed(*arguments):
        status, out, err = run(*arguments)
        assert (status, err) == (0, '')
        assert all(len(line) <= 100 for line in out.splitlines())
        assert 'Of --mode' not in out and 'Traceback' not in out
        return out

    return succeed


@pytest.mark.parametrize('flag', ['--help', '-h', '-help', '--helpfull', 'help'])
def test_the_commands_are_listed(flag, main):
    out = main(flag)
    for name, command in COMMANDS.items():
        assert re.search(rf'^  {name} ', out, re.M)
        assert command.summary.split()[0] in out
    assert 'python launch.py COMMAND' in out and 'settings [WORD]' in out


@pytest.mark.parametrize('name', ALL)
def test_a_command_shows_its_own_flags(name, main):
    out = main(name, '--help')
    assert out == main('--help', f'--mode={name}')
    if name != 'settings':  # help on settings is their list
        assert out == main('help', name) == main(f'--help={name}')
    command = COMMANDS[name]
    shown = set(re.findall(r'^  --(\w+)', out, re.M)) - {'config'}
    own = {flag.name for flags in command.flags.values() for flag in flags}
    assert shown == own
    for flag in command.all_flags().values():
        assert flag.help and (not flag.alias or f'--{flag.alias}' in out)
        if flag.kind in (int, float) and flag.default is not None:
            assert f'Default: {flag.default}.' in ' '.join(out.split())
    out = ' '.join(out.replace('\\\n', '').split())
    assert all(f'launch.py {example}' in out for _, example in command.examples)
    assert command.examples and command.summary.endswith('.')
    assert ('--config.FIELD=VALUE' in out) == bool(command.fields)


def test_all_settings_are_listed_with_type_and_default(main):
    config = base.get_config()
    out = main('settings')
    assert out == main('--help=settings') == main('help', 'settings')
    fields = {'init_from': config} | {
        f'{section}.{name}': config[section]
        for section in ('model', 'data', 'optimizer', 'train', 'report')
        for name in config[section]
    }
    assert len(fields) > 80
    for name, owner in fields.items():
        kind = owner.get_type(name.rpartition('.')[2]).__name__
        found = re.search(
            rf'^  {re.escape(name)}  \(([\w ]+), default: (.*)\)$', out, re.M
        )
        kind = 'int or tuple' if kind == 'object' else kind
        assert found and found[1] == kind, name
        value = owner[name.rpartition('.')[2]]
        if value not in (None, '', ()):
            assert found[2] == str(value)
    sections, listed = settings.find_all()
    assert sorted(one.name for one in listed) == sorted(fields)
    assert listed[1].name == 'model.variant'  # in the order of the file
    assert all(one.text.endswith(('.', "'")) for one in listed), listed
    assert set(sections) == {'model', 'data', 'optimizer', 'train', 'report'}
    assert all(sections.values())


def test_settings_about_words(main):
    out = main('settings', 'learning')
    assert '  optimizer.learning_rate  (float, default: 0.0001)' in out
    assert 'data.source' not in out
    assert main('settings', 'CLASSES', 'weight').count('default:') == 2
    assert main('settings', '--', '--config.train.patience').count('default:') == 1


def test_unknown_topics_and_words():
    with pytest.raises(UserError, match='no help on evl; did you mean eval?'):
        help_text.find(['launch.py', '--help=evl'], COMMANDS)
    with pytest.raises(UserError, match='did you mean optimizer.learning_rate?'):
        settings.describe(['lerning_rate'])


def test_words_that_only_look_like_help():
    for arguments in (['predict', 'm', '--', '-h'], ['--workdir=--help'], ['helper']):
        assert help_text.find(['launch.py', *arguments], COMMANDS) is None


@pytest.mark.parametrize(
    ('path', 'program'),
    [
        ('/x/launch.py', 'python launch.py'),
        ('/x/flax_densenet/__main__.py', 'python -m flax_densenet'),
        ('/bin/flax-densenet', 'flax-densenet'),
    ],
)
def test_examples_name_the_program(path, program):
    assert f'{program} train photos' in help_text.find([path, '-h'], COMMANDS)


def test_as_a_module(tmp_path):
    """The whole program, from another folder, in less than a start of JAX takes."""
    done = subprocess.run(
        [sys.executable, '-m', 'flax_densenet', 'predict', '--help'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={'PYTHONPATH': str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, '')
    assert 'python -m flax_densenet predict MODEL FILES...' in done.stdout


def test_version(main):
    assert re.fullmatch(r'flax_densenet \d+\.\d+.*\n', main('--version'))
