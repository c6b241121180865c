"""Importing the package changes nothing in the process; the command's set-up does."""

import ast
import json
import subprocess
import sys

import pytest

from helpers.paths import ROOT

# Imports OTHERS, then OURS, then sets up: what each of the last two changes and prints.
CODE = """
import contextlib, importlib, io, json, logging, os, sys, warnings

def state():
    loggers = {'': logging.getLogger(), **logging.getLogger().manager.loggerDict}
    changed = {
        name: (logger.level, len(logger.handlers), len(logger.filters))
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger)
    }
    return {
        'environment': dict(os.environ),
        'warnings': list(map(str, warnings.filters)),
        'logging': {n: found for n, found in changed.items() if any(found)},
    }

def run(action):
    before, said = state(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        action()
    after = state()
    return [said.getvalue(), [name for name in after if after[name] != before[name]]]

def load(names):
    for name in names:
        importlib.import_module(name)

def refuse(*arguments, **options):
    print('a connection', arguments)

others, ours = json.loads(sys.argv[1])
load(others)  # what they do themselves is not ours
import socket
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
imported = run(lambda: load(ours))
from flax_densenet.system import process
print(json.dumps([imported, run(lambda: process.set_up(deterministic=True))]))
"""


def modules():
    """Every module of the package, and what these import from elsewhere at once."""
    others, ours = set(), []
    for path in sorted((ROOT / 'flax_densenet').rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        ours.append('.'.join(parts).removesuffix('.__init__'))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                others |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                others.add(node.module)
    return sorted(name for name in others if name.split('.')[0] != ours[0]), ours


@pytest.mark.slow
def test_importing_changes_nothing():
    others, ours = modules()
    assert len(ours) > 100 and 'jax' in others
    done = subprocess.run(
        [sys.executable, '-c', CODE, json.dumps([others, ours])],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    imported, set_up = json.loads(done.stdout)
    assert imported == ['', []]
    assert set_up == ['', ['environment', 'warnings', 'logging']]
    assert done.stderr == ''
