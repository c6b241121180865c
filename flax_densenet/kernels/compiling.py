"""Compiles the C++ kernels, for a wheel or for the processor of this machine.

setup.py runs this file on its own, so it imports only the standard library.
"""

import os
import pathlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

FLAGS = ('-std=c++17', '-O3', '-ffp-contract=fast', '-fno-math-errno', '-shared')
FOLDER = pathlib.Path(__file__).parent
NO_COMPILER = 'no C++ compiler (c++, g++ or $CXX) is installed'

# The instruction sets for which a wheel has kernels, the widest first, with the flags
# for the compiler. Each set includes those after it.
LEVELS = {
    'avx512bf16': ('-march=x86-64-v4', '-mavx512bf16'),
    'avx512': ('-march=x86-64-v4',),
    'avx2': ('-march=x86-64-v3',),
}
# The features that each level needs, by their names in /proc/cpuinfo.
_NEEDED = {
    'avx2': 'avx avx2 bmi1 bmi2 f16c fma abm movbe',
    'avx512': 'avx512f avx512bw avx512cd avx512dq avx512vl',
    'avx512bf16': 'avx512_bf16',
}


def lacking(level: str, flags: set[str]) -> list[str]:
    """What a processor with these `flags` (from /proc/cpuinfo) lacks for a level."""
    names = list(LEVELS)
    needed = ' '.join(_NEEDED[name] for name in names[names.index(level) :])
    return sorted(set(needed.split()) - flags)


def packaged(level: str, source: str) -> pathlib.Path:
    """The path in a wheel of the library for a source such as `cpu_float32_stem.cc`."""
    return FOLDER / 'built' / level / f'{pathlib.Path(source).stem}.so'


def in_wheel() -> list[tuple[str, pathlib.Path]]:
    """`(level, source)` of each library in a wheel.

    In float32, AVX512-BF16 makes no difference.
    """
    return [
        (level, source)
        for level in LEVELS
        for source in sorted(FOLDER.glob('*.cc'))
        if level != 'avx512bf16' or 'bf16' in source.name
    ]


def find_compiler() -> str | None:
    """The path of `$CXX`, `c++` or `g++`; None if there is none."""
    named = os.environ.get('CXX')
    found = shutil.which(named) if named else None
    return found or next(filter(None, map(shutil.which, ('c++', 'g++'))), None)


def why_not_in_wheel(environment: Mapping[str, str]) -> str | None:
    """Why a wheel that is built here has no compiled kernels; None if it has them.

    Set `$FLAX_DENSENET_BUILD_KERNELS` to `0` to build a wheel without kernels.
    """
    if environment.get('FLAX_DENSENET_BUILD_KERNELS') == '0':
        return 'FLAX_DENSENET_BUILD_KERNELS=0'
    if sys.platform != 'linux' or platform.machine() != 'x86_64':
        return 'wheels have them only for Linux on x86-64'
    return None if find_compiler() else NO_COMPILER


def run(
    source: pathlib.Path, output: str, *, include: str, instructions: Sequence[str]
) -> None:
    """Compiles one source file to a shared library.

    Args:
      include: the folder with the headers of jaxlib.
      instructions: flags that choose the instruction set, such as `-march=native`.

    Raises:
      OSError: there is no compiler, or it failed; the message has its first error.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OSError(NO_COMPILER)
    command = [compiler, *FLAGS, *instructions, '-I', include]
    if sys.platform != 'win32':
        command.append('-fPIC')
    done = subprocess.run(
        [*command, str(source), '-o', output], capture_output=True, text=True
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if 'error' in line]
        raise OSError(f'{compiler} failed: {(errors or ["unknown"])[0]}')
