"""Recognizes the data that a model was trained on, even after it moved.

A checkpoint keeps the checksum of the images' names below their folder and, for some
training images, the hash of their content. So a moved copy is recognized, other data
with the same names is not mistaken for it, and training images are found among others.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_densenet.data import readers
from flax_densenet.system import paths

# Maximum number of training images that a checkpoint remembers.
SAMPLE = 256
_END = 4096
_DIGEST = 8


def describe(source) -> dict[str, Any]:
    """The identity of a run's images that a checkpoint stores, as JSON values.

    Args:
      source: a `dataset.Source`.

    Returns:
      `names`, a checksum, and `sample`, a list of (hash of the name, bytes, hash of the
      content); both are empty if images have no names. `labels`, a checksum of the
      labels in memory, is empty if they are read one by one. The checksums cover the
      training images and those that choose; `test` is a checksum of the test images'
      names, if they choose nothing.
    """
    train = source.train
    keys = train.reader.keys(train.indices)
    if keys is None:
        return {'names': '', 'sample': [], 'labels': ''}
    hashes = [_digest(key) for key in keys]
    sample = []
    for place in sorted(range(len(hashes)), key=hashes.__getitem__)[:SAMPLE]:
        found = _content(train.reader, int(train.indices[place]))
        if found is not None:
            sample.append([hashes[place], *found])
    made = {
        'names': checksum(train, source.selection),
        'sample': sample,
        'labels': _label_checksum(train, source.selection),
    }
    if source.val is not None:
        made['test'] = checksum(source.test)
    return made


def count(source) -> dict[str, int]:
    """The number of images in each part of a `dataset.Source`, by its name."""
    return {name: len(part) for name, part in source.parts.items()}


def has_same_counts(counts: Mapping[str, int], source) -> bool:
    """Whether a source has the same numbers of images as a checkpoint.

    Versions with only two parts counted the images that choose as `test`.
    """
    now = count(source)
    if 'val' in now and 'val' not in counts:
        now = {'train': now['train'], 'test': now['val']}
    return dict(counts) == now


def describe_counts(counts: Mapping[str, int]) -> str:
    """The numbers of images in each part, for a message."""
    line = f'{counts["train"]} images to train on'
    if 'val' in counts:
        return f'{line}, {counts["val"]} to choose by and {counts["test"]} to test on'
    return f'{line} and {counts["test"]} to test on'


def has_same_names(saved: Mapping[str, Any], source) -> bool:
    """Whether the images of each part have the same names as in a checkpoint."""
    known = saved.get('identity') or {}
    same = known.get('names') == checksum(source.train, source.selection)
    if 'test' in known:
        same = same and source.val is not None
        return same and known['test'] == checksum(source.test)
    return bool(known.get('names')) and same


def checksum(*parts) -> str:
    """A checksum of the names of images in some parts; empty if they have no names."""
    total = hashlib.sha256()
    for examples in parts:
        keys = examples.reader.keys(examples.indices)
        if keys is None:
            return ''
        total.update(b'\0'.join(keys))
        total.update(b'\1')
    return total.hexdigest()[:16]


def _label_checksum(*parts):
    if not parts[0].reader.labels_in_memory:
        return ''
    total = hashlib.sha256()
    for examples in parts:
        # All zeros and all unknown values in one encoding.
        labels = np.nan_to_num(np.asarray(examples.labels), nan=-1) + 0
        total.update(np.ascontiguousarray(labels).tobytes())
    return total.hexdigest()[:16]


def has_other_labels(saved: Mapping[str, Any], source) -> bool:
    """Whether the images and parts match a checkpoint, but their labels do not.

    False for checkpoints that store no labels.
    """
    known = saved.get('identity') or {}
    if not known.get('labels') or not has_same_names(saved, source):
        return False
    now = _label_checksum(source.train, source.selection)
    return bool(now) and now != known['labels']


def find_changed_part(saved: Mapping[str, Any], source) -> int:
    """The number of a checkpoint's remembered training images now in another part."""
    sample = (saved.get('identity') or {}).get('sample') or []
    now = set()
    for name, part in source.parts.items() if sample else ():
        if name != 'train':
            now |= {_digest(key) for key in part.reader.keys(part.indices) or ()}
    return sum(name in now for name, *_ in sample)


def _digest(content):
    return hashlib.blake2b(content, digest_size=_DIGEST).hexdigest()


