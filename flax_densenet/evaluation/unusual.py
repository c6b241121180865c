"""Fits how unusual an image is (`weights.unusual`), and measures such scores."""

import dataclasses
import logging
import math
from typing import Any

import numpy as np

from flax_densenet.data import subset
from flax_densenet.errors import UserError
from flax_densenet.evaluation import evaluate
from flax_densenet.evaluation import selection as selection_lib
from flax_densenet.weights import decisions as decisions_lib
from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import unusual as unusual_lib

_LOGGER = logging.getLogger(__name__)

# Number of directions that whitening treats separately, and bytes of neighbors.
_DIRECTIONS = 256
_MOST_BYTES = 6_000_000
_MOST_FLOAT32 = 250_000  # numbers that are stored in full
_MOST_CLASSES = 2000
_ROWS = 1000
_LEAST_SPREAD = 1e-5  # from the median to the limit, as a share of the median
NEIGHBOR = 10  # size of a sample of training images
PER_CLASS = 10  # minimum number of training images to use


def needs_own_outputs(trained: trained_lib.Trained) -> bool:
    """Whether a model's score needs pooled features or `own_logits`."""
    score = None if trained.decisions is None else trained.decisions.unusual
    if score is None:
        return False
    is_mean = trained.tta != 'none'
    return is_mean or trained.module.members > 1 or score.feature_size is not None


def of_outputs(
    trained: trained_lib.Trained, computed: evaluate.Outputs
) -> np.ndarray | None:
    """Scores of images from a model's outputs, float32 `[N]`.

    None if the model has no score, or if the score needs features and there are none.
    """
    score = None if trained.decisions is None else trained.decisions.unusual
    if score is None:
        return None
    if computed.features is None and needs_own_outputs(trained):
        return None
    logits, features = computed.own_logits, computed.features
    if logits is None:
        logits = computed.logits
    if features is None:
        features = np.zeros((len(logits), 0))
    return compute(score.score, features, logits).astype(np.float32)


def check_settings(method: str, *, share: float, images: int, prefix: str = 'train.'):
    """Raises for invalid values of `train.unusual*`.

    Args:
      prefix: prefix of the names in messages.
    """
    known = 'auto', *unusual_lib.METHODS, 'off'
    if method not in known:
        raise UserError(
            f'{prefix}unusual={method} is not known; use {", ".join(known)}'
        )
    if not 0.5 <= share < 1:
        raise UserError(
            f'{prefix}unusual_share={share:g} must be from 0.5 to below 1, such as '
            '0.95 for 95% of the validation images'
        )
    if images < 1:
        raise UserError(f'{prefix}unusual_images={images} must be at least 1')


def fit_entry(
    selection: selection_lib.Selection,
    rules: selection_lib.Rules,
    made: decisions_lib.Decisions,
) -> unusual_lib.Unusual | None:
    """The score fitted on the selection part (one of `fitting.FITTERS`)."""
    method = rules.unusual
    knows_train = selection.train is not None and len(selection.train) > 0
    if method == 'auto':
        several = selection.labels.ndim == 2
        method = unusual_lib.default(several=several) if knows_train else 'energy'
    if method == 'off':
        return None
    count = len(selection.labels)
    given: dict[str, Any] = {'features': np.zeros((0, 0))}
    given['val_features'] = np.zeros((count, 0))
    labels = selection.labels
    if method != 'energy':
        if selection.train is None or not knows_train:
            _LOGGER.info(
                f'no score of unusual images: unusual={method} needs the training '
                'images, which are not known; energy does not need them'
            )
            return None
        train = _sample_of(selection.train, rules.unusual_images)
        try:
            found = selection.outputs_of(train)
        except UserError as error:
            _LOGGER.info(f'no score of unusual images: {error}')
            return None
        given = {'features': found.features, 'val_features': selection.features}
        labels = found.labels
    if not all(np.isfinite(array).all() for array in given.values()):
        _LOGGER.info('no score of unusual images: features are not finite')
        return None
    entry = fit(
        method,
        labels=labels,
        val_logits=selection.own_logits,
        share=rules.unusual_share,
        **given,
    )
    need = images_needed(entry.share)
    few = f' (a reliable limit needs at least {need} images)' if count < need else ''
    of = f'{entry.train_count:,} training and ' if entry.train_count else ''
    part = {'val': 'validation ', 'test': 'test '}.get(selection.part, '')
    _LOGGER.info(
        f'unusual images: scored by {unusual_lib.TITLES[method]}, fitted on '
        f'{of}{count:,} {part}images, of which {100 * entry.share:g}% count as '
        f'usual{few}'
    )
    return entry


