"""Imports run one way; every recipe is whole; nothing heavy is imported early."""

import ast
import functools
import importlib
import itertools
import pathlib
import re

import pytest

from configs import base
from flax_densenet import settings
from flax_densenet.models import factory
from flax_densenet.train import finetune, optimizers, prepare
from flax_densenet.weights import transfer
from helpers.paths import ROOT

PACKAGE = ROOT / 'flax_densenet'
# What each package may import besides `errors` and `_version`, lowest first.
IMPORTS = {
    'settings': '',
    'system': '',
    'kernels': '',
    'distributed': '',
    'losses': '',
    'models': 'kernels settings',
    'data': 'system settings',
    'checkpoints': 'distributed system settings',
    'weights': 'settings models data checkpoints distributed system',
    'evaluation': 'settings weights models data losses distributed system',
    'inference': 'weights models data distributed system',
    'report': 'settings evaluation inference weights models data checkpoints '
    'distributed system',
    'serving': 'inference models data',
    'export': 'settings report evaluation inference weights models data checkpoints '
    'system',
    'train': 'evaluation weights models data losses checkpoints distributed system '
    'settings',
    'sweeps': 'settings train report evaluation inference weights data checkpoints '
    'distributed system',
}
# Whose files and functions are of some length at most.
LIMITED = ('flax_densenet', 'benchmarks', 'tests', 'examples')
RECIPES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))


@functools.cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path):
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, *rest = node.module.split('.')
            if package == 'flax_densenet':
                yield from [rest[0]] if rest else (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith('flax_densenet'), alias.name


@pytest.mark.parametrize('package', IMPORTS)
def test_packages_import_only_what_lies_below(package):
    """Each names only packages above it in the table, so there is no cycle."""
    allowed = set(IMPORTS[package].split())
    assert allowed <= set(itertools.takewhile(package.__ne__, IMPORTS))
    folder = PACKAGE / package
    files = [*folder.rglob('*.py')] or [folder.with_suffix('.py')]
    for path in files:
        used = set(imports(path)) - {'errors', '_version', package}
        assert used <= allowed, path


def test_all_packages_are_in_the_table():
    """Besides those that may import everything."""
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix in ('', '.py')}
    assert found - {'__pycache__'} - IMPORTS.keys() <= {
        *('__init__', '__main__', '_version', 'errors', 'cli', 'configs', 'api'),
    }


def test_few_modules_connect():
    """What a user names is downloaded or sent there, and nowhere else."""
    clients = (
        r'^\s*(?:import|from) (?:requests|urllib3|http|httpx|ftplib|smtplib|datasets|'
        r'huggingface_hub|tensorflow_datasets|wandb|mlflow|trackio)\b'
        r'|\b(?:urlopen|urlretrieve|create_connection|open_connection)\b'
    )
    found = {
        path.relative_to(PACKAGE).with_suffix('').as_posix()
        for path in PACKAGE.rglob('*.py')
        if re.search(clients, path.read_text(), re.MULTILINE)
    }
    assert found == {
        *('weights/download', 'weights/hub', 'system/hub', 'export/push'),
        *('data/hub_source', 'data/tfds_source', 'train/trackers'),
        'serving/openapi',  # an example for users, in a text
    }


def code_lines(function, lines):
    """How many there are without docstrings, comments and blank lines."""
    strings = {
        number
        for node in ast.walk(function)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for number in range(node.lineno, node.end_lineno + 1)
    }
    return sum(
        number not in strings and not re.match(r'\s*(#|$)', lines[number - 1])
        for number in range(function.lineno, function.end_lineno + 1)
    )


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.mark.parametrize('folder', LIMITED)
def test_files_and_functions_are_short(folder):
    """450 lines, and 70 of code; the C++ kernel is one file."""
    found = sorted((ROOT / folder).rglob('*.py'))
    assert found
    for path in found:
        lines = path.read_text().splitlines()
        assert len(lines) <= 450, path
        if len(lines) < 70:
            continue
        for node in nodes(path):
            if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= 70:
                assert code_lines(node, lines) <= 70, (path, node.name)


def test_the_library_prints_nothing():
    """Commands print; below them messages go through logging."""
    for path in PACKAGE.rglob('*.py'):
        if path.parent.name == 'cli' or path == PACKAGE / 'system' / 'terminal.py':
            continue
        for node in nodes(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != 'print', (path, node.lineno)


def test_tests_share_what_is_in_helpers():
    """None imports another file of tests, nor a conftest."""
    files = {path.stem for path in (ROOT / 'tests').rglob('test_*.py')} | {'conftest'}
    for path in (ROOT / 'tests').rglob('*.py'):
        for node in nodes(path):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f'{node.module}.{alias.name}' for alias in node.names]
            else:
                continue
            assert not files & {part for name in names for part in name.split('.')}, (
                path
            )


def test_no_config_below_the_door():
    door = {*(PACKAGE / 'cli').glob('*.py'), PACKAGE / 'api.py'}
    for path in set(PACKAGE.rglob('*.py')) - door:
        assert 'ml_collections' not in path.read_text()
        assert 'config.get(' not in path.read_text()


def fields(config, prefix=''):
    for name, value in config.items():
        if hasattr(value, 'items'):
            yield from fields(value, f'{prefix}{name}.')
        else:
            yield prefix + name


@pytest.mark.parametrize('name', RECIPES)
def test_recipes(name):
    """Only fields of base; a model and an optimizer come out; the page says how."""
    recipe = importlib.import_module(f'configs.{name}')
    config = recipe.get_config()
    assert set(fields(config)) == set(fields(base.get_config()))
    assert 'python launch.py' in recipe.__doc__
    made = transfer.resolve(settings.from_config(config), None)
    module = factory.from_settings(made.model, num_classes=2)
    schedule = optimizers.make_schedule(
        **vars(made.schedule), epochs=made.train.epochs, steps_per_epoch=10.0
    )
    plan = finetune.make_plan(module, epochs=1)
    assert prepare.make_optimizer(made, plan, schedule, None, head_steps=0)


def test_birds():
    """The recipe to reproduce, field by field."""
    config = importlib.import_module('configs.birds').get_config()
    settled = transfer.resolve(settings.from_config(config), None)
    assert settled.model.variant == 'densenet121'
    assert config.data.source == 'folder:data/bird_photos'
    assert (config.data.batch_size, config.train.epochs) == (4, 40)
    settled = settled.preparation
    assert settled.mean == (0.485, 0.456, 0.406)
    assert (settled.resize, settled.channels) == ('stretch', 3)
    assert config.optimizer.learning_rate == 1e-4
    config = importlib.import_module('configs.birds_tf').get_config()
    assert config.model.padding == 'same'
    assert config.model.initializer == 'glorot_normal'
    assert (config.model.momentum, config.model.epsilon) == (0.99, 1e-3)
    assert config.optimizer.l2_penalty == 5e-5
    assert (config.data.batch_size, config.data.split_seed) == (8, 123)
    from flax_densenet.weights import trained

    pixels = trained.normalize(
        pytest.importorskip('numpy').array([[[[0, 128, 255]]]], 'u1'),
        mean=config.data.mean,
        std=config.data.std,
    )
    assert pixels.ravel().tolist() == pytest.approx([0, 128, 255])


def test_no_file_of_another_project():
    assert pathlib.Path(ROOT / 'ckpt' / '.gitkeep').exists()
