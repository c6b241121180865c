"""The wheel and the source distribution: what they hold, and that they work installed.

Each is installed into an environment of its own, outside the repository, that finds all
other packages where these tests find them.
"""

import email
import tarfile
import tomllib
import zipfile

import pytest
from PIL import Image

from helpers import distributions
from helpers.distributions import run
from helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
IMPORT_ALL = """
import importlib, pathlib, sys
import flax_densenet
root = pathlib.Path(flax_densenet.__file__).parent
assert sys.prefix in str(root), root
names = []
for path in sorted(root.rglob('*.py')):
    parts = path.relative_to(root.parent).with_suffix('').parts
    names.append('.'.join(parts).removesuffix('.__init__'))
for name in names:
    if not name.endswith('__main__'):
        importlib.import_module(name)
print(len(names))
"""
TINY = (
    *('--config.model.variant=BC-L10k4', '--config.data.image_size=8'),
    *('--config.data.batch_size=700', '--config.train.epochs=1'),
)


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Folder with the sdist, the wheel of the checkout, and that of the sdist."""
    folder = tmp_path_factory.mktemp('built')
    checkout = distributions.copy_checkout(folder)
    pure = {'FLAX_DENSENET_BUILD_KERNELS': '0'}
    distributions.build('build_sdist', folder, cwd=checkout)
    distributions.build('build_wheel', folder / 'wheel', cwd=checkout, **pure)
    (sdist,) = folder.glob('*.tar.gz')
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter='data')
    unpacked = folder / sdist.name.removesuffix('.tar.gz')
    distributions.build('build_wheel', folder / 'sdist', cwd=unpacked, **pure)
    return folder


def wheel_of(built, kind):
    (wheel,) = (built / kind).glob('*.whl')
    return wheel


def files_of(wheel):
    """Content by name, without the list of the files."""
    with zipfile.ZipFile(wheel) as archive:
        names = (name for name in archive.namelist() if not name.endswith('RECORD'))
        return {name: archive.read(name) for name in names}


@pytest.mark.slow
def test_wheel_holds_the_package_and_the_recipes(built):
    found = files_of(wheel_of(built, 'wheel'))
    code = {name for name in found if '.dist-info/' not in name}
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / 'flax_densenet').rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }
    recipes = {f'flax_densenet/configs/{p.name}' for p in (ROOT / 'configs').glob('*')}
    recipes -= {'flax_densenet/configs/__pycache__'}
    # In a checkout, this one stands for the top-level folder.
    assert code == package - {'flax_densenet/configs/__init__.py'} | recipes
    assert {
        'flax_densenet/py.typed',
        'flax_densenet/kernels/cpu_float32_forward.cc',
    } <= code
    assert 'flax_densenet/kernels/cpu_bf16.h' in code
    assert wheel_of(built, 'wheel').name.endswith('-py3-none-any.whl')


@pytest.mark.slow
def test_wheel_of_the_source_distribution_is_the_same(built):
    assert files_of(wheel_of(built, 'sdist')) == files_of(wheel_of(built, 'wheel'))


@pytest.mark.slow
def test_source_distribution_has_no_tests(built):
    (sdist,) = built.glob('*.tar.gz')
    with tarfile.open(sdist) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    assert {'LICENSE', 'README.md', 'pyproject.toml', 'configs/base.py'} <= names
    assert {'setup.py', 'build_tools/backend.py'} <= names
    assert not any(name.startswith('tests') for name in names)


@pytest.mark.slow
def test_metadata(built):
    files = files_of(wheel_of(built, 'wheel'))
    (name,) = (name for name in files if name.endswith('.dist-info/METADATA'))
    metadata = email.message_from_bytes(files[name])
    assert metadata['License-Expression'] == 'Apache-2.0'
    assert metadata['Author'] == 'flax_densenet contributors'
    assert metadata['Keywords'] and metadata['Project-URL'] and metadata['Summary']
    assert metadata['Description-Content-Type'] == 'text/markdown'
    license = files[name.replace('METADATA', 'licenses/LICENSE')].decode()
    assert 'Apache License' in license and 'END OF TERMS AND CONDITIONS' in license
    entry_points = files[name.replace('METADATA', 'entry_points.txt')].decode()
    assert 'flax-densenet = flax_densenet.cli.main:entry' in entry_points


def test_all_has_every_extra():
    """But for TensorFlow, the packages of tests, and trackers, which bring many."""
    extras = PROJECT['optional-dependencies']
    text = ' '.join(extras['all'])
    apart = {'all', 'test', 'dev', 'prepare', 'wandb', 'mlflow', 'trackio'}
    for name in extras.keys() - apart:
        assert name in text
    core = ' '.join(PROJECT['dependencies'])
    for name in ('matplotlib', 'jinja2', 'tensorboardX', 'optuna', 'onnx'):
        assert name not in core


@pytest.fixture(
    scope='module',
    params=['wheel', pytest.param('sdist', marks=pytest.mark.exhaustive)],
)
def installed(request, built, tmp_path_factory):
    """`bin` of an environment with nothing but the distribution and its packages."""
    root = tmp_path_factory.mktemp(request.param) / 'venv'
    return distributions.install(wheel_of(built, request.param), root)


@pytest.mark.slow
def test_every_module_can_be_imported(installed, tmp_path):
    count = int(run(installed / 'python', '-c', IMPORT_ALL, cwd=tmp_path))
    assert count > 150


@pytest.mark.slow
def test_command_trains_predicts_and_reports(installed, tmp_path):
    command = installed / 'flax-densenet'
    out = run(command, 'train', '--config=densenet121', *TINY, cwd=tmp_path)
    assert 'Epoch:  1.' in out and 'ckpt/densenet121' in out
    Image.new('RGB', (20, 20)).save(tmp_path / 'black.png')
    out = run(command, 'predict', 'ckpt/densenet121', 'black.png', cwd=tmp_path)
    assert 'black.png' in out
    page = tmp_path / 'ckpt' / 'densenet121' / 'report.html'
    page.unlink()
    run(command, 'report', 'ckpt/densenet121', cwd=tmp_path)
    assert '<svg' in page.read_text() and page.stat().st_size > 100_000
    assert (page.parent / 'curves.png').exists()


@pytest.mark.slow
def test_python_m_and_the_interface(installed, tmp_path):
    python = installed / 'python'
    assert 'predict' in run(python, '-m', 'flax_densenet', '--help', cwd=tmp_path)
    code = 'import flax_densenet as d; print(d.get_config("cifar:quick").train.epochs)'
    assert run(python, '-c', code, cwd=tmp_path) == '13\n'
