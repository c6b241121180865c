"""Sources of a folder, and rows of their batches."""

import itertools

from flax_densenet.data import dataset


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def rows(batches, key='image'):
    return [row.tobytes() for batch in batches for row in batch[key]]


def load(folder, **fields):
    return dataset.load_source(f'folder:{folder}', **{'image_size': 16, **fields})
