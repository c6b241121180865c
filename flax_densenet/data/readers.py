"""Readers: random access to the labeled images of a source.

A loader of `sources` makes one; `labeled_images.Examples` decodes what it returns. A
reader answers every question that depends on how images are stored.
"""

import dataclasses
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flax_densenet.data import duplicates
from flax_densenet.errors import UserError


class Reader:
    """The images of a source by index: base class of all readers.

    Attributes:
      labels: by index or index array: int32 `[N]`, or float32 `[N, L]` of 0, 1 and NaN
        (not known) if an image can have several labels.
      labels_in_memory: whether `labels` is an array. Otherwise every label is read from
        the source on request.
      groups: int64 `[N]`, the group of each image, such as the patient; None if
        unknown.
      subgroups: further columns of the images, by name: see `subgroup_columns.find`.
    """

    labels: Any
    labels_in_memory = True
    groups: np.ndarray | None = None
    subgroups: Mapping[str, np.ndarray] = types.MappingProxyType({})

    def __getitem__(self, index: int) -> str | bytes | np.ndarray:
        """An image: the path of its file, its encoded bytes, or uint8 `[H, W, C]`."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Name of an image in messages: its file, or its position in the data set."""
        raise NotImplementedError

    def keys(self, indices: Iterable[int]) -> list[bytes] | None:
        """A key for each image that does not depend on where the source is stored.

        Returns:
          None if images have no names.
        """
        return None

    def copies(self, indices: Iterable[int]) -> list[list[int]]:
        """Groups of two or more of `indices` whose files have the same content.

        Returns:
          Sorted groups of sorted indices; none if the reader does not compare files.
        """
        return []

    def stat(self, index: int) -> tuple[int, Any]:
        """Size of an encoded image in bytes, and a value that changes with its file.

        Raises:
          UserError: the file cannot be read.
        """
        raise NotImplementedError


def stat_file(path: str) -> os.stat_result:
    """`os.stat`, with a `UserError` if the file cannot be read."""
    try:
        return os.stat(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error


@dataclasses.dataclass
class ArrayReader(Reader):
    """Images in memory: uint8 arrays `[N, H, W, 3]`."""

    images: np.ndarray
    labels: np.ndarray

    def __getitem__(self, index):
        return self.images[index]

    def name(self, index):
        return f'image {index}'


@dataclasses.dataclass
class FileReader(Reader):
    """Images in files, one each.

    Attributes:
      root: the folder that contains all of them.
    """

    paths: list[str]
    labels: np.ndarray
    root: str = ''

    def __getitem__(self, index):
        return self.paths[index]

    def name(self, index):
        return self.paths[index]

    def keys(self, indices):
        below = (self.paths[i].removeprefix(self.root).lstrip('/') for i in indices)
        return [os.fsencode(path) for path in below]

    def copies(self, indices):
        return duplicates.find(self.paths, indices)

    def stat(self, index):
        status = stat_file(self.paths[index])
        return status.st_size, status.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class Listing:
    """The result of a loader in `sources.SOURCES`.

    Attributes:
      train: indices of the training images.
      test: indices of the test images; None if the source has no test part, which is
        then split off `train`.
      val: indices of the validation images; None unless the source has three parts.
      skipped: unreadable files that were left out, each with the reason.
      groups: int `[N]`; images of the same group must not be split between parts.
        None: no groups.
      grouped_by: origin of the groups, for messages: `the column patient`.
    """

    reader: Reader
    class_names: list[str]
    train: np.ndarray
    test: np.ndarray | None
    skipped: tuple[str, ...] = ()
    groups: np.ndarray | None = None
    val: np.ndarray | None = None
    grouped_by: str = ''

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several labels."""
        return self.reader.labels.ndim == 2
