"""Which libraries of a wheel are loaded, and what happens if none can be."""

import pathlib

import jax
import pytest

from flax_densenet.kernels import compiling
from flax_densenet.kernels import cpu as cpu_kernels
from helpers.blocks import require_native

V3 = {'avx', 'avx2', 'bmi1', 'bmi2', 'f16c', 'fma', 'abm', 'movbe'}
V4 = V3 | {'avx512f', 'avx512bw', 'avx512cd', 'avx512dq', 'avx512vl'}
NO_COMPILER = 'no C++ compiler (c++, g++ or $CXX) is installed'


def set_flags(monkeypatch, flags):
    text = f'model name : x\nflags\t\t: {" ".join(sorted(flags))}'
    monkeypatch.setattr(cpu_kernels, '_processor', lambda: text)


@pytest.fixture
def compiled(monkeypatch):
    """The libraries that this machine compiled are found without its compiler."""
    require_native()
    files = {k: pathlib.Path(v._name) for k, v in cpu_kernels._LIBRARIES.items()}
    monkeypatch.setattr(cpu_kernels, '_build', lambda source, level: files[source])


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """The folder of a package that holds libraries which no loader accepts."""
    for level, source in compiling.in_wheel():
        file = tmp_path / 'built' / level / f'{source.stem}.so'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b'not a library')
    for path in compiling.FOLDER.glob('*.[ch]*'):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(compiling, 'FOLDER', tmp_path)
    monkeypatch.delenv('FLAX_DENSENET_CPU_KERNELS', raising=False)
    return tmp_path


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)


def load():
    return cpu_kernels._load_parts(cpu_kernels._FLOAT32)


@pytest.mark.parametrize(
    ('flags', 'float32', 'bfloat16'),
    [
        (V3, 'avx2', 'avx2'),
        (V4 - {'avx512vl'}, 'avx2', 'avx2'),
        (V4, 'avx512', 'avx512'),
        (V4 | {'avx512_bf16', 'amx_tile'}, 'avx512', 'avx512bf16'),
        (V3 | {'avx512_bf16'}, 'avx2', 'avx2'),
    ],
)
def test_the_best_level_of_the_processor(wheel, monkeypatch, flags, float32, bfloat16):
    set_flags(monkeypatch, flags)
    for source, level in (
        ('cpu_float32_stem.cc', float32),
        ('cpu_bf16_training.cc', bfloat16),
    ):
        found = cpu_kernels._packaged(source, level=None)
        assert found == wheel / 'built' / level / source.replace('.cc', '.so')


def test_a_level_of_ones_own(wheel, monkeypatch):
    set_flags(monkeypatch, V4 | {'avx512_bf16'})
    for level in ('avx512bf16', 'avx512', 'avx2'):
        found = cpu_kernels._packaged('cpu_bf16_training.cc', level=level)
        assert found.parent.name == level
    # In float32 there is none of its own.
    found = cpu_kernels._packaged('cpu_float32_stem.cc', level='avx512bf16')
    assert found.parent.name == 'avx512'


@pytest.mark.usefixtures('wheel', 'no_compiler')
@pytest.mark.parametrize(
    ('setting', 'flags', 'reason'),
    [
        (
            '',
            V3 - {'avx2'},
            f'they need avx2, which this processor lacks; {NO_COMPILER}',
        ),
        ('avx512', V3, 'avx512 needs avx512bw, which this processor lacks'),
        ('', V3, f'file too short; {NO_COMPILER}'),
        ('compile', V3, NO_COMPILER),
        ('0', V3, 'FLAX_DENSENET_CPU_KERNELS=0'),
        (
            'sse',
            V3,
            'FLAX_DENSENET_CPU_KERNELS=sse is none of 0, 1, compile, avx512bf16',
        ),
    ],
)
def test_why_there_is_no_kernel(monkeypatch, setting, flags, reason):
    set_flags(monkeypatch, flags)
    monkeypatch.setenv('FLAX_DENSENET_CPU_KERNELS', setting)
    found = load()
    for part in reason.split('; '):
        assert part in found
    assert ('of the wheel cannot be used' in found) == (
        setting not in ('compile', '0', 'sse')
    )


@pytest.mark.usefixtures('compiled', 'wheel')
def test_compiled_where_the_wheel_cannot_be_used(monkeypatch, capsys):
    set_flags(monkeypatch, V3)
    assert load() is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith('CPU kernels: those of the wheel cannot be used: ')
    assert line.endswith('file too short; they were compiled here instead')


@pytest.mark.usefixtures('compiled')
def test_another_version_of_jaxlib(monkeypatch):
    """XLA refuses handlers of a version that it cannot call."""
    monkeypatch.setenv('FLAX_DENSENET_CPU_KERNELS', 'compile')

    def refuse(target, handler, platform):
        raise jax.errors.JaxRuntimeError('API version (9.9)\nis incompatible')

    monkeypatch.setattr(jax.ffi, 'register_ffi_target', refuse)
    assert load() == 'API version (9.9) is incompatible'


@pytest.mark.parametrize(
    ('system', 'machine', 'setting', 'reason'),
    [
        ('linux', 'x86_64', '', None),
        ('linux', 'x86_64', '0', 'FLAX_DENSENET_BUILD_KERNELS=0'),
        ('linux', 'aarch64', '1', 'wheels have them only for Linux on x86-64'),
        ('darwin', 'arm64', '', 'wheels have them only for Linux on x86-64'),
    ],
)
def test_which_wheels_have_kernels(monkeypatch, system, machine, setting, reason):
    monkeypatch.setattr(compiling.sys, 'platform', system)
    monkeypatch.setattr(compiling.platform, 'machine', lambda: machine)
    monkeypatch.setattr(compiling, 'find_compiler', lambda: '/usr/bin/c++')
    environment = {'FLAX_DENSENET_BUILD_KERNELS': setting}
    assert compiling.why_not_in_wheel(environment) == reason
    monkeypatch.setattr(compiling, 'find_compiler', lambda: None)
    assert compiling.why_not_in_wheel(environment) == (reason or NO_COMPILER)
