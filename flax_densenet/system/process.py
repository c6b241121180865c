"""Process-wide settings, which the commands make before anything else.

Importing the package changes nothing; a program that uses it as a library can call
`set_up` for the same speed, before it uses JAX.
"""

import ctypes
import logging
import os
import pathlib
import sys
import warnings

import jax
from absl import flags

_kept = False  # whether glibc keeps memory


def set_up(*, cache: pathlib.Path | None = None, deterministic: bool = False):
    """Prepares this process for training or prediction; call it before JAX starts.

    Args:
      cache: folder for compiled programs, so that the next start is faster; the
        environment variable JAX_COMPILATION_CACHE_DIR comes first.
      deterministic: GPUs give bit for bit the same results, at some cost in speed.
    """
    if not flags.FLAGS.is_parsed():  # grain and absl's logging read them
        flags.FLAGS(sys.argv[:1] or [''])
    quiet_pillow()
    keep_memory()
    if deterministic:
        before = os.environ.get('XLA_FLAGS', '')
        os.environ['XLA_FLAGS'] = f'{before} --xla_gpu_deterministic_ops=true'.strip()
    if cache is not None and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', str(cache))
    # If it cannot be read or written, programs are just compiled again.
    warnings.filterwarnings('ignore', r'Error (reading|writing) persistent compilation')
    # By default, programs that compile within a second, as for prediction, are not
    # kept.
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)


def quiet_pillow():
    """Silences warnings of Pillow and pydicom about odd files, and Pillow's log.

    It warns of unusual fields in EXIF and TIFF and of every image of more than 89
    million pixels, which would fill the screen for a large set of photographs. Files
    that cannot be read are reported by this package. pydicom's may quote a file.
    """
    from PIL import Image

    warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.')
    warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
    warnings.filterwarnings('ignore', category=UserWarning, module=r'pydicom\.')
    logging.getLogger('PIL').setLevel(logging.CRITICAL)


def keep_memory() -> bool:
    """Lets glibc keep the memory of a step for the next one; call it before any step.

    By default each large buffer goes back to the system at once and comes back as
    pages of zeros, with one fault per 4 KiB: some 15% of a training step of
    DenseNet-121 on two cores. A user's own settings (`GLIBC_TUNABLES`, `MALLOC_*`) are
    left alone; `FLAX_DENSENET_KEEP_MEMORY=0` switches it off.

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
    global _kept
    _kept = done
    return done


def release_memory():
    """Returns free memory to the system that `keep_memory` lets glibc keep.

    After the compilation of a step this is half of the process's memory. After the
    first step it is the space of its buffers, into which the second step does not fit
    again because of small blocks.
    """
    if _kept:
        ctypes.CDLL(None).malloc_trim(0)