def images_needed(share: float) -> int:
    """The smallest number of images for a limit with this share below it."""
    return math.ceil(share / (1 - share) - 1e-9)


def _sample_of(train, most):
    labels = train.labels if train.reader.labels_in_memory else None
    return subset.Subset(train, sample(labels, len(train), most))


def sample(labels: np.ndarray | None, count: int, most: int, *, seed: int = 0):
    """Positions of the training images to fit on, int64, ascending.

    Images are drawn from each class in turn, so that rare classes are included; at
    random if labels are not known in advance.

    Args:
      labels: int `[N]` or float `[N, L]`, or None.
      count: number of images, N.
      most: maximum number to choose; raised to `PER_CLASS` per class, up to 10,000.
    """
    order = np.random.default_rng(seed).permutation(count)
    if labels is not None and labels.ndim == 1 and len(labels):
        classes = int(labels.max()) + 1
        most = max(most, min(PER_CLASS * classes, 10_000))
        by_class = order[np.argsort(labels[order], kind='stable')]
        sizes = np.bincount(labels, minlength=classes)
        starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
        turn = np.arange(count) - starts  # index of an image within its class
        order = by_class[np.argsort(turn, kind='stable')]
    return np.sort(order[:most])


def fit(
    method: str,
    *,
    features: np.ndarray,
    labels: np.ndarray,
    val_features: np.ndarray,
    val_logits: np.ndarray,
    share: float = 0.95,
) -> unusual_lib.Unusual:
    """Fits a score.

    Args:
      method: one of `unusual.METHODS`.
      features, labels: for training images: `[N, F]`; int `[N]` or float `[N, L]`.
      val_features, val_logits: for validation images; logits before any calibration.
      share: share of the validation images below the limit. A new image of the same
        kind is above it with a probability of at most 1 - share, provided there are at
        least share / (1 - share) validation images.
    """
    several = labels.ndim == 2
    fields: dict[str, Any] = {'several': several}
    if method == 'neighbor':
        fields |= _neighbors(features)
    elif method in ('both', 'mahalanobis'):
        fields |= _gaussians(features, None if several else labels)
    given = unusual_lib.Unusual(
        method=method,
        middle=0.0,
        limit=1.0,
        share=share,
        train_count=len(features),
        val_count=len(val_features),
        **fields,
    )
    if method == 'both':
        for part, weight in (
            ('energy', 'energy_weight'),
            ('mahalanobis', 'distance_weight'),
        ):
            alone = dataclasses.replace(given, method=part)
            middle, limit = _bounds(alone, val_features, val_logits)
            given = dataclasses.replace(given, **{weight: 1 / (limit - middle)})
    middle, limit = _bounds(given, val_features, val_logits)
    return dataclasses.replace(given, middle=middle, limit=limit)


def _bounds(given, val_features, val_logits):
    """Computed with the arrays as stored, so that the limit includes rounding."""
    return bounds(compute(given.plain, val_features, val_logits), given.share)


def bounds(plain: np.ndarray, share: float) -> tuple[float, float]:
    """The median and the limit of plain scores `[N]`, with `share` of them below."""
    plain = np.sort(plain)
    place = math.ceil((len(plain) + 1) * share - 1e-9)
    middle, limit = float(np.median(plain)), float(plain[min(place, len(plain)) - 1])
    # One image, or all alike but for rounding.
    if limit - middle < _LEAST_SPREAD * abs(middle) or not middle < limit:
        limit = middle + max(abs(middle), 1.0) * 1e-3
    return middle, limit


