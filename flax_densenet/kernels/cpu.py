"""Loads the C++ kernels and calls them.

A wheel has kernels for several instruction sets (`compiling.LEVELS`), and the best set
for the processor is loaded. If there are none, as in a checkout, or they cannot be
used, the compiler of the machine builds them once. The libraries are kept in the user's
cache folder, named by a hash of the source, the compiler flags, the JAX version and the
processor, so a stale library is never loaded. Without a compiler the dense block runs
through XLA, about three times slower.

Set `$FLAX_DENSENET_CPU_KERNELS` to `0` to use no kernels, to `compile` to ignore those
of the wheel, or to one of `compiling.LEVELS` to get the same bits on different
processors.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import tempfile
import threading

import jax
import jaxlib
import numpy as np

from flax_densenet.kernels import compiling

_LOGGER = logging.getLogger(__name__)

# For each precision: the sources (compiled in parallel) and their handlers.
_FLOAT32 = {
    'cpu_float32_forward.cc': (
        'DenseBlockForwardTrain',
        'DenseBlockForwardEval',
        'DenseBlockForwardPacked',
        'DenseBlockForwardTrainTogether',
        'DropoutKeep',
        'CallNumber',
    ),
    'cpu_float32_backward.cc': ('DenseBlockBackward', 'DenseBlockBackwardTogether'),
    'cpu_float32_stem.cc': (
        'StemForwardPacked',
        'StemForwardTrain',
        'StemForwardEval',
        'StemBackwardTrain',
        'StemForwardTrainTogether',
        'StemBackwardTrainTogether',
    ),
}
_BFLOAT16 = {
    'cpu_bf16_inference.cc': (
        'DenseBlockForwardPackedBfloat16',
        'StemForwardPackedBfloat16',
    ),
    'cpu_bf16_training.cc': (
        'DenseBlockForwardTrainBfloat16',
        'DenseBlockBackwardBfloat16',
        'DenseBlockForwardTrainBfloat16Together',
        'DenseBlockBackwardBfloat16Together',
    ),
    'cpu_bf16_stem.cc': (
        'StemForwardTrainBfloat16',
        'StemForwardEvalBfloat16',
        'StemBackwardBfloat16',
        'StemForwardTrainBfloat16Together',
        'StemBackwardBfloat16Together',
    ),
    'cpu_bf16_transition.cc': (
        'TransitionForwardBfloat16',
        'TransitionBackwardBfloat16',
        'TransitionBackwardBfloat16Together',
    ),
}


def _rdnet_handlers(suffix):
    names = ('LayerForward', 'LayerBackward', 'TransitionForward', 'TransitionBackward')
    together = tuple(f'RDNet{x}{suffix}Together' for x in names if 'Backward' in x)
    return (f'RDNetPack{suffix}', *(f'RDNet{x}{suffix}' for x in names), *together)


_RDNET = {
    'float32': {'cpu_float32_rdnet.cc': _rdnet_handlers('')},
    'bfloat16': {'cpu_bf16_rdnet.cc': _rdnet_handlers('Bfloat16')},
}
# Ways to multiply bfloat16, in the order of `Path` in cpu_bf16.h; see `bfloat16_path`.
BFLOAT16_PATHS = ('amx', 'avx512', 'portable', 'emulated')
_LOCK = threading.Lock()
_LIBRARIES: dict[str, ctypes.CDLL] = {}  # by source


def cache_folder() -> pathlib.Path:
    """The folder of compiled code: `flax_densenet` in `$XDG_CACHE_HOME` or ~/.cache."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return pathlib.Path(base) / 'flax_densenet'


