"""Color jitter and the policies: what they keep, change and refuse."""

import numpy as np
import pytest
from PIL import Image

from flax_densenet.data import dataset, pipeline
from flax_densenet.data.augment import color, policies
from flax_densenet.errors import UserError
from flax_densenet.train import prepare
from helpers.runs import tiny_config

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
PICTURES = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0])]
BOTH = pytest.mark.parametrize('picture', PICTURES, ids=lambda p: p.mode)


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


@BOTH
@pytest.mark.parametrize('wide', [False, True])
@pytest.mark.parametrize('name', policies.OPERATIONS)
def test_operations_at_every_strength(picture, name, wide):
    before, operation = np.array(picture), policies.OPERATIONS[name]
    changed = []
    for place in range(31):
        amount = operation.amount(place / 30, picture, wide)
        for signed in (amount, -amount) if operation.signed else (amount,):
            found = operation.function(picture, signed)
            assert (found.mode, found.size) == (picture.mode, picture.size)
            changed.append(not same(found, picture))
    assert same(picture, before)
    # Noise over all values is as contrasty as can be; gray has no saturation.
    gray = picture.mode == 'L' and name == 'saturation'
    assert any(changed) != (name in ('identity', 'autocontrast') or gray)


@BOTH
@pytest.mark.parametrize(
    ('policy', 'count'), [('randaugment', 2), ('randaugment-3-30', 3)]
)
def test_randaugment_draws_so_many_operations(monkeypatch, picture, policy, count):
    seen = []
    for name, operation in policies.OPERATIONS.items():

        def record(image, amount, name=name, operation=operation):
            seen.append((name, operation.signed, amount))
            return operation.function(image, amount)

        wrapped = policies.Operation(record, operation.amount, operation.signed)
        monkeypatch.setitem(policies.OPERATIONS, name, wrapped)
    policy, rounds = policies.parse(policy), 300
    for seed in range(rounds):
        policies.apply(picture, np.random.default_rng(seed), policy)
    assert len(seen) == rounds * count
    names = [name for name, *_ in seen]
    for name in policies.OPERATIONS:
        assert abs(names.count(name) / len(seen) - 1 / 14) < 0.04
    for name, signed, _ in set(seen):
        amounts = {abs(amount) for found, _, amount in seen if found == name}
        signs = {np.sign(amount) for found, _, amount in seen if found == name}
        assert len(amounts) == 1  # all at one strength
        assert (signs == {-1, 1}) == signed


def test_trivialaugment_draws_one_of_any_strength():
    policy = policies.parse('trivialaugment')
    found = [
        policies.apply(PICTURES[0], np.random.default_rng(seed), policy)
        for seed in range(60)
    ]
    assert len({np.asarray(image).tobytes() for image in found}) > 30
    again = policies.apply(PICTURES[0], np.random.default_rng(7), policy)
    assert same(again, found[7])


@pytest.mark.parametrize(
    'name', ['autoaugment', 'randaugment-0-9', 'randaugment-2-31', 'randaugment-2', '']
)
def test_policies_that_are_refused(name):
    with pytest.raises(UserError, match=f'data.policy={name} is not known; use none, '):
        policies.parse(name)


@BOTH
def test_jitter_changes_within_its_strengths(picture):
    strengths = color.parse((0.4,))
    assert strengths == color.Strengths(0.4, 0.4, 0.4, 0.0)
    found = [
        color.jitter(picture, np.random.default_rng(seed), strengths)
        for seed in range(20)
    ]
    assert {(image.mode, image.size) for image in found} == {
        (picture.mode, picture.size)
    }
    assert len({np.asarray(image).tobytes() for image in found}) == 20
    assert same(found[3], color.jitter(picture, np.random.default_rng(3), strengths))
    # Of a white image brightness alone changes anything: by up to 40 % downward.
    white = Image.new(picture.mode, (4, 4), 'white')
    bright = color.parse((0.4, 0, 0))
    levels = [
        np.asarray(color.jitter(white, np.random.default_rng(seed), bright)).min()
        for seed in range(60)
    ]
    assert 153 <= min(levels) < 165 and max(levels) == 255


