"""Packs of a few small images."""

import itertools
import os

import numpy as np

from flax_densenet.data import dataset
from flax_densenet.data.packed import plan as pack_plan
from flax_densenet.data.packed import writer as pack_writer

# About three images of `write_images` per shard.
SMALL = pack_plan.Options(shard_mib=0.003)


def load(source, **fields):
    return dataset.load_source(source, **{'image_size': 16, **fields})


def make(folder, out, **fields):
    return pack_writer.pack(
        f'folder:{folder}', str(out), **{'options': SMALL, **fields}
    )


def contents(out):
    """`{name: bytes}` of all that a pack has written."""
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    files.pop('.lock')
    return files


def assert_same_parts(folder, out, one, other):
    """Pixels, labels, names and order of two sources."""
    assert one.class_names == other.class_names
    assert (one.has_test, one.multi_label) == (other.has_test, other.multi_label)
    for mine, theirs in ((one.train, other.train), (one.test, other.test)):
        assert len(mine) == len(theirs) > 0
        np.testing.assert_array_equal(mine.labels, theirs.labels)
        assert mine.labels.dtype == theirs.labels.dtype
        for index in range(len(mine)):
            path = os.path.join(folder, theirs.name(index))
            assert mine.name(index) == path
            a, b = mine[index], theirs[index]
            np.testing.assert_array_equal(a['image'], b['image'])
            np.testing.assert_array_equal(a['label'], b['label'])


def end_after(monkeypatch, count, error):
    """Packing ends with `error` after this many images."""
    record, left = pack_plan.Images.record, itertools.count()

    def counted(self, index):
        if next(left) == count:
            raise error
        return record(self, index)

    monkeypatch.setattr(pack_plan.Images, 'record', counted)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
