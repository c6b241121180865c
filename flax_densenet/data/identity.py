"""Whether data is that which a model was trained on, wherever it is now.

A checkpoint keeps the checksum of the images' names below their folder and, of some
training images, the hash of what is in them. So a moved copy is known again, other data
of the same names is not taken for it, and training images are found among others.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_densenet.data import readers
from flax_densenet.system import paths

# Training images that a checkpoint remembers; of fewer, all.
SAMPLE = 256
_END = 4096
_DIGEST = 8


def describe(source) -> dict[str, Any]:
    """What a checkpoint keeps of its images; JSON can hold it.

    Args:
      source: a `dataset.Source`.

    Returns:
      `names`, a checksum, and `sample`, a list of (hash of the name, bytes, hash of
      the content); both are empty if images have no names. `labels`, a checksum of the
      labels in memory, is empty if they are read one by one. The checksums are of the
      training images and those that choose; `test` is one of the names of the test
      images, if they choose nothing.
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
    """Whether a source has the numbers of images that a checkpoint counted.

    Versions that knew of two parts counted those that choose as `test`.
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
    """Whether the images of each part have the names of those of a checkpoint."""
    known = saved.get('identity') or {}
    same = known.get('names') == checksum(source.train, source.selection)
    if 'test' in known:
        same = same and source.val is not None
        return same and known['test'] == checksum(source.test)
    return bool(known.get('names')) and same


def checksum(*parts) -> str:
    """Of the names of the images in some parts; empty if images have none."""
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
    """Whether the images are those of a checkpoint, in its parts, but not their labels.

    False for checkpoints that remember none.
    """
    known = saved.get('identity') or {}
    if not known.get('labels') or not has_same_names(saved, source):
        return False
    now = _label_checksum(source.train, source.selection)
    return bool(now) and now != known['labels']


def find_changed_part(saved: Mapping[str, Any], source) -> int:
    """How many training images that a checkpoint remembers are in another part now."""
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
    except (OSError, ValueError, RuntimeError):  # an image that is gone or damaged
        return None
    return size, _digest(ends)


@dataclasses.dataclass(frozen=True)
class Relation:
    """How a source relates to the one that a model was trained on.

    Attributes:
      own: it is the same data, so that its test part was not trained on.
      line: what was found out, for the user; empty if there is nothing to say.
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
            f'data.source={source.name} holds other images than those that the model '
            'was trained on there',
        )
    return Relation(False)


def _compare_counts(saved, source, same_place):
    """What can be said of a checkpoint that remembers no images."""
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
            'data that the model was trained on; if it is a copy of that, the metrics '
            'are of training images; the checkpoint is of a version that cannot tell',
        )
    return Relation(False)


def _find_again(sample, source):
    """How many of the sample's names there are, and with the same content."""
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
        f'; of {len(sample)} training images whose checksums the checkpoint has '
        f'{len(sample) - there} are gone and {there - same} have another content'
    )


def find_trained_on(saved: Mapping[str, Any], examples) -> str:
    """A line if there are training images among those that are to be measured.

    Args:
      saved: the checkpoint's metadata.
      examples: `dataset.Examples`.
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
        f'warning: training images are among the {len(examples)} images: '
        f'{len(found)} of {len(wanted)} whose checksums the checkpoint '
        'has, so the metrics are better than on new images'
    )


def _size(reader, index):
    """Bytes of an image; None if the reader does not tell without reading it."""
    try:
        return reader.stat(index)[0]
    except (NotImplementedError, ValueError):
        return None
