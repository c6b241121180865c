"""Small images in a folder."""

import pytest

from helpers.runs import write_images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / 'photos', {'ants': 10, 'bees': 15, 'wasps': 5})


@pytest.fixture
def split_folder(tmp_path):
    write_images(tmp_path / 'photos/train', {'ants': 6, 'bees': 5})
    write_images(tmp_path / 'photos/val', {'ants': 3, 'bees': 2}, seed=1)
    return tmp_path / 'photos'
