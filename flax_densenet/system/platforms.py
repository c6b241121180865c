"""Differences between machines: JAX's devices, and functions of POSIX systems."""

import difflib
import os
import sys
from typing import BinaryIO

import jax

from flax_densenet.errors import UserError

_NAMES = ('JAX_PLATFORMS', 'JAX_PLATFORM_NAME')
_KNOWN = ('cpu', 'cuda', 'gpu', 'tpu', 'rocm')
_GPUS = ('cuda', 'gpu', 'rocm')


def is_chosen() -> bool:
    """Whether the environment names the devices to use."""
    return any(os.environ.get(name) for name in _NAMES)


def check_devices():
    """Starts JAX's devices, as requested by the environment.

    Raises:
      UserError: they do not exist here or cannot be started; the line names the
        available ones.
    """
    try:
        jax.devices()
    # jaxlib without plugins for GPUs fails with an assertion.
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(_explain(error)) from error


def _explain(error):
    reason = ' '.join(str(error).split()).removesuffix(
        " (set JAX_PLATFORMS='' to automatically choose an available backend)"
    )
    name = next((name for name in _NAMES if os.environ.get(name)), None)
    if name is None:
        return f'JAX cannot start its devices ({reason[:200]}); JAX_PLATFORMS=cpu may'
    wanted = os.environ[name]
    missing = wanted.strip().lower()
    there = _present()
    remedy = f'set it to {" or ".join(there)}, or unset it'
    if missing in there:
        remedy = f'did you mean {name}={missing}? Or unset it'
    elif missing not in _KNOWN and (
        close := difflib.get_close_matches(missing, _KNOWN, 1)
    ):
        remedy = f'did you mean {close[0]}? Otherwise {remedy}'
    elif missing in _GPUS:
        remedy += "; NVIDIA GPUs need pip install 'flax_densenet[cuda]' and a driver"
    why = f' ({reason[:200]})' if reason else ''
    return (
        f'{name}={wanted}: not available{why}; JAX finds {", ".join(there)}: {remedy}'
    )


def _present():
    """The available platforms, regardless of the environment."""
    before = jax.config.jax_platforms
    try:
        jax.config.update('jax_platforms', None)
        jax.config.update('jax_platform_name', '')
        found = {device.platform for device in jax.devices()} | {'cpu'}
    except (RuntimeError, AssertionError, ValueError, AttributeError):
        found = {'cpu'}
    finally:
        jax.config.update('jax_platforms', before)
    return sorted(found)


def read_at(file: BinaryIO, size: int, offset: int) -> bytes:
    """Reads bytes of a file at an offset.

    If the system supports it, threads can share the file.
    """
    if hasattr(os, 'pread'):
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)
    return file.read(size)


def peak_memory_bytes() -> int:
    """Peak memory of this process in bytes; 0 if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes() -> int:
    """Memory of this process in bytes; its peak if the system reports only that."""
    try:
        with open('/proc/self/statm') as file:
            return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except OSError:
        return peak_memory_bytes()


def max_open_files() -> int | None:
    """The limit on open files of this process; None for no limit."""
    try:
        import resource
    except ImportError:  # Windows: that of its C library
        return 512
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit < 0 else limit
