"""Builds `cpu_kernels.cc` with the machine's C++ compiler, once, and calls it.

The library is kept in the user's cache folder. Its name is a hash of the source, the
compiler's flags, the JAX version and the processor, so a stale one is never loaded.
Without a compiler the dense block runs through XLA, about three times slower.
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
# The handlers in each file; both files take about the same time to compile.
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
    """The folder of compiled code: `flax_densenet` in `$XDG_CACHE_HOME` or ~/.cache."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return pathlib.Path(base) / 'flax_densenet'


def _processor():
    """A text that determines the instructions of `-march=native`."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.platform()
    return '\n'.join(
        sorted({line for line in lines if line.startswith(('model name', 'flags'))})
    )


def load() -> str | None:
    """Builds and loads the kernels.

    The first call takes seconds. It can be made from a thread ahead of time; a second
    call waits for it.

    Returns:
      None, or the reason why the kernels cannot be used.
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
    """Path of the library of one part, compiled unless it is in the cache."""
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
        os.replace(output, target)  # atomic, even if two processes build it
    return target


def call(name: str, result_shapes, *args, epsilon: float | None = None, **sizes: int):
    """Calls a handler of `cpu_kernels.cc`."""
    function = jax.ffi.ffi_call(
        f'flax_densenet_{name}', result_shapes, vmap_method='sequential'
    )
    attributes = {name: np.int64(size) for name, size in sizes.items()}
    if epsilon is not None:
        attributes['epsilon'] = np.float32(epsilon)
    return function(*args, **attributes)


def panel() -> tuple[int, int]:
    """Columns of a panel of weights, and floats of a vector register. Needs `load`."""
    return tuple((ctypes.c_int * 2).in_dll(_LIBRARIES[0], 'flax_densenet_panel'))


def load_ahead():
    """Starts `load` in a thread, if computation is on the CPU.

    The first time, it compiles for some seconds; started here, it is ready when the
    data is.
    """
    if jax.default_backend() == 'cpu':
        threading.Thread(target=load, daemon=True).start()
