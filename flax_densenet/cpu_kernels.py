"""Builds `cpu_kernels.cc` with the machine's C++ compiler, once, and calls it.

The result is kept in the user's cache folder under a name made of the source, the
compiler's flags, JAX's version and the processor, so nothing stale is ever loaded.
Without a compiler the dense block runs through XLA alone, some three times slower.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

import jax
import jaxlib

_SOURCE = pathlib.Path(__file__).with_name('cpu_kernels.cc')
_FLAGS = ['-std=c++17', '-O3', '-ffp-contract=fast', '-fno-math-errno', '-shared']
_HANDLERS = ('DenseBlockForwardTrain', 'DenseBlockForwardEval', 'DenseBlockBackward')


def cache_folder() -> pathlib.Path:
    """Where compiled code is kept: `$XDG_CACHE_HOME` or ~/.cache, /flax_densenet."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return pathlib.Path(base) / 'flax_densenet'


def _processor():
    """What decides which instructions `-march=native` means."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.platform()
    return '\n'.join(
        sorted({line for line in lines if line.startswith(('model name', 'flags'))})
    )


@functools.cache
def load() -> str | None:
    """Makes the kernels ready to be called; None, or the reason why they cannot be."""
    if os.environ.get('FLAX_DENSENET_CPU_KERNELS') == '0':
        return 'FLAX_DENSENET_CPU_KERNELS=0'
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        return ' '.join(str(error).split())
    for name in _HANDLERS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(f'flax_densenet_{name}', handler, platform='cpu')
    return None


def _build():
    named = os.environ.get('CXX')
    compiler = shutil.which(named) if named else None
    compiler = compiler or next(filter(None, map(shutil.which, ('c++', 'g++'))), None)
    if compiler is None:
        raise OSError('no C++ compiler (c++, g++ or $CXX) is installed')
    source = _SOURCE.read_bytes()
    parts = [source, repr(_FLAGS), compiler, jaxlib.__version__, _processor()]
    parts = [part if isinstance(part, bytes) else part.encode() for part in parts]
    key = hashlib.sha256(b'\0'.join(parts)).hexdigest()[:24]
    folder = cache_folder() / 'kernels'
    target = folder / f'{key}.so'
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    arch = ['-mcpu=native'] if platform.machine() == 'arm64' else ['-march=native']
    with tempfile.TemporaryDirectory(dir=folder) as building:
        output = os.path.join(building, 'kernels.so')
        command = [compiler, *_FLAGS, *arch, '-I', jax.ffi.include_dir()]
        if sys.platform != 'win32':
            command.append('-fPIC')
        done = subprocess.run(
            [*command, str(_SOURCE), '-o', output], capture_output=True, text=True
        )
        if done.returncode:
            errors = [x for x in done.stderr.splitlines() if 'error' in x]
            raise OSError(f'{compiler} failed: {(errors or ["unknown"])[0]}')
        os.replace(output, target)  # whole or not at all, also with two at once
    return target


def call(name: str, result_shapes, *args, epsilon: float):
    """Calls a handler of `cpu_kernels.cc` on float32 arrays."""
    import numpy as np

    function = jax.ffi.ffi_call(
        f'flax_densenet_{name}', result_shapes, vmap_method='sequential'
    )
    return function(*args, epsilon=np.float32(epsilon))
