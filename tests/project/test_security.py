"""The program runs nothing that a file says: no pickle, no eval, no shell, no names."""

import ast

import pytest

from helpers.paths import ROOT

FILES = [
    ROOT / 'launch.py',
    *sorted((ROOT / 'flax_densenet').rglob('*.py')),
    *sorted((ROOT / 'configs').glob('*.py')),
]
# What runs code that is data, or turns a name that is data into code.
BUILTINS = {'eval', 'exec', 'compile', '__import__', 'breakpoint', 'input'}
MODULES = {'pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve'}
MODULES |= {'code', 'codeop', 'runpy', 'importlib', 'imp', 'pty', 'commands'}
MODULES |= {'subprocess', 'ctypes', 'yaml', 'xml', 'tarfile', 'multiprocessing'}
CALLS = {'os.system', 'os.popen', 'os.startfile', 'torch.load', 'np.load', 'numpy.load'}
CALLS |= {
    'keras.models.load_model',
    'zipfile.ZipFile.extractall',
    'shutil.unpack_archive',
}
METHODS = {'extractall', 'extract', 'load_model', 'import_module', 'unpack_archive'}
# Each with its reason.
ALLOWED = {
    # The modules of its own table.
    'flax_densenet/__init__.py': {'importlib', 'import_module'},
    # Whether a package of an extra is installed.
    'flax_densenet/errors.py': {'importlib'},
    # Its classes are inert records; `find_class` decides, see test_weight_file.py.
    'flax_densenet/weights/torch_pickle.py': {'pickle'},
    # Raises pickle's error; reads instructions, makes no objects.
    'flax_densenet/weights/pickle_guard.py': {'pickle'},
    # The libraries of the package, or made by the compiler in the user's own cache.
    'flax_densenet/kernels/cpu.py': {'ctypes'},
    # The compiler.
    'flax_densenet/kernels/compiling.py': {'subprocess'},
    # mallopt, of the C library.
    'flax_densenet/system/process.py': {'ctypes'},
    # git, asked for the commit; the versions of packages.
    'flax_densenet/system/environment.py': {'subprocess', 'importlib'},
    # The recipe given as --config, which is code that the user runs (SECURITY.md).
    'flax_densenet/cli/recipes.py': {'importlib'},
    # Ends the decoding processes.
    'flax_densenet/system/signals.py': {'multiprocessing'},
    # A decoding process waits for the end of the one that started it.
    'flax_densenet/data/pipeline.py': {'multiprocessing'},
    # This file itself, which filters what C++ prints.
    'flax_densenet/distributed/native_errors.py': {'subprocess'},
    # Arrays alone, of processes of the same run.
    'flax_densenet/inference/multi_process.py': {'np.load'},
    # Arrays alone: allow_pickle is False unless it is said.
    'flax_densenet/inference/feature_files.py': {'np.load'},
    # Reads headers; nothing is extracted, and there is no such call.
    'flax_densenet/data/tar_samples.py': {'tarfile'},
    # This file itself, with a file that this program wrote a moment ago.
    'flax_densenet/export/runtimes.py': {
        *('importlib', 'subprocess', 'np.load'),
        *('torch.load', 'weights_only=', 'keras.models.load_model', 'load_model'),
    },
    'flax_densenet/report/render.py': {
        'importlib'
    },  # importlib.resources: our own pages
}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f'{dotted(node.value)}.{node.attr}'
    return node.id if isinstance(node, ast.Name) else ''


def find_dangers(source):
    """(line, what) of everything in the tables above, and of `shell=`."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition('.')[0] for alias in node.names]
            names = [name for name in names if name in MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or '').partition('.')[0]
            names = [module] if module in MODULES else []
            whole = [f'{node.module}.{alias.name}' for alias in node.names]
            names += [name for name in whole if name in CALLS]
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            names = [name] if name in BUILTINS | CALLS else []
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                names.append(node.func.attr)
            names += [
                f'{keyword.arg}=' for keyword in node.keywords
                if keyword.arg in ('shell', 'allow_pickle', 'weights_only')
            ]  # fmt: skip
        for name in names:
            yield node.lineno, name


@pytest.mark.parametrize('folder', sorted({path.parent for path in FILES}), ids=str)
def test_nothing_that_runs_data(folder):
    for path in [path for path in FILES if path.parent == folder]:
        allowed = ALLOWED.get(str(path.relative_to(ROOT)), set())
        found = set(find_dangers(path.read_text()))
        assert {danger for danger in found if danger[1] not in allowed} == set(), path
        # A name that is allowed and not there any more would hide the next one.
        assert allowed <= {name for _, name in found}, path


@pytest.mark.parametrize(
    ('source', 'name'),
    [
        ('import pickle', 'pickle'),
        ('from pickle import loads', 'pickle'),
        ('def f(x):\n    return eval(x)', 'eval'),
        ('exec("x")', 'exec'),
        ('import os\nos.system("x")', 'os.system'),
        ('from os import system', 'os.system'),
        ('run("x", shell=True)', 'shell='),
        ('import torch\ntorch.load("x")', 'torch.load'),
        ('import yaml', 'yaml'),
        ('np.load("x", allow_pickle=True)', 'allow_pickle='),
        ('archive.extractall()', 'extractall'),
        ('keras.models.load_model(x)', 'keras.models.load_model'),
        ('import importlib.util', 'importlib'),
    ],
)
def test_the_scan_sees(source, name):
    assert name in {found for _, found in find_dangers(source)}


def test_the_scan_lets_be():
    source = 'import re\nre.compile("x")\njax.eval_shape(f)\nmodel.eval()\njson.load(f)'
    assert not list(find_dangers(source))
