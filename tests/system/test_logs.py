"""A library says nothing of progress; a command prints all of it."""

import subprocess
import sys

from helpers.paths import ROOT

CODE = """
import logging
{before}
logger = logging.getLogger('flax_densenet.train.fit')
logger.info('100 % of it')
logger.warning('warning: look at it')
logging.getLogger('another').warning('of another')
"""


def said(before):
    done = subprocess.run(
        [sys.executable, '-c', CODE.format(before=before)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return done.stdout, done.stderr


def test_a_library_shows_warnings_alone():
    assert said('') == ('', 'warning: look at it\nof another\n')


def test_a_command_prints_all_of_it_once():
    before = 'from flax_densenet.system import logs\n' + 'logs.show_messages()\n' * 2
    # As absl does in a command.
    before += 'logging.basicConfig(level=logging.DEBUG)'
    out, err = said(before)
    assert out == '100 % of it\nwarning: look at it\n'
    assert err == 'WARNING:another:of another\n'


def test_a_command_prints_errors_to_standard_error():
    before = 'from flax_densenet.system import logs\nlogs.show_messages()\n'
    before += "logging.getLogger('flax_densenet.x').error('error: over')"
    out, err = said(before)
    assert out == '100 % of it\nwarning: look at it\n'
    assert err == 'error: over\nof another\n'


def test_rows_for_programs_are_left_alone():
    before = 'from flax_densenet.system import logs\n'
    before += 'logs.show_messages()\nlogs.show_messages(to_errors=True)'
    out, err = said(before)
    assert out == ''
    assert err == '100 % of it\nwarning: look at it\nof another\n'
