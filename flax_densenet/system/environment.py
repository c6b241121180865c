"""The environment of a run: versions, devices, the commit of the code."""

import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import jax

from flax_densenet.system import program

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def describe() -> dict[str, Any]:
    """Strings and numbers by name, for `environment.json` and the report."""
    devices = jax.devices()
    return {
        'device': device_name(devices[0]),
        'devices': len(devices),
        'hosts': jax.process_count(),
        'system': f'{platform.system()} {platform.machine()}',
        **versions(),
        'commit': _commit(),
        'command': program.command(),
    }


def versions() -> dict[str, str]:
    """The versions of Python and of packages that results may depend on."""
    return {'python': platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }


def device_name(device) -> str:
    """The name of a JAX device; for a CPU the name of its processor."""
    if device.platform != 'cpu':
        return device.device_kind
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(':', 1)[1].strip() for line in lines if 'model name' in line]
    return names[0] if names else platform.processor() or 'CPU'


def _commit():
    """The commit of this package's checkout, with `+` if files differ from it."""
    folder = pathlib.Path(__file__).resolve().parents[2]
    if not (folder / '.git').exists():
        return None

    def git(*arguments):
        done = subprocess.run(
            ['git', '-C', str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git('rev-parse', 'HEAD')
        return commit and commit + ('+' if git('status', '--porcelain', '-uno') else '')
    except (OSError, subprocess.TimeoutExpired):
        return None
