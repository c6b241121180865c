"""Erasing, mixup and CutMix: what they do to images and to the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from flax_densenet import create_model, init_variables, settings
from flax_densenet.data.augment import mixing
from flax_densenet.data.augment.mixing import Mixing
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.errors import UserError
from flax_densenet.evaluation import evaluate
from flax_densenet.train import fit, step
from flax_densenet.weights import trained
from helpers.marks import exhaustive_after
from helpers.runs import (
    Stopped,
    assert_equal_bits,
    final_arrays,
    reuse_steps,
    stop_after,
    tiny_config,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
ALL = Mixing(erase=0.5, mixup=0.2, cutmix=1.0)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (8, 16, 24, 3), np.uint8)


mix = jax.jit(mixing.mix, static_argnames=('mixing', 'mean'))


def mix_all(images, key):
    return mix(images, key, ALL, mean=MEAN)


def mixed(seed=0, **fields):
    found = mix(IMAGES, jax.random.key(seed), Mixing(**fields), mean=MEAN)
    return mixing.Mixed(*map(np.asarray, found))


@pytest.mark.slow
def test_erased_boxes_have_the_mean_color():
    found = mixed(erase=0.5)
    fill = 255 * np.asarray(MEAN, 'f4')
    erased = (found.images == fill).all(-1)
    np.testing.assert_array_equal(found.images[~erased], IMAGES[~erased].astype('f4'))
    seen = np.asarray(trained.normalize(found.images, mean=MEAN, std=STD))
    assert np.abs(seen[erased]).max() < 1e-6
    np.testing.assert_array_equal(found.weights, 1)
    np.testing.assert_array_equal(found.partners, np.arange(8))
    for box in erased:  # one box, its rows and columns alike
        rows, columns = box.any(1), box.any(0)
        np.testing.assert_array_equal(box, rows[:, None] & columns)
    assert 0 < erased.any((1, 2)).sum() < 8
    assert not (mixed(erase=0.0).images != IMAGES).any()
    assert (mixed(erase=1.0).images == fill).all(-1).any((1, 2)).all()


def test_mixup_is_the_mean_of_two_images():
    found = mixed(mixup=0.5)
    share = found.weights[0]
    assert 0 < share < 1 and (found.weights == share).all()
    others = IMAGES[found.partners].astype('f4')
    assert sorted(found.partners) == list(range(8))
    assert (found.partners != np.arange(8)).all()
    expected = share * IMAGES.astype('f4') + (1 - share) * others
    np.testing.assert_allclose(found.images, expected, rtol=1e-6)
    partners = {tuple(mixed(seed, mixup=0.5).partners) for seed in range(12)}
    assert len(partners) > 3


def test_cutmix_is_a_box_of_another_image():
    sizes = []
    for seed in range(12):
        found = mixed(seed, cutmix=1.0)
        own = IMAGES.astype('f4')
        foreign = (found.images != own).any((0, -1))  # [H, W]
        rows, columns = foreign.any(1), foreign.any(0)
        np.testing.assert_array_equal(foreign, rows[:, None] & columns)
        expected = np.where(foreign[..., None], own[found.partners], own)
        np.testing.assert_array_equal(found.images, expected)
        np.testing.assert_allclose(found.weights, 1 - foreign.mean(), rtol=1e-6)
        sizes.append(foreign.mean())
    assert min(sizes) < 0.2 and max(sizes) > 0.5


@pytest.mark.slow
def test_with_both_each_batch_has_one_of_them():
    kinds = []
    for seed in range(12):
        found = mix_all(IMAGES, jax.random.key(seed))
        # Mixed evenly, hardly a value is a whole number.
        kinds.append(float((found.images % 1 != 0).mean()) > 0.5)
    assert 2 < sum(kinds) < 10


def test_shares_are_of_the_beta_distribution():
    uniform = (np.arange(4000, dtype='f4') + 0.5) / 4000
    places = np.linspace(0.01, 0.99, 50)
    for alpha in (0.01, 0.1, 0.2, 1.0, 3.0, 100.0):
        shares = np.asarray(mixing._from_beta(uniform, alpha))
        found = (shares[:, None] < places[None]).mean(0)
        assert np.abs(found - special.betainc(alpha, alpha, places)).max() < 1e-3


@pytest.mark.slow
def test_a_function_of_the_key_whatever_the_devices():
    key = jax.random.key(3)
    alone = jax.device_get(mix_all(IMAGES, key))
    assert_equal_bits(alone, jax.device_get(mix_all(IMAGES, key)))
    assert (alone.images != jax.device_get(mix_all(IMAGES, jax.random.key(4)))[0]).any()
    for count in (2, 4):
        mesh = mesh_lib.make_mesh(jax.devices()[:count])
        spread = mix_all(jax.device_put(IMAGES, mesh_lib.split_rows(mesh)), key)
        assert_equal_bits(alone, jax.device_get(spread))


def gradients_of(labels, fields, *, parts=1, classes=3, **options):
    """Gradients, losses, correctness of a step; the batch as `[parts, rows, ...]`."""
    module = create_model('L7k2', num_classes=classes, block_sizes=(1,), kernel='xla')
    differentiate = step.make_gradients(
        module,
        step.StepOptions(
            mean=MEAN,
            std=STD,
            seed=0,
            l2_penalty=0.0,
            frozen=0,
            mix=fields,
            accumulate_steps=parts,
            **options,
        ),
    )
    state = step.new_state(init_variables(module, 0), optax.sgd(0.1))
    batch = {'image': IMAGES, 'label': labels}
    if parts > 1:
        batch = {n: x.reshape(parts, -1, *x.shape[1:]) for n, x in batch.items()}
    take = jax.jit(differentiate)
    gradients, (losses, _, _) = take(state, batch)
    _, (others, _, _) = take(state.replace(step=np.int32(1)), batch)
    assert np.abs(losses - others).max() > 1e-3  # each step mixes anew
    return gradients, np.asarray(losses), (module, state)


def make_expected(module, state, loss_of):
    """Gradients and losses by soft labels `[N, C]`, without the code under test."""

    def mean_loss(params, images, targets):
        logits, _ = evaluate.forward(
            module,
            {'params': params, 'batch_stats': state.batch_stats},
            {'image': images},
            mean=MEAN,
            std=STD,
            mutable=['batch_stats'],
            train=True,
        )
        losses, weighted = loss_of(logits, targets)
        return weighted.mean(), losses

    take = jax.jit(jax.grad(mean_loss, has_aux=True))
    return lambda images, targets: take(state.params, images, targets)


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, other)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_loss_is_that_of_soft_labels():
    """Of each micro-batch, mixed by itself with its own key, and weighed by class."""
    labels, weights = np.arange(8, dtype=np.int32) % 3, np.array([0.5, 2.0, 1.0], 'f4')
    fields = Mixing(erase=0.5, mixup=1.0)
    gradients, losses, network = gradients_of(
        labels, fields, parts=2, class_weights=weights
    )

    def loss_of(logits, targets):
        terms = -targets * jax.nn.log_softmax(logits)
        return terms.sum(-1), (terms * weights[None]).sum(-1)

    expected_of, sums = make_expected(*network, loss_of), []
    for number in range(2):
        rows = slice(4 * number, 4 * number + 4)
        key = jax.random.fold_in(step.step_key(0, 0), number)
        found = mix(IMAGES[rows], key, fields, mean=MEAN)
        share = found.weights[:, None]
        own = jax.nn.one_hot(labels[rows], 3)
        targets = share * own + (1 - share) * own[found.partners]
        expected, expected_losses = expected_of(found.images, targets)
        assert_close(losses[number], expected_losses)
        sums.append(expected)
        plain, _ = expected_of(found.images, own)
        gap = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), plain, expected)
        assert max(jax.tree.leaves(gap)) > 1e-3  # the partners matter
    assert_close(gradients, jax.tree.map(lambda a, b: (a + b) / 2, *sums))


@pytest.mark.slow
def test_several_labels_some_of_them_unknown():
    labels = RNG.integers(0, 2, (8, 2)).astype('f4')
    labels[0] = labels[3, 1] = np.nan
    fields = Mixing(cutmix=1.0)
    gradients, losses, network = gradients_of(labels, fields, classes=2)
    found = mix(IMAGES, step.step_key(0, 0), fields, mean=MEAN)

    def one(logits, targets):
        each = optax.sigmoid_binary_cross_entropy(logits, jnp.nan_to_num(targets))
        known = ~jnp.isnan(targets)
        return (each * known).sum(-1) / jnp.maximum(known.sum(-1), 1)

    def both(logits, targets):
        share, theirs = found.weights, targets[np.asarray(found.partners)]
        losses = share * one(logits, targets) + (1 - share) * one(logits, theirs)
        return losses, losses

    expected, expected_losses = make_expected(*network, both)(found.images, labels)
    assert_close(gradients, expected)
    assert_close(losses, expected_losses)
    assert np.isfinite(losses).all()


def test_the_larger_share_counts_as_right_or_wrong():
    weights = np.array([0.7, 0.5, 0.2], 'f4')
    own = np.array([1.0, 2, 3], 'f4'), np.array([True, True, True])
    theirs = np.array([11.0, 12, 13], 'f4'), np.array([False, False, False])
    losses, correct = mixing.blend(own, theirs, weights)
    np.testing.assert_allclose(losses, [4, 7, 11], rtol=1e-6)
    assert correct.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'erase': 1.5}, r'data.erase=1.5 is a probability: use 0 to 1'),
        ({'erase': float('nan')}, 'data.erase=nan'),
        ({'mixup': -1.0}, 'data.mixup=-1.0 is the alpha .* use 0.01 to 100, or 0'),
        ({'cutmix': 1e6}, 'data.cutmix=1000000.0'),
        ({'mixup': 0.2, 'rows': 1}, 'data.mixup=0.2 has no two images to mix'),
    ],
)
def test_values_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        rows = fields.pop('rows', 8)
        mixing.from_settings(settings.AugmentationSettings(**fields), rows=rows)


EVERYTHING = {
    'model.block_sizes': (1,),
    'data.test_fraction': 0.9,
    'data.batch_size': 32,
    'data.augment': 'crop_flip',
    'data.color_jitter': (0.4, 0.4, 0.4, 0.1),
    'data.policy': 'randaugment',
    'data.erase': 0.25,
    'data.mixup': 0.2,
    'data.cutmix': 1.0,
    'data.size_schedule': ((0.5, 6),),
    'train.accumulate_steps': 2,
    'train.epochs': 4,
}


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    ('devices', 'stops'), exhaustive_after(1, [(1, (8, 9)), (2, (8,))])
)
def test_a_resumed_run_with_everything_on(tmp_path, monkeypatch, devices, stops):
    """Stopped among the small images and the large ones, bit for bit the same."""
    make_mesh = mesh_lib.make_mesh
    monkeypatch.setattr(
        mesh_lib, 'make_mesh', lambda _=None: make_mesh(jax.devices()[:devices])
    )
    reuse_steps(monkeypatch)
    config = tiny_config(**EVERYTHING)
    fit.fit(config, str(tmp_path / 'whole'))
    for steps in stops:  # of one size; an epoch has 5.6
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            with pytest.raises(Stopped):
                fit.fit(config, str(tmp_path / 'parts'))
    fit.fit(config, str(tmp_path / 'parts'))
    (number, whole), (other, parts) = (
        final_arrays(tmp_path / name) for name in ('whole', 'parts')
    )
    assert number == other == 23
    assert_equal_bits(whole, parts)
