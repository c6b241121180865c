"""How faithful heat maps are: deletion and insertion curves (arXiv 1806.07421).

Deletion hides an image's pixels with the mean color in the order of its map, the
brightest first; insertion shows them in this order on a blurred copy. If the map points
at pixels that the model needs, the probability of the class falls (or rises) earlier
than with a random map of the same resolution. The area under the curve summarizes this
in one number.
"""

import numpy as np

from flax_densenet.evaluation import results
from flax_densenet.inference import explain, overlay
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.report import render
from flax_densenet.weights import trained as trained_lib

IMAGES = 32  # maximum number of images, chosen at random
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # shares of the pixels
_BLUR = 1 / 20  # standard deviation, as a share of the shorter side


def measure(
    found: results.Results,
    predictor: predictor_lib.Predictor,
    how: explain.Options = explain.DEFAULT,
    *,
    most: int = IMAGES,
):
    """The curves of a sample of images, for the class with the highest probability.

    Every host has to call it.

    Args:
      most: maximum number of images; each is computed about 22 times.

    Returns:
      `count`, `shares`, `deletion` and `insertion`, each with the mean probabilities
      `map` and `random`, their areas `map_area` and `random_area`, and the 95% interval
      `gain` of the map's advantage; and `sentence`. None with fewer than two images.
    """
    count = min(most, len(found.examples))
    if count < 2:
        return None
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(len(found.examples), count, replace=False)).tolist()
    curves = []
    for start in range(0, count, predictor.batch_size):
        part = rows[start : start + predictor.batch_size]
        images = np.stack([found.examples[row]['image'] for row in part])
        curves += _curves(images, predictor, how, rng)
    measured = {'count': count, 'shares': list(SHARES)}
    for place, kind in enumerate(('deletion', 'insertion')):
        maps, randoms = np.swapaxes([one[place] for one in curves], 0, 1)
        areas = np.trapezoid(maps, SHARES), np.trapezoid(randoms, SHARES)
        gains = areas[1] - areas[0] if kind == 'deletion' else areas[0] - areas[1]
        measured[kind] = {
            'map': maps.mean(0).tolist(),
            'random': randoms.mean(0).tolist(),
            'map_area': float(areas[0].mean()),
            'random_area': float(areas[1].mean()),
            'gain': _interval(gains),
        }
    return measured | {'sentence': describe(measured)}


def _interval(values):
    """The 95% interval of the mean, by Student's t; a point if all values are equal."""
    from scipy import stats

    mean, error = values.mean(), stats.sem(values)
    if error == 0:
        return [float(mean)] * 2
    low, high = stats.t.interval(0.95, len(values) - 1, mean, error)
    return [float(low), float(high)]


def _curves(images, predictor, how, rng):
    """Probabilities `[2, 2, S]` of each image: deletion, insertion; the map, random."""
    computed = predictor.compute_maps(images, -1, how)
    rows = computed.probabilities
    chosen, given = rows.argmax(-1), []
    for image, cam in zip(images, computed.cams, strict=True):
        given += _variants(image, cam, predictor.trained.mean, rng)
    many = len(given) // len(images)
    found = _probabilities(given, chosen.repeat(many), predictor, how)
    curves = []
    for whole, (*inner, hidden, shown) in zip(
        rows.max(-1), found.reshape(len(images), many), strict=True
    ):
        inner = np.reshape(inner, (2, 2, -1))
        deletion, insertion = inner[:, 0].tolist(), inner[:, 1].tolist()
        curves.append(
            [
                [[whole, *values, hidden] for values in deletion],
                [[shown, *values, whole] for values in insertion],
            ]
        )
    return curves


def _variants(image, cam, mean, rng):
    """Partly hidden and partly revealed images, by the map and by a random one."""
    from scipy import ndimage

    white = trained_lib.white_of(image.dtype)
    plain = np.clip(np.round(np.array(mean) * white), 0, white).astype(image.dtype)
    sigma = _BLUR * min(image.shape[:2])
    blurred = ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0))
    blurred = blurred.round().astype(image.dtype)
    variants = []
    for guide in (cam, rng.random(cam.shape, np.float32)):
        values = overlay.enlarge(guide, image.shape[:2]).ravel()
        # Equal values, such as those without evidence, come in random order.
        order = np.lexsort((rng.random(values.size), -values))
        rank = np.empty(values.size)
        rank[order] = (np.arange(values.size) + 0.5) / values.size
        rank = rank.reshape(*image.shape[:2], 1)
        variants += [np.where(rank < share, plain, image) for share in SHARES[1:-1]]
        variants += [np.where(rank < share, image, blurred) for share in SHARES[1:-1]]
    return [*variants, np.broadcast_to(plain, image.shape), blurred]


def _probabilities(images, classes, predictor, how):
    """The probability of each image's class."""
    size, found = predictor.batch_size, []
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        # The program for the maps is compiled already.
        with_maps = () if how.is_slow else (classes[part], how.method)
        computed = predictor.programs(np.stack(images[part]), *with_maps)
        found.append(computed.probabilities)
    return np.concatenate(found)[np.arange(len(images)), classes]


def describe(measured) -> str:
    """The result of the curves in one sentence."""
    deletion, insertion = measured['deletion'], measured['insertion']
    better = [one['gain'][0] > 0 for one in (deletion, insertion)]
    start = {
        2: 'The maps point at pixels the model needs',
        1: 'The maps point at pixels the model needs by only one of two measures',
        0: 'The maps are no better than random ones at pointing at pixels the model '
        'needs, so do not rely on them',
    }[sum(better)]

    def against(one):
        return (
            f'{render.percent(one["map_area"])} against '
            f'{render.percent(one["random_area"])} with random maps'
        )

    return (
        f'{start}: while the pixels that they mark are hidden first, the probability '
        f'is on average {against(deletion)} (lower is better); while they are shown '
        f'first, {against(insertion)} (higher is better).'
    )
