"""Where the repository is, and the folder of larger files beside it."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = pathlib.Path(os.environ.get('FLAX_DENSENET_SHARED', ROOT.parent / 'shared'))


def shared(path):
    """A file or folder beside the repository; the test is skipped where absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f'{path} is not here (FLAX_DENSENET_SHARED names its folder)')
    return found