def compute(score, features: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """`score(features, logits)` in parts, which bounds the memory: float64 `[N]`.

    Args:
      score: `Unusual.plain` or `Unusual.score`.
    """
    starts = range(0, len(features), _ROWS)
    parts = [score(features[n : n + _ROWS], logits[n : n + _ROWS]) for n in starts]
    return np.concatenate(parts).astype(np.float64)


def _compact(array):
    """Stores large arrays as float16."""
    is_small = array.size <= _MOST_FLOAT32 or np.abs(array).max() > 6e4
    return array.astype(np.float32 if is_small else np.float16)


def _neighbors(features):
    most = max(_MOST_BYTES // (2 * features.shape[1]), 1)
    chosen = features
    if len(features) > most:
        rows = np.random.default_rng(0).permutation(len(features))[:most]
        chosen = features[np.sort(rows)]
    chosen = np.float32(chosen)
    length = np.linalg.norm(chosen, axis=-1, keepdims=True)
    chosen = chosen / np.maximum(length, 1e-12)
    neighbor = max(1, min(NEIGHBOR, len(chosen) // 20))
    return {'references': _compact(chosen), 'neighbor': neighbor}


def _gaussians(features, labels):
    """Whitening by the covariance within classes, and the whitened class means.

    The covariance is Ledoit and Wolf's estimate, which exists even with fewer images
    than features. The `_DIRECTIONS` largest axes are treated separately; all others
    share their mean variance.
    """
    from scipy import linalg
    from sklearn import covariance

    features = np.float64(features)
    if labels is None or labels.max(initial=0) >= _MOST_CLASSES:
        means = features.mean(0, keepdims=True)
        centered = features - means
    else:
        known, places = np.unique(labels, return_inverse=True)
        means = np.zeros((len(known), features.shape[1]))
        np.add.at(means, places, features)
        means /= np.bincount(places)[:, None]
        centered = features - means[places]
    shrinkage = covariance.ledoit_wolf_shrinkage(centered, assume_centered=True)
    count, size = centered.shape
    # The smaller of the two products has the same eigenvalues.
    wide = size > count
    product = centered @ centered.T if wide else centered.T @ centered
    rank = min(_DIRECTIONS, size - 1, count)
    last = len(product) - 1
    values, vectors = linalg.eigh(
        product / count, subset_by_index=(last + 1 - rank, last)
    )
    known = values > 1e-10 * max(values.max(initial=0), 1e-300)
    values, vectors = values[known], vectors[:, known]
    if wide:
        vectors = centered.T @ vectors / np.sqrt(count * values)
    trace = (centered**2).sum() / count
    values = (1 - shrinkage) * values + shrinkage * trace / size
    rest = (trace - values.sum()) / (size - len(values))
    rest = max(rest, 1e-6 * trace / size, 1e-12)
    # Along these axes x / sqrt(value); along all others x / sqrt(rest).
    gains = np.sqrt(rest / np.maximum(values, rest * 1e-6)) - 1
    found = {
        'mean': np.float32(features.mean(0)),
        'directions': _compact(vectors.T),
        'gains': np.float32(gains),
        'scale': float(1 / np.sqrt(rest)),
    }
    whiten = unusual_lib.Unusual('mahalanobis', 0.0, 1.0, 0.5, 0, 0, **found)
    return found | {'references': _compact(whiten.whiten(np.float32(means)))}


def measure(known: np.ndarray, others: np.ndarray) -> dict[str, float | int]:
    """How well scores separate images of the classes from other images.

    Args:
      known: scores `[N]` of images of the classes.
      others: scores `[M]` of images that show none of the classes.

    Returns:
      `auroc`: how often an image of none of the classes has the higher score; `fpr95`:
      the share of these images below the limit that accepts 95% of the known ones;
      `flagged_known` and `flagged_others`: shares above the stored limit; `known` and
      `others`: the numbers of images.
    """
    from sklearn import metrics

    labels = np.repeat([0, 1], [len(known), len(others)])
    scores = np.concatenate([known, others])
    accepted = np.sort(known)[math.ceil(0.95 * len(known)) - 1]
    return {
        'auroc': float(metrics.roc_auc_score(labels, scores)),
        'fpr95': float((others <= accepted).mean()),
        'flagged_known': float((known > 1).mean()),
        'flagged_others': float((others > 1).mean()),
        'known': len(known),
        'others': len(others),
    }
