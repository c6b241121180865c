"""A wheel with compiled kernels: it needs no compiler where it is installed."""

import re
import sys
import zipfile

import pytest

from helpers import distributions
from helpers.distributions import run
from helpers.paths import ROOT

CHECK = ROOT / 'tests' / 'helpers' / 'installed_kernels.py'
# Of the processor with the fewest instructions that a wheel has kernels for.
LEVEL = 'avx2'

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    return distributions.copy_checkout(tmp_path_factory.mktemp('checkout'))


@pytest.fixture(scope='module')
def wheel(checkout):
    """With the kernels of one level; all of them take minutes."""
    folder = checkout.parent / 'wheel'
    chosen = {'FLAX_DENSENET_BUILD_KERNELS': LEVEL}
    distributions.build('build_wheel', folder, cwd=checkout, **chosen)
    (wheel,) = folder.glob('*.whl')
    return wheel


@pytest.fixture(scope='module')
def python(wheel):
    return distributions.install(wheel, wheel.parent / 'venv') / 'python'


def without_compiler(folder):
    """The environment of a program on one device that finds no compiler."""
    hidden = {'PATH': '', 'CXX': '', 'XDG_CACHE_HOME': str(folder)}
    return hidden | {'XLA_FLAGS': ''}


def test_one_wheel_for_every_python(wheel):
    assert re.search(r'-py3-none-manylinux_2_\d+_x86_64\.whl$', wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.endswith('.so')}
    sources = (ROOT / 'flax_densenet' / 'kernels').glob('*.cc')
    folder = f'flax_densenet/kernels/built/{LEVEL}'
    assert found == {f'{folder}/{source.stem}.so' for source in sources}


def test_kernels_without_a_compiler(python, tmp_path):
    """They compute what XLA computes, and nothing is compiled."""
    out = run(python, '-I', CHECK, cwd=tmp_path, **without_compiler(tmp_path))
    line = rf'^(\w+): of the wheel \({LEVEL}\), off by ([\d.e-]+)$'
    off = dict(re.findall(line, out, re.M))
    assert off.keys() == {'float32', 'bfloat16'}, out
    assert float(off['float32']) < 1e-5
    assert 1e-4 < float(off['bfloat16']) < 0.05
    assert not (tmp_path / 'flax_densenet' / 'kernels').exists()


def test_a_processor_without_the_instructions(python, tmp_path):
    """One line says why, and XLA computes."""
    code = """
import jax
from flax_densenet.system import logs
logs.show_messages()
from flax_densenet.kernels import cpu
cpu._processor = lambda: 'flags\t: avx fma'
import flax_densenet
module = flax_densenet.create_model('BC-L10k4', num_classes=3)
variables = flax_densenet.init_variables(module, 0)
print(module.apply(variables, jax.numpy.ones((1, 8, 8, 3))).shape)
"""
    hidden = without_compiler(tmp_path)
    out = run(python, '-I', '-c', code, cwd=tmp_path, **hidden)
    assert out == (
        'the dense block runs without its CPU kernel: those of the wheel cannot be '
        'used: they need abm, which this processor lacks; and no C++ compiler (c++, '
        'g++ or $CXX) is installed; training and prediction are about three times '
        'slower; install g++ or set CXX\n(1, 3)\n'
    )


def test_another_version_of_jaxlib(python, tmp_path):
    """JAX starts all the same where it cannot call the handlers."""
    code = """
import pathlib
import jax
from flax_densenet.kernels import compiling, cpu
headers = pathlib.Path(jax.ffi.include_dir(), 'xla/ffi/api')
copy = pathlib.Path('xla/ffi/api')
copy.mkdir(parents=True)
for file in headers.iterdir():
    text = file.read_text().replace('XLA_FFI_API_MAJOR 0', 'XLA_FFI_API_MAJOR 9')
    (copy / file.name).write_text(text)
pathlib.Path('one.cc').write_text('''
#include "xla/ffi/api/ffi.h"
static xla::ffi::Error run() { return xla::ffi::Error::Success(); }
XLA_FFI_DEFINE_HANDLER_SYMBOL(One, run, xla::ffi::Ffi::Bind());
''')
compiling.run(pathlib.Path('one.cc'), 'one.so', include='.', instructions=['-O0'])
file = pathlib.Path('one.so').resolve()
print(cpu._try(lambda source, level: file, {'one.cc': ('One',)}, None))
print(jax.numpy.ones(3).sum())
"""
    out = run(python, '-I', '-c', code, cwd=tmp_path)
    assert re.search(r'API version \(9\.\d+\) is incompatible .*\n3\.0\n$', out), out


def test_without_a_compiler_the_wheel_is_pure(checkout, tmp_path):
    hidden = without_compiler(tmp_path)
    out = distributions.build('build_wheel', tmp_path, cwd=checkout, **hidden)
    (wheel,) = tmp_path.glob('*.whl')
    assert wheel.name.endswith('-py3-none-any.whl')
    (line,) = (line for line in out.splitlines() if 'no compiled CPU kernels' in line)
    assert 'no C++ compiler' in line and 'three times slower' in line
    # It holds nothing of an earlier build in the same folder.
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith('.so')]


def test_no_pure_wheel_where_kernels_are_wanted(checkout, tmp_path):
    hidden = without_compiler(tmp_path) | {'FLAX_DENSENET_BUILD_KERNELS': '1'}
    with pytest.raises(AssertionError, match=r'cannot be built: no C\+\+ compiler'):
        distributions.build('build_wheel', tmp_path, cwd=checkout, **hidden)


def test_an_editable_installation_compiles_nothing(checkout, tmp_path):
    distributions.build('build_editable', tmp_path, cwd=checkout)
    (wheel,) = tmp_path.glob('*.whl')
    assert wheel.name.endswith('-py3-none-any.whl')


def test_headers_are_needed_only_to_compile(checkout, tmp_path):
    code = (
        'import sys; sys.path.insert(0, "build_tools"); import backend as b; '
        'print(b.get_requires_for_build_wheel(), b.get_requires_for_build_editable())'
    )
    oldest = (ROOT / 'pyproject.toml').read_text()
    oldest = re.search(r'"jaxlib>=([\d.]+),', oldest)[1]
    out = run(sys.executable, '-c', code, cwd=checkout)
    assert out.splitlines()[-1] == f"['jaxlib=={oldest}'] []"
    hidden = without_compiler(tmp_path)
    out = run(sys.executable, '-c', code, cwd=checkout, **hidden)
    assert out.splitlines()[-1] == '[] []'
