"""Warnings about the data that a report repeats."""

import types

import numpy as np
import pytest

from flax_densenet.report import diagnosis


def check(*, kinds=(), val=None, skipped=(), labels=None, drop=False, balance='none'):
    """The warnings about a source with these lines of `duplicates.txt`."""
    source = types.SimpleNamespace(
        duplicates=[f'{kind}\ta.jpg\tb.jpg' for kind in kinds],
        val=val,
        skipped=list(skipped),
        class_names=('ants', 'bees'),
    )
    duplicates = 'drop' if drop else 'report'
    return diagnosis.check_data(
        source, labels=labels, duplicates=duplicates, balance=balance
    )


def test_nothing_to_warn_of():
    assert check() == []
    assert check(kinds=['training'], labels=np.repeat([0, 1], 20)) == []


@pytest.mark.parametrize(
    'val, parts',
    [(None, 'both the training and the test images'), (1, 'more than one part')],
)
def test_copies_in_two_parts(val, parts):
    kinds = ['training', 'training and test', 'training and test']
    (text,) = check(kinds=kinds, val=val)
    assert text.startswith(f'2 images appear in {parts}')
    assert 'too high' in text and 'data.duplicates=drop' in text
    (text,) = check(kinds=kinds, val=val, drop=True)
    assert text.startswith(f'2 images appeared in {parts}')
    assert 'too high' not in text


def test_copies_in_several_classes():
    (text,) = check(kinds=['training, several classes'])
    assert (
        text.startswith('1 image appears in several') and 'labels must be wrong' in text
    )
    assert len(check(kinds=['training and test, several classes'])) == 2


def test_unreadable_images():
    (text,) = check(skipped=['a.jpg', 'b.jpg'])
    assert text.startswith('2 images could not be read')


def test_imbalance():
    """Not where the loss or the batches make up for it, nor of several labels."""
    labels = np.array([0] * 990 + [1] * 10)
    (text,) = check(labels=labels)
    assert text.startswith('The classes are imbalanced: ')
    assert check(labels=labels, balance='weights') == []
    assert check(labels=np.zeros((5, 2), np.float32)) == []
