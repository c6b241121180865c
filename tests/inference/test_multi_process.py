"""Predictions on their way from one process to another."""

import types

import numpy as np

from flax_densenet.inference import multi_process
from flax_densenet.inference.prediction import Prediction
from flax_densenet.weights import conformal


def test_scores_of_unusual_images_and_sets_arrive():
    sets = conformal.ConformalSets((9,), np.full(9, 0.25, np.float32))
    names = ('ants', 'bees')
    shares = np.float32([0.7, 0.3])
    rows = [
        Prediction('a', shares, class_names=names, unusual=1.5),
        Prediction('b', error='is bad'),
        Prediction('c', shares[::-1], class_names=names, unusual=-0.25),
    ]
    model = types.SimpleNamespace(class_names=names, sets=sets, thresholds=None)
    packed = multi_process._pack(rows)
    found = list(multi_process._unpack(packed, model))
    assert [one.unusual for one in found] == [1.5, None, -0.25]
    assert [one.is_unusual for one in found] == [True, None, False]
    assert [name for name, _ in found[2].classes(0.9)] == ['bees', 'ants']
    assert found[1].error == 'is bad'
