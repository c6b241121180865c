"""Deletion and insertion curves of a model that is known to need one part."""

import types

import numpy as np
import pytest

from flax_densenet.inference import explain, programs
from flax_densenet.report import faithfulness

NEEDED = np.s_[:, 4:10, 6:12]


class Fake:
    """Its probability is the share of the needed pixels that are still there.

    Attributes:
      sign: of its maps; -1 points at all else.
    """

    batch_size = 5

    def __init__(self, images, sign):
        self.images, self.sign, self.computed = images, sign, 0
        self.trained = types.SimpleNamespace(mean=(0.5, 0.5, 0.5))

    def compute_maps(self, images, classes, how):
        maps = np.zeros((len(images), 8, 8), np.float32)
        maps[:, 2:5, 3:6] = 1
        maps = maps if self.sign > 0 else 1 - maps
        return self.programs(images)._replace(cams=maps)

    def programs(self, images, classes=None, method=''):
        self.computed += len(images)
        assert len(images) <= self.batch_size
        same = (images[:, None] == self.images[None]).all(-1)  # [N, M, H, W]
        share = same[(slice(None), *NEEDED)].mean((2, 3)).max(1)
        rows = np.stack([0.5 - share / 2, 0.5 + share / 2], 1)
        return programs.Computed(rows, None, None, None)


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).integers(0, 120, (12, 16, 16, 3), np.uint8)


def measure(images, sign, **options):
    examples = [{'image': image} for image in images]
    model = Fake(images, sign)
    found = types.SimpleNamespace(examples=examples)
    return faithfulness.measure(found, model, explain.DEFAULT, **options), model


def test_maps_of_what_the_model_needs(images):
    found, model = measure(images, 1, most=8)
    assert found['count'] == 8 and model.computed == 8 * 23
    for kind, better in (('deletion', -1), ('insertion', 1)):
        curves = found[kind]
        gain = better * (curves['map_area'] - curves['random_area'])
        low, high = curves['gain']
        assert 0.05 < low < gain < high
        area = np.trapezoid(curves['map'], found['shares'])
        assert curves['map_area'] == pytest.approx(area)
    # All is hidden in the end and shown in the beginning, in both ways.
    assert found['deletion']['map'][0] == found['insertion']['map'][-1] == 1
    assert found['deletion']['map'][-1] == found['deletion']['random'][-1] == 0.5
    # The needed part is 14% of the pixels, and the map marks 14%.
    deletion = dict(zip(found['shares'], found['deletion']['map'], strict=True))
    assert deletion[0.2] < 0.65 < 0.8 < deletion[0.05]
    assert found['sentence'].startswith('The maps point at pixels the model needs:')
    again, _ = measure(images, 1, most=8)
    assert again == found


def test_maps_of_what_it_does_not_need(images):
    found, _ = measure(images, -1)
    assert found['count'] == 12
    assert found['deletion']['gain'][1] < 0 and found['insertion']['gain'][1] < 0
    assert 'no better than random' in found['sentence']
    assert 'do not rely on them' in found['sentence']


def test_one_image_is_too_few(images):
    assert measure(images[:1], 1)[0] is None
