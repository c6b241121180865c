"""Plans the shards of a pack, and makes the record of each image."""

import dataclasses
import hashlib
import os
from typing import Any

import numpy as np

from flax_densenet.data import dicom, images, readers
from flax_densenet.data.packed import manifest
from flax_densenet.data.packed import reader as packed_reader
from flax_densenet.errors import UserError

SUFFIX = '.array_record'
_MIB = 2**20
# A read takes 1 us more for every 800 records in its shard.
_MOST = 2048
_SAMPLE = 32  # images from which the packed size is estimated


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `pack`.

    Attributes:
      shard_mib: size in MiB at which a shard is full. It is also full with 2048 images.
      max_side: in pixels. An image with a longer shorter side is reduced to it and
        saved as JPEG. 0 keeps all files unchanged.
      quality: quality of that JPEG, from 1 to 100.
    """

    shard_mib: float = 256.0
    max_side: int = 0
    quality: int = 90

    def __post_init__(self):
        for name, least, most in (
            ('shard_mib', 0.001, 2**20),
            ('max_side', 0, 2**16),
            ('quality', 1, 100),
        ):
            if not least <= (value := getattr(self, name)) <= most:
                raise UserError(f'--{name}={value:g} must be from {least} to {most}')


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to write, and the indices of its images."""

    file: str
    part: str
    indices: list[int]
    fingerprint: str


class Images:
    """The images of a source, and the options for packing them."""

    def __init__(self, listing: readers.Listing, root: str, options: Options):
        self.listing, self.options = listing, options
        self.reader = listing.reader
        self._root = root if os.path.isdir(root) else os.path.dirname(root)

    def name(self, index) -> bytes:
        """Path of an image's file below the source's folder."""
        return os.fsencode(os.path.relpath(self.reader.name(index), self._root))

    def identity(self, index, changed):
        """Everything that the record of an image depends on."""
        groups, options = self.listing.groups, self.options
        return (
            manifest.VERSION,
            self.name(index),
            changed,
            np.asarray(self.reader.labels[index]).tobytes(),
            None if groups is None else int(groups[index]),
            (options.max_side, options.quality) if options.max_side else None,
        )

    def record(self, index) -> bytes:
        """The record of an image, which is decoded to check it.

        Raises:
          UserError: it cannot be read or decoded.
        """
        try:
            raw: Any = self.reader[index]
            if isinstance(raw, str):
                with open(raw, 'rb') as file:
                    raw = file.read()
            image = raw
            if self.options.max_side:
                image = images.make_smaller(
                    raw, self.options.max_side, quality=self.options.quality
                )
            if dicom.has_mark(image[: dicom.MARKED]):
                image = dicom.keep_pixels(image)
            reason = images.check_image(image, decode=True)
        except OSError as error:
            reason = f'cannot be read ({error.strerror})'
        except UserError as error:
            reason = str(error)
        if reason:
            raise UserError(
                f'{self.reader.name(index)} {reason}: fix or remove it, or set '
                'data.bad_images=skip; then run the same command to resume'
            )
        return packed_reader.to_record(
            image,
            self.reader.labels[index],
            self.name(index),
            packed_reader.hash_file(raw),
        )


def plan(stored: Images) -> tuple[list[Job], float]:
    """Divides the images of a source into shards, training images first.

    Returns:
      The shards, and an estimate of their size in bytes.
    """
    ratio, jobs, total = _estimate(stored), [], 0.0
    for part in manifest.PARTS:
        indices = getattr(stored.listing, part)
        indices = [] if indices is None else indices.tolist()
        number, group, size, facts = 0, [], 0.0, hashlib.sha256()
        for index in indices:
            of_file, changed = stored.reader.stat(index)
            group.append(index)
            size += of_file * ratio
            total += of_file * ratio
            facts.update(repr(stored.identity(index, changed)).encode())
            full = size >= stored.options.shard_mib * _MIB or len(group) == _MOST
            if full or index == indices[-1]:
                file = f'{part}-{number:05}{SUFFIX}'
                jobs.append(Job(file, part, group, facts.hexdigest()))
                number, group, size, facts = number + 1, [], 0.0, hashlib.sha256()
    return jobs, total


def _estimate(stored) -> float:
    """The ratio of packed to original bytes, from a sample."""
    if not stored.options.max_side:
        return 1.0
    every = stored.listing.train
    sample = every[:: max(1, len(every) // _SAMPLE)][:_SAMPLE].tolist()
    before = sum(stored.reader.stat(index)[0] for index in sample)
    return sum(len(stored.record(index)) for index in sample) / before
