"""Paths of the repository and of the folder with larger files next to it."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = pathlib.Path(os.environ.get('FLAX_DENSENET_SHARED', ROOT.parent / 'shared'))


def shared(path):
    """A file or folder next to the repository; skips the test if it is missing."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f'{path} is not here (FLAX_DENSENET_SHARED names its folder)')
    return found
