"""Saves leave nothing behind in memory, and say the same as tensorstore does."""

import json
import subprocess
import sys

import pytest

from helpers.paths import ROOT

# In a process of its own: the method is replaced for good.
SCRIPT = """
import json, sys, types, tensorstore
package = types.ModuleType('flax_densenet')  # the whole of it would import JAX
package.__path__ = ['flax_densenet']
sys.modules['flax_densenet'] = package
from flax_densenet.checkpoints import tensorstore_leak

def left_behind():
    before = sys.getallocatedblocks()
    for _ in range(5000):
        plain.to_json()
    return sys.getallocatedblocks() - before

plain = tensorstore.KvStore.Spec({'driver': 'file', 'path': '/run/'})
specs = [tensorstore.KvStore.Spec(value) for value in json.loads(sys.argv[1])]
both = lambda: [[s.to_json(), s.to_json(include_defaults=True)] for s in specs]
found = {'left': [left_behind()], 'json': [both()]}
tensorstore_leak.patch_to_json()
tensorstore_leak.patch_to_json()
found['left'].append(left_behind())
found['json'].append(both())
print(json.dumps(found))
"""
SPECS = [
    {'driver': 'file', 'path': '/run/'},
    {'driver': 'file', 'path': '/a run\'s "é"\n/', 'file_io_sync': False},
    {'driver': 'file', 'path': '/läufe/'},
    {
        'driver': 'ocdbt',
        'base': {
            'driver': 'file',
            'path': '/run/',
            'file_io_locking': {'mode': 'non_atomic'},
        },
        'config': {'max_inline_value_bytes': 0},
        'cache_pool': 'cache_pool#ocdbt',
    },
    'gs://bucket/run/',
]


@pytest.fixture(scope='module')
def found():
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, json.dumps(SPECS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
def test_json_is_the_same(found):
    before, after = found['json']
    assert before == after and len(before) == len(SPECS)


def test_nothing_is_left_behind(found):
    """Where the first fails tensorstore has mended it: the module can go."""
    before, after = found['left']
    assert before > 15_000
    assert after < 2000  # what Python itself keeps ready