def test_jitter_turns_hue_both_ways():
    red, hue = Image.new('RGB', (2, 2), 'red'), color.parse((0, 0, 0, 0.1))
    found = [
        np.asarray(color.jitter(red, np.random.default_rng(seed), hue))[0, 0]
        for seed in range(60)
    ]
    toward_green, toward_blue = (max(pixel[band] for pixel in found) for band in (1, 2))
    # A tenth of the circle is 0.6 of the way from red to yellow.
    assert 120 < toward_green <= 153 and 120 < toward_blue <= 153


def test_hue_turns_colors_and_leaves_gray():
    pure = Image.fromarray(np.array([[[255, 0, 0], [9, 9, 9], [30, 200, 60]]], 'u1'))
    thirds = [np.asarray(color.adjust_hue(pure, n / 3))[0].tolist() for n in (1, 2, 3)]
    assert thirds[0] == [[0, 255, 0], [9, 9, 9], [60, 30, 200]]
    assert thirds[1] == [[0, 0, 255], [9, 9, 9], [200, 60, 30]]
    assert thirds[2] == np.asarray(pure)[0].tolist()
    back = color.adjust_hue(color.adjust_hue(PICTURES[0], 0.3), -0.3)
    gap = np.asarray(back).astype(int) - PIXELS
    assert np.abs(gap).max() <= 3


@pytest.mark.parametrize(
    'value',
    [(0.4, 0.4), (-0.1,), (0.1, 0.1, 0.1, 0.6), ('a',), (1, 1, 1, 0, 0), (11,), None],
)
def test_strengths_that_are_refused(value):
    with pytest.raises(UserError, match=r'data.color_jitter=.* must be \(\), \(x,\)'):
        color.parse(value)
    assert color.parse(()) is None and color.parse((0,)) is None


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('augment', ['crop_flip', 'shift_flip'])
def test_batches(channels, augment):
    """Of the same shapes and types, a function of the step, each change seen."""
    source = dataset.load_source('digits', image_size=20, channels=channels)
    settings = dict(batch_size=8, seed=0, augment=augment)
    changes = dict(color_jitter=(0.4, 0.4, 0.4, 0.1), policy='randaugment')

    def take(start=0, count=1, **changes):
        batches = pipeline.train_batches(
            source.train, start=start, **settings, **changes
        )
        found = [next(batches) for _ in range(count)]
        batches.close()
        return found

    plain, both = take()[0], take(count=3, **changes)
    for batch in both:
        assert batch['image'].shape == (8, 20, 20, channels)
        assert batch['image'].dtype == np.uint8
    np.testing.assert_array_equal(plain['label'], both[0]['label'])
    later = take(2, **changes)[0]
    np.testing.assert_array_equal(later['image'], both[2]['image'])
    for name, value in changes.items():
        other = take(**{name: value})[0]
        assert (other['image'] != plain['image']).any()
        assert (other['image'] != both[0]['image']).any()


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'data.policy': 'randaug'}, 'data.policy=randaug is not known'),
        ({'data.color_jitter': (9, 9)}, 'data.color_jitter='),
        ({'data.erase': 2.0}, 'data.erase=2.0 is a probability'),
        (
            {'data.mixup': 0.2, 'data.batch_size': 8, 'train.accumulate_steps': 2},
            None,
        ),
        ({'data.cutmix': -1.0}, 'data.cutmix=-1.0 is the alpha'),
        ({'data.size_schedule': (0.5, 0)}, 'data.size_schedule='),
        (
            {'data.size_schedule': (0.5, 2), 'model.block_sizes': (1, 1, 1)},
            r'data.size_schedule=\(0.5, 2\): images of 2x2 are too small',
        ),
    ],
)
def test_a_run_is_refused_before_it_starts(tmp_path, overrides, message):
    config = tiny_config(**overrides)
    if message is None:
        assert prepare.prepare(config, str(tmp_path)).mixing.mixup == 0.2
        return
    with pytest.raises(UserError, match=message) as error:
        prepare.prepare(config, str(tmp_path))
    assert '\n' not in str(error.value)
