"""The build backend: setuptools', with jaxlib's headers where kernels are compiled."""

import os
import pathlib
import runpy

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMPILING = ROOT / 'flax_densenet' / 'kernels' / 'compiling.py'
# The oldest supported release: newer ones load what was compiled with its headers, but
# not the other way round.
HEADERS = 'jaxlib==0.10.2'


def get_requires_for_build_wheel(config_settings=None):
    """Packages that building a wheel needs, as PEP 517 has it."""
    required = build_meta.get_requires_for_build_wheel(config_settings)
    why_not = runpy.run_path(str(COMPILING))['why_not_in_wheel'](os.environ)
    return required + ([] if why_not else [HEADERS])
