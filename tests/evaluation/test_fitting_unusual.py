"""What is fitted of the selection part, without a network."""

import logging
import types

import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.evaluation import evaluate, unusual
from flax_densenet.evaluation import selection as selection_lib


class Images:
    """Labels in memory, and no image."""

    preparation = None

    def __init__(self, count):
        self.labels = np.arange(count) % 2
        self.reader = types.SimpleNamespace(labels_in_memory=True)
        self.indices = np.arange(count)

    def __len__(self):
        return len(self.labels)


def select(*, train=100, count=40, fails=False, part='val'):
    random = np.random.default_rng(0)
    asked = []

    def outputs_of(examples):
        if fails:
            raise UserError('a.jpg is not an image')
        asked.append(examples)
        features = random.normal(size=(len(examples), 6))
        logits = np.zeros((len(examples), 2))
        return evaluate.Outputs(logits, examples.labels, features)

    return types.SimpleNamespace(
        labels=np.arange(count) % 2,
        own_logits=random.normal(size=(count, 2)),
        features=random.normal(size=(count, 6)),
        train=None if train is None else Images(train),
        outputs_of=outputs_of,
        part=part,
        asked=asked,
    )


def fit(selection, caplog, **rules):
    caplog.set_level(logging.INFO)
    caplog.clear()
    return unusual.fit_entry(selection, selection_lib.Rules(**rules), None)


def test_training_images_are_bounded(caplog):
    selection = select()
    found = fit(selection, caplog, unusual_images=30)
    assert found.method == 'both' and found.train_count == len(selection.asked[0]) == 30
    assert np.bincount(selection.asked[0].labels).tolist() == [15, 15]
    assert caplog.messages == [
        'unusual images: scored by energy and Mahalanobis distance, fitted on 30 '
        'training and 40 validation images, of which 95% count as usual'
    ]
    fit(select(count=10, part='test'), caplog, unusual='neighbor')
    assert '10 test images, of which 95%' in caplog.text
    assert 'a reliable limit needs at least 19 images' in caplog.text


def test_several_labels_have_another_default(caplog):
    selection = select()
    selection.labels = np.eye(2)[selection.labels]
    assert fit(selection, caplog).method == 'mahalanobis'
    assert 'scored by Mahalanobis distance, fitted on 100 training' in caplog.text


def test_without_training_images(caplog):
    """By default energy, which needs none; what was asked for is refused in a line."""
    found = fit(select(train=None), caplog)
    assert (found.method, found.train_count, found.val_count) == ('energy', 0, 40)
    assert fit(select(train=None), caplog, unusual='both') is None
    assert 'needs the training images' in caplog.text
    assert fit(select(), caplog, unusual='off') is None and not caplog.messages


def test_what_cannot_be_fitted(caplog):
    """A line, and the rest of the run is as it was."""
    assert fit(select(fails=True), caplog) is None
    assert 'no score of unusual images: a.jpg is not an image' in caplog.text
    selection = select()
    selection.features[3, 2] = np.nan
    assert fit(selection, caplog) is None
    assert 'features are not finite' in caplog.text


@pytest.mark.parametrize(
    'values, message',
    [
        (('all', 0.95, 1), '--unusual=all is not known; use auto, both, energy'),
        (('both', 0.2, 1), '--unusual_share=0.2 must be from 0.5'),
        (('both', 0.95, 0), '--unusual_images=0 must be at least 1'),
    ],
)
def test_settings(values, message):
    method, share, images = values
    with pytest.raises(UserError, match=message):
        unusual.check_settings(method, share=share, images=images, prefix='--')
