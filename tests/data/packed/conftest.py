"""Images in a folder, and a pack of them."""

import pytest

from helpers.packs import make
from helpers.runs import write_images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / 'photos', {'ants': 9, 'bees': 11, 'wasps': 5})


@pytest.fixture
def out(folder, tmp_path):
    make(folder, tmp_path / 'packed')
    return tmp_path / 'packed'
