"""Test-time augmentation: the mean of an image's probabilities and its mirror's."""

import dataclasses

import jax
import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset
from flax_densenet.evaluation import evaluate, results
from flax_densenet.evaluation.metrics import sigmoid, softmax
from flax_densenet.inference import predictor
from flax_densenet.models import tta
from flax_densenet.weights import trained as trained_lib
from helpers.marks import slow_after
from helpers.runs import tiny_trained, write_images


@pytest.mark.parametrize('multi_label', slow_after(1, [True, False]))
def test_means_by_hand(multi_label):
    seen = np.random.default_rng(0).normal(0, 4, (2, 5, 3)).astype(np.float32)
    seen[0, 0], seen[1, 0] = [80, -80, -80], [80, -90, -80]  # without overflow
    found = np.asarray(tta.mean_logits(seen, multi_label=multi_label))
    assert np.isfinite(found).all()
    of = sigmoid if multi_label else softmax
    expected = np.mean([of(one) for one in seen], 0)
    np.testing.assert_allclose(of(found), expected, rtol=1e-5, atol=1e-7)
    assert not np.allclose(of(found), of(seen.mean(0)), rtol=1e-2)  # not of logits
    if not multi_label:  # so that a softmax's cross-entropy is of the mean
        np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = write_images(tmp_path_factory.mktemp('photos'), {'ants': 7, 'bees': 6})
    return dataset.load_source(f'folder:{folder}', image_size=8, test_fraction=0.8)


@pytest.fixture(scope='module')
def trained(source):
    """With parameters for which left and right differ."""
    found = tiny_trained(source)
    variables = jax.tree.map(
        lambda leaf: leaf + 0.3 * np.cos(np.arange(leaf.size).reshape(leaf.shape)),
        jax.device_get(found.variables),
    )
    return dataclasses.replace(
        found, variables=evaluate.mesh_lib.replicate(variables, found.mesh)
    )


def by_hand(trained, images, of=softmax):
    """The mean of two calls, one on images mirrored by numpy."""
    probabilities = []
    for view in (images, np.flip(images, axis=2)):
        pixels = trained_lib.normalize(
            view, mean=trained.metadata['mean'], std=trained.metadata['std']
        )
        apply = jax.jit(trained.module.apply)
        probabilities.append(of(np.asarray(apply(trained.variables, pixels))))
    assert not np.allclose(*probabilities, rtol=1e-3)
    return np.mean(probabilities, 0)


@pytest.mark.slow
def test_evaluation_and_prediction_agree(source, trained):
    images = np.stack([one['image'] for one in source.test])
    labels = np.array([one['label'] for one in source.test])
    flipped = trained.with_tta('flip')
    expected = by_hand(trained, images)
    found = results.collect(flipped, source.test, source.class_names, batch_size=4)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-4, atol=1e-6)
    loss = -np.log(expected[np.arange(len(labels)), labels]).mean()
    assert found.metrics['loss'] == pytest.approx(loss, rel=1e-4)
    model = predictor.Predictor(flipped, batch_size=4)
    rows = np.concatenate([model.compute(images[n : n + 4])[0] for n in (0, 4, 8)])
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-6)
    plain = results.collect(trained, source.test, source.class_names, batch_size=4)
    assert not np.allclose(plain.probabilities, found.probabilities, rtol=1e-3)
    which = results.describe(flipped, 'digits').model
    assert which.endswith(', averaged over each image and its mirror image')


@pytest.mark.slow
def test_several_labels(source, trained):
    images = np.stack([one['image'] for one in source.test])[:4]
    metadata = trained.metadata | {'multi_label': True}
    several = dataclasses.replace(trained, metadata=metadata).with_tta('flip')
    found = predictor.Predictor(several, batch_size=4).compute(images)[0]
    np.testing.assert_allclose(found, by_hand(trained, images, sigmoid), rtol=1e-4)


def test_what_does_not_say_has_none(trained):
    assert tta.from_metadata(trained.metadata) == 'none'
    assert tta.from_metadata({'data': {'tta': None}}) == 'none'
    assert tta.describe('none') == ''
    with pytest.raises(UserError, match='data.tta=ten is not known; use none, flip'):
        trained.with_tta('ten')
