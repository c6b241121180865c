"""Models with a score of unusual images and sets of classes, without training."""

import numpy as np

from flax_densenet.evaluation import conformal, unusual
from flax_densenet.weights import decisions


def decide(features, logits, method='mahalanobis', *, classes=5, several=False):
    """Decisions fitted on random points near features `[N, F]` and logits `[N, C]`."""
    random = np.random.default_rng(0)
    spread = features.std(0) + 0.01
    places = np.arange(60) % len(features)
    train = features[places] + spread * random.normal(size=(60, features.shape[1]))
    labels = np.arange(60) % classes
    if several:
        labels = random.integers(2, size=(60, classes)).astype(np.float32)
    probabilities = random.dirichlet(np.ones(classes), 60)
    return decisions.Decisions(
        step=None,
        model='',
        classes=classes,
        data='points',
        part='val',
        count=60,
        unusual=unusual.fit(
            method,
            features=train,
            labels=labels,
            val_features=train[::2] + 0.3 * spread,
            val_logits=np.repeat(logits, 30, 0)[:30] + random.normal(size=(30, 1)),
        ),
        sets=conformal.fit(probabilities, labels),
    )
