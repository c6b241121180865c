"""Which images go to which shard of a pack, and what is stored of each."""

import dataclasses
import hashlib
import os

import numpy as np

from flax_densenet.data import images, readers
from flax_densenet.data.packed import manifest
from flax_densenet.data.packed import reader as packed_reader
from flax_densenet.errors import UserError

SUFFIX = '.array_record'
_MIB = 2**20
# Each read of a record takes 1 us more for every 800 of its shard.
_MOST = 2048
_SAMPLE = 32  # images by which the sizes of smaller ones are estimated


@dataclasses.dataclass(frozen=True)
class Options:
    """What `--mode=pack` takes.

    Attributes:
      shard_mib: MiB from which on a shard is full; its last image may be beyond. With
        2048 images one is full as well.
      max_side: pixels; an image whose shorter side is longer is made so small and saved
        as JPEG. 0 keeps the bytes of every file.
      quality: of that JPEG, from 1 to 100.
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
    """A shard to be: which images of the reader it holds."""

    file: str
    part: str
    indices: list[int]
    fingerprint: str


class Images:
    """The images of a source as they are packed."""

    def __init__(self, found: readers.Listing, root: str, options: Options):
        self.found, self.options = found, options
        self.reader = found.reader
        self._root = root if os.path.isdir(root) else os.path.dirname(root)

    def name(self, index) -> bytes:
        """The file's name below the source's folder."""
        return os.fsencode(os.path.relpath(self.reader.name(index), self._root))

    def identity(self, index, changed):
        """All that the record of an image depends on."""
        groups, options = self.found.groups, self.options
        return (
            manifest.VERSION,
            self.name(index),
            changed,
            np.asarray(self.reader.labels[index]).tobytes(),
            None if groups is None else int(groups[index]),
            (options.max_side, options.quality) if options.max_side else None,
        )

    def record(self, index) -> bytes:
        """The record of an image, which was decoded to see that it is whole.

        Raises:
          UserError: it is not.
        """
        try:
            raw = self.reader[index]
            if isinstance(raw, str):
                with open(raw, 'rb') as file:
                    raw = file.read()
            image = raw
            if self.options.max_side:
                image = images.make_smaller(
                    raw, self.options.max_side, quality=self.options.quality
                )
            reason = images.check_image(image, decode=True)
        except OSError as error:
            reason = f'cannot be read ({error.strerror})'
        except UserError as error:
            reason = str(error)
        if reason:
            raise UserError(
                f'{self.reader.name(index)} {reason}: fix or remove it, or set '
                'data.bad_images=skip; the same command goes on with the shards that '
                'are whole'
            )
        return packed_reader.to_record(
            image,
            self.reader.labels[index],
            self.name(index),
            packed_reader.hash_file(raw),
        )


def plan(stored: Images) -> tuple[list[Job], float]:
    """Divides the images of a source into shards, those to train on first.

    Returns:
      The shards, and about how many bytes they will take.
    """
    ratio, jobs, total = _estimate(stored), [], 0.0
    for part in manifest.PARTS:
        indices = getattr(stored.found, part)
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
    """Bytes of a packed image for each of its file's, by a sample."""
    if not stored.options.max_side:
        return 1.0
    every = stored.found.train
    sample = every[:: max(1, len(every) // _SAMPLE)][:_SAMPLE].tolist()
    before = sum(stored.reader.stat(index)[0] for index in sample)
    return sum(len(stored.record(index)) for index in sample) / before