def _processor():
    """A text that identifies the instruction set of `-march=native`."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.platform()
    told = ('vendor_id', 'model name', 'flags')
    return '\n'.join(sorted({line for line in lines if line.startswith(told)}))


def vendor() -> str:
    """The vendor of the processor, such as `GenuineIntel`; empty if unknown."""
    for line in _processor().splitlines():
        name, _, value = line.partition(':')
        if name.strip() == 'vendor_id':
            return value.strip()
    return ''


def load(dtype: str = 'float32', family: str = 'densenet') -> str | None:
    """Builds and loads the kernels that compute in `dtype`, float32 or bfloat16.

    The first call takes seconds. It can run ahead of time in a thread; a second call
    waits for it.

    Args:
      dtype: the precision.
      family: the kind of network, `densenet` or `rdnet`.

    Returns:
      None, or the reason why the kernels cannot be used.
    """
    with _LOCK:
        if family == 'densenet':
            return _load() if dtype == 'float32' else _load_bfloat16()
        return _load_rdnet(dtype)


@functools.cache
def _load():
    return _load_parts(_FLOAT32)


@functools.cache
def _load_bfloat16():
    return _load_parts(_BFLOAT16)


@functools.cache
def _load_rdnet(dtype):
    return _load_parts(_RDNET[dtype])


def _load_parts(sources):
    chosen = os.environ.get('FLAX_DENSENET_CPU_KERNELS', '')
    choices = ('0', '1', 'compile', *compiling.LEVELS)
    if chosen == '0':
        return 'FLAX_DENSENET_CPU_KERNELS=0'
    if chosen and chosen not in choices:
        return f'FLAX_DENSENET_CPU_KERNELS={chosen} is none of {", ".join(choices)}'
    level = chosen if chosen in compiling.LEVELS else None
    reason = None
    if chosen != 'compile' and (compiling.FOLDER / 'built').exists():
        reason = _try(_packaged, sources, level)
        if reason is None:
            return None
        reason = f'those of the wheel cannot be used: {reason}'
    why_not_compiled = _try(_build, sources, level)
    if why_not_compiled is None:
        if reason:
            _LOGGER.warning(f'CPU kernels: {reason}; they were compiled here instead')
        return None
    return f'{reason}; and {why_not_compiled}' if reason else why_not_compiled


def _try(find, sources, level):
    """Loads the libraries that `find` finds; returns None, or why it cannot."""
    try:
        if level and (lacking := compiling.lacking(level, _processor_flags())):
            raise OSError(f'{level} needs {lacking[0]}, which this processor lacks')
        with concurrent.futures.ThreadPoolExecutor() as pool:
            files = list(pool.map(functools.partial(find, level=level), sources))
        libraries = [ctypes.CDLL(str(file)) for file in files]
        handlers = {
            f'flax_densenet_{name}': jax.ffi.pycapsule(getattr(library, name))
            for names, library in zip(sources.values(), libraries, strict=True)
            for name in names
        }
        # Before the backend has started, XLA only records what is registered. It then
        # fails to start if it finds a handler of a version that it cannot call.
        jax.local_devices(backend='cpu')
        for target, handler in handlers.items():
            jax.ffi.register_ffi_target(target, handler, platform='cpu')
    except (OSError, AttributeError, RuntimeError) as error:
        return ' '.join(str(error).split())
    _LIBRARIES.update(zip(sources, libraries, strict=True))
    return None


def _processor_flags():
    lines = [x for x in _processor().splitlines() if x.startswith('flags')]
    return set(lines[0].split()) if lines else set()


def _packaged(source, *, level):
    """The library in the wheel for a source and this processor, at most `level`."""
    names, flags = list(compiling.LEVELS), _processor_flags()
    for name in names[names.index(level) if level else 0 :]:
        file = compiling.packaged(name, source)
        lacking = compiling.lacking(name, flags)
        if file.exists() and not lacking:
            return file
    # The last level needs the fewest features.
    if lacking:
        raise OSError(f'they need {lacking[0]}, which this processor lacks')
    raise OSError(f'there is none of {source}')


def bfloat16_path(path: str | None = None) -> str:
    """The method for multiplying bfloat16 matrices, one of `BFLOAT16_PATHS`.

    Needs `load('bfloat16')`; a chosen method applies to the kernels that are loaded.
    `amx` and `avx512` (AVX512-BF16) use instructions of the processor; `portable`
    widens to float32. The fastest one is chosen, or the one in $FLAX_DENSENET_BFLOAT16.

    Args:
      path: for tests, the method to use from now on; `emulated` computes the same as
        `amx` without its instructions.

    Raises:
      ValueError: the method is unknown, or the processor does not support it.
    """
    if path is not None and path not in BFLOAT16_PATHS:
        raise ValueError(f'{path} is not known; use one of {", ".join(BFLOAT16_PATHS)}')
    wanted = -1 if path is None else BFLOAT16_PATHS.index(path)
    used = {
        library.flax_densenet_bfloat16_path(wanted)
        for source, library in _LIBRARIES.items()
        if 'bf16' in source
    }
    if used == {-1}:
        raise ValueError(f'this processor does not support {path}')
    return BFLOAT16_PATHS[used.pop()]


def why_bfloat16_is_slow(family: str = 'densenet') -> str | None:
    """Why the kernels are not faster in bfloat16 than in float32; None if they are."""
    if reason := load('bfloat16', family):
        return reason
    path = bfloat16_path()
    if path == 'avx512' and vendor() == 'GenuineIntel':
        return "this processor's AVX512-BF16 is no faster than float32"
    if path not in ('amx', 'avx512'):
        return 'this processor has no instructions for it (AMX or AVX512-BF16)'
    return None


def _build(source, *, level):
    """The library for one source, compiled unless it is in the cache."""
    compiler = compiling.find_compiler()
    if compiler is None:
        raise OSError(compiling.NO_COMPILER)
    native = '-mcpu=native' if platform.machine() == 'arm64' else '-march=native'
    instructions = compiling.LEVELS[level] if level else (native,)
    key = [repr([*compiling.FLAGS, *instructions]), compiler, jaxlib.__version__]
    key.append(_processor())
    sources = [compiling.FOLDER / source, *sorted(compiling.FOLDER.glob('*.h'))]
    key = [file.read_bytes() for file in sources] + [text.encode() for text in key]
    folder = cache_folder() / 'kernels'
    name = hashlib.sha256(b'\0'.join(key)).hexdigest()[:24]
    target = folder / f'{name}.so'
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / f'{name}.lock'):
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=folder) as building:
            output = os.path.join(building, 'kernels.so')
            compiling.run(
                sources[0],
                output,
                include=jax.ffi.include_dir(),
                instructions=instructions,
            )
            os.replace(output, target)  # atomic: a file here is complete
    return target


@contextlib.contextmanager
def _alone(path):
    """Waits while another process compiles the same; several often start together."""
    import filelock

    lock = filelock.FileLock(path)
    with contextlib.ExitStack() as stack:
        # On a file system without locks, each process compiles.
        with contextlib.suppress(OSError, NotImplementedError):
            stack.enter_context(lock)
        yield


def call(
    name: str,
    result_shapes,
    *args,
    has_side_effect: bool = False,
    **attributes: int | float | np.ndarray,
):
    """Calls a handler of the C++ kernels, with int64 and float32 attributes.

    Args:
      has_side_effect: False allows XLA to merge two calls with the same arguments.
    """
    function = jax.ffi.ffi_call(
        f'flax_densenet_{name}',
        result_shapes,
        vmap_method='sequential',
        has_side_effect=has_side_effect,
    )
    return function(*args, **{key: _typed(value) for key, value in attributes.items()})


def _typed(value):
    if isinstance(value, np.ndarray):
        return value
    return np.int64(value) if isinstance(value, int) else np.float32(value)


def panel() -> tuple[int, int]:
    """Columns in a panel of weights, and floats in a vector register. Needs `load`."""
    library = _LIBRARIES['cpu_float32_forward.cc']
    return tuple((ctypes.c_int * 2).in_dll(library, 'flax_densenet_panel'))


def load_ahead(dtype: str = 'float32', family: str = 'densenet'):
    """Starts `load` in a thread, if computation is on the CPU.

    The first call compiles for some seconds. Started early, it is ready when the data
    is.

    Args:
      dtype, family: as of `load`. Float32 is loaded as well, and first.

    Returns:
      The thread; None where nothing is loaded.
    """
    if jax.default_backend() != 'cpu':
        return None

    def load_all():
        load('float32', family)
        if dtype == 'bfloat16':
            load(dtype, family)

    thread = threading.Thread(target=load_all, daemon=True)
    thread.start()
    return thread