def _content(reader: readers.Reader, index):
    """Bytes of an image and the hash of both ends of it; None if it cannot be read."""
    try:
        raw = reader[index]
        if isinstance(raw, str):
            with open(raw, 'rb') as file:
                size = os.fstat(file.fileno()).st_size
                ends = file.read(_END)
                file.seek(max(size - _END, len(ends)))
                ends += file.read(_END)
        else:
            raw = raw.tobytes() if isinstance(raw, np.ndarray) else bytes(raw)
            size = len(raw)
            ends = raw[:_END] + raw[max(size - _END, min(size, _END)) :]
    except (OSError, ValueError, RuntimeError):  # a missing or damaged image
        return None
    return size, _digest(ends)


@dataclasses.dataclass(frozen=True)
class Relation:
    """The relation of a source to the one that a model was trained on.

    Attributes:
      own: whether it is the same data, so the model was not trained on its test part.
      line: a message about it; empty if there is nothing to report.
    """

    own: bool
    line: str = ''


def compare(saved: Mapping[str, Any], source) -> Relation:
    """Compares a `dataset.Source` with that of a checkpoint.

    Args:
      saved: the checkpoint's metadata.
    """
    before = saved.get('data', {}).get('source') or ''
    same_place = bool(before) and (
        source.name == before
        or paths.real_source(source.name) == paths.real_source(before)
    )
    known = saved.get('identity') or {}
    sample = known.get('sample') or []
    if not sample:
        return _compare_counts(saved, source, same_place)
    there, same = _find_again(sample, source)
    if has_same_names(saved, source) and same == len(sample):
        if same_place:
            return Relation(True)
        return Relation(
            True,
            f'data.source={source.name} has the same images as {before}, which the '
            'model was trained on: names and content agree',
        )
    if same_place and same:
        return Relation(True, f'{_changed(saved, source)}{_lost(sample, there, same)}')
    if same_place:
        return Relation(
            False,
            f'data.source={source.name} does not hold the images that the model was '
            'trained on there',
        )
    return Relation(False)


def _compare_counts(saved, source, same_place):
    """The relation for a checkpoint that remembers no images."""
    counts = saved.get('images') or {}
    same_counts = has_same_counts(counts, source)
    if same_place:
        changed = bool(counts) and not same_counts
        return Relation(True, _changed(saved, source) if changed else '')
    keys = source.train.reader.keys(source.train.indices[:1])
    if (
        keys is not None
        and same_counts
        and list(saved.get('class_names') or ()) == (list(source.class_names))
    ):
        return Relation(
            False,
            f'data.source={source.name} has as many images of the same classes as the '
            'data that the model was trained on; if it is a copy, these may be '
            'training images; the checkpoint is of a version that did not record its '
            'images',
        )
    return Relation(False)


def _find_again(sample, source):
    """How many of the sample's names exist, and how many have the same content."""
    places = {}
    for examples in source.parts.values():
        keys = examples.reader.keys(examples.indices) or ()
        for key, index in zip(keys, examples.indices, strict=False):
            places[_digest(key)] = examples.reader, int(index)
    found = [
        (places[key], size, digest) for key, size, digest in sample if key in places
    ]
    same = sum(_content(*place) == (size, digest) for place, size, digest in found)
    return len(found), same


def _changed(saved, source):
    line = f'data.source={source.name} has changed since training'
    counts = saved.get('images')
    if counts and not has_same_counts(counts, source):
        *first, last = map(str, count(source).values())
        line += f': {describe_counts(counts)} before, {", ".join(first)} and {last} now'
    return line


def _lost(sample, there, same):
    if same == len(sample):
        return ''
    return (
        f'; of {len(sample)} training images with checksums in the checkpoint, '
        f'{len(sample) - there} are missing and {there - same} have other content'
    )


def find_trained_on(saved: Mapping[str, Any], examples) -> str:
    """A warning if there are training images among those to be measured.

    Args:
      saved: the checkpoint's metadata.
      examples: `labeled_images.Examples`.
    """
    sample = (saved.get('identity') or {}).get('sample') or []
    wanted = {(size, digest) for _, size, digest in sample}
    sizes = {size for size, _ in wanted}
    if not wanted:
        return ''
    found = set()
    for index in examples.indices:
        if _size(examples.reader, int(index)) in sizes | {None}:
            content = _content(examples.reader, int(index))
            if content in wanted:
                found.add(content)
    if not found:
        return ''
    return (
        f'warning: training images are among the {len(examples)} images: {len(found)} '
        f'of {len(wanted)} with checksums in the checkpoint, so the metrics are better '
        'than on new images'
    )


def _size(reader, index):
    """The size of an image in bytes; None if it is unknown without reading it."""
    try:
        return reader.stat(index)[0]
    except (NotImplementedError, ValueError):
        return None
