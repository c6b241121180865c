"""Compiles the C++ kernels into the wheel; all else is in pyproject.toml.

With a C++ compiler on Linux (x86-64), the wheel holds the kernels for several
instruction sets, and the program chooses among them when it starts. It runs with every
supported Python. Elsewhere the wheel is pure Python, and the kernels are compiled where
they are used. $FLAX_DENSENET_BUILD_KERNELS: `0` never compiles, `1` fails instead of
building a pure wheel, and names such as `avx2,avx512` do so for these instruction sets.
"""

import concurrent.futures
import importlib.util
import os
import pathlib
import platform
import runpy
import shutil

import setuptools
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

KERNELS = pathlib.Path('flax_densenet') / 'kernels'
COMPILING = runpy.run_path(str(KERNELS / 'compiling.py'))
CHOSEN = os.environ.get('FLAX_DENSENET_BUILD_KERNELS', '')


class BuildKernels(setuptools.Command):
    """A part of `build`: the libraries of each instruction set."""

    description = 'compile the C++ kernels'
    user_options = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options('build_py', ('build_lib', 'build_lib'))

    @property
    def folder(self):
        return pathlib.Path(self.build_lib) / KERNELS / 'built'

    def run(self):
        if self.editable_mode:  # a checkout compiles for its own machine
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier build
        try:
            self.compile()
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if CHOSEN not in ('', '0'):
                raise SystemExit(f'the CPU kernels cannot be built: {error}') from None
            self.warn(
                f'this wheel has no compiled CPU kernels: {error}; without a C++ '
                'compiler where it is used, training and prediction are about three '
                'times slower'
            )

    def compile(self):
        if reason := COMPILING['why_not_in_wheel'](os.environ):
            raise OSError(reason)
        jaxlib = importlib.util.find_spec('jaxlib')
        if jaxlib is None:
            raise OSError('jaxlib, whose headers they need, is not installed')
        include = str(pathlib.Path(jaxlib.origin).parent / 'include')
        levels = COMPILING['LEVELS']
        named = set(levels) if CHOSEN in ('', '1') else set(CHOSEN.split(','))
        if unknown := named - set(levels):
            raise OSError(
                f'FLAX_DENSENET_BUILD_KERNELS={CHOSEN}: {", ".join(sorted(unknown))} '
                f'is none of {", ".join(levels)}'
            )
        files = [file for file in COMPILING['in_wheel']() if file[0] in named]

        def compile_one(file):
            level, source = file
            output = self.folder / level / f'{source.stem}.so'
            output.parent.mkdir(parents=True, exist_ok=True)
            COMPILING['run'](
                *(source, str(output)),
                include=include,
                instructions=(*levels[level], '-s'),  # without symbols
            )

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, files))

    def get_outputs(self):
        return [str(path) for path in self.folder.rglob('*.so')]

    def get_source_files(self):
        return [str(path) for path in sorted(KERNELS.glob('*.cc'))]

    def get_output_mapping(self):
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ('build_kernels', None)]


class BdistWheel(bdist_wheel):
    """One wheel for all versions of Python, since the libraries do not use its API."""

    def run(self):
        self.run_command('build')
        if self.get_finalized_command('build_kernels').get_outputs():
            self.root_is_pure = False
            # Libraries of a distribution without belong among its Python files.
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self):
        if self.root_is_pure:
            return super().get_tag()
        # What was linked with a C library runs with it and with all later ones.
        name, version = platform.libc_ver()
        system = 'linux'
        if name == 'glibc':
            system = 'manylinux_' + '_'.join(version.split('.')[:2])
        return 'py3', 'none', f'{system}_{platform.machine()}'


setuptools.setup(
    cmdclass={'build': Build, 'build_kernels': BuildKernels, 'bdist_wheel': BdistWheel}
)
