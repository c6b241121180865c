"""Builds `cpu_kernels.cc` with the machine's C++ compiler, once, and calls it.

The result is kept in the user's cache folder under a name made of the source, the
compiler's flags, JAX's version and the processor, so nothing stale is ever loaded.
Without a compiler the dense block runs through XLA alone, some three times slower.
"""

import concurrent.futures
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
import threading

import jax
import jaxlib
import numpy as np

_SOURCE = pathlib.Path(__file__).with_name('cpu_kernels.cc')
_FLAGS = ['-std=c++17', '-O3', '-ffp-contract=fast', '-fno-math-errno', '-shared']
# What is compiled into one file; the two take about as long.
_PARTS = (
    (
        'DenseBlockForwardTrain',
        'DenseBlockForwardEval',
        'DenseBlockForwardPacked',
        'StemForwardPacked',
        'StemForwardTrain',
        'StemForwardEval',
        'StemBackwardTrain',
    ),
    ('DenseBlockBackward',),
)
_LOCK = threading.Lock()
_LIBRARIES: list[ctypes.CDLL] = []


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


def load() -> str | None:
    """Makes the kernels ready to be called; None, or the reason why they cannot be.

    May be called from a thread ahead of time: the first call takes seconds, a second
    one waits for it.
    """
    with _LOCK:
        return _load()


@functools.cache
def _load():
    if os.environ.get('FLAX_DENSENET_CPU_KERNELS') == '0':
        return 'FLAX_DENSENET_CPU_KERNELS=0'
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            files = list(pool.map(_build, range(len(_PARTS))))
        libraries = [ctypes.CDLL(str(file)) for file in files]
    except (OSError, subprocess.SubprocessError) as error:
        return ' '.join(str(error).split())
    _LIBRARIES[:] = libraries
    for library, names in zip(libraries, _PARTS, strict=True):
        for name in names:
            handler = jax.ffi.pycapsule(getattr(library, name))
            target = f'flax_densenet_{name}'
            jax.ffi.register_ffi_target(target, handler, platform='cpu')
    return None


def _build(part):
    """The library of one part: from the cache, else compiled."""
    named = os.environ.get('CXX')
    compiler = shutil.which(named) if named else None
    compiler = compiler or next(filter(None, map(shutil.which, ('c++', 'g++'))), None)
    if compiler is None:
        raise OSError('no C++ compiler (c++, g++ or $CXX) is installed')
    flags = [*_FLAGS, f'-DFLAX_DENSENET_PART={part}']
    key = [repr(flags), compiler, jaxlib.__version__, _processor()]
    key = b'\0'.join([_SOURCE.read_bytes(), *(text.encode() for text in key)])
    folder = cache_folder() / 'kernels'
    target = folder / f'{hashlib.sha256(key).hexdigest()[:24]}.so'
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    arch = ['-mcpu=native'] if platform.machine() == 'arm64' else ['-march=native']
    with tempfile.TemporaryDirectory(dir=folder) as building:
        output = os.path.join(building, 'kernels.so')
        command = [compiler, *flags, *arch, '-I', jax.ffi.include_dir()]
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


def call(name: str, result_shapes, *args, epsilon: float | None = None, **sizes: int):
    """Calls a handler of `cpu_kernels.cc`; arrays are float32 but where it says so."""
    function = jax.ffi.ffi_call(
        f'flax_densenet_{name}', result_shapes, vmap_method='sequential'
    )
    attributes = {name: np.int64(size) for name, size in sizes.items()}
    if epsilon is not None:
        attributes['epsilon'] = np.float32(epsilon)
    return function(*args, **attributes)


def panel() -> tuple[int, int]:
    """Columns of a panel of weights, and numbers of a vector register; after `load`."""
    return tuple((ctypes.c_int * 2).in_dll(_LIBRARIES[0], 'flax_densenet_panel'))


def keep_memory() -> bool:
    """Lets glibc keep the memory of a step for the next one; call before any step.

    By default each large buffer goes back to the system at once and comes back as
    pages of zeros, one fault for each 4 KiB: some 15 % of a training step of
    DenseNet-121 on two cores. Leaves a user's own settings (`GLIBC_TUNABLES`,
    `MALLOC_*`) alone; `FLAX_DENSENET_KEEP_MEMORY=0` switches it off.

    Returns:
      Whether anything was set.
    """
    own = os.environ.get('GLIBC_TUNABLES') or any(
        name.startswith('MALLOC_') for name in os.environ
    )
    if own or os.environ.get('FLAX_DENSENET_KEEP_MEMORY') == '0':
        return False
    if not sys.platform.startswith('linux'):
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    mmap_threshold, trim_threshold, arena_max, most = -3, -1, -8, 2**31 - 1
    # One arena: the others cannot grow beyond 64 MiB and would map each buffer.
    done = all(
        mallopt(name, value)
        for name, value in (
            (arena_max, 1),
            (trim_threshold, most),
            (mmap_threshold, most),
        )
    )
    # Else a step begins before the memory of the one before it is free, takes new
    # memory, and the heap keeps both: up to 3.2 instead of 2.1 GiB for the 121.
    jax.config.update('jax_cpu_enable_async_dispatch', False)
    return done
