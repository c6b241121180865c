"""The losses by hand, in double precision; beside torch's in test_torch_training.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_densenet import UserError, create_model, init_variables
from flax_densenet import losses as losses_lib
from flax_densenet.train import prepare, step, training_run
from helpers.marks import slow_after
from helpers.runs import tiny_config

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (6, 4)).astype(np.float32)
CLASSES = np.array([0, 1, 2, 3, 3, 0], np.int32)
SEVERAL = np.where(RNG.random((6, 4)) < 0.3, np.nan, RNG.integers(0, 2, (6, 4)))
SEVERAL = SEVERAL.astype(np.float32)
SEVERAL[5] = np.nan


def softmax(z):
    z = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z.astype(np.float64)))


def targets(smoothing):
    return np.eye(4)[CLASSES] * (1 - smoothing) + smoothing / 4


def losses(name, labels=CLASSES, logits=LOGITS, **fields):
    loss = losses_lib.Loss(name, **fields)
    return np.asarray(jax.jit(loss.losses)(logits, labels))


@pytest.mark.parametrize('smoothing', slow_after(1, [0.2, 0.0]))
def test_one_class_an_image(smoothing):
    p, q, target = softmax(LOGITS), sigmoid(LOGITS), targets(smoothing)
    expected = {
        'cross_entropy': -(target * np.log(p)).sum(-1),
        'focal': -(target * (1 - p) ** 1.5 * np.log(p)).sum(-1),
        'bce': -(target * np.log(q) + (1 - target) * np.log(1 - q)).mean(-1),
    }
    assert expected.keys() == set(losses_lib.LOSSES)
    for name, rows in expected.items():
        found = losses(name, label_smoothing=smoothing, focal_gamma=1.5)
        np.testing.assert_allclose(found, rows, rtol=1e-5, atol=1e-6)
    same = losses('focal', label_smoothing=smoothing, focal_gamma=0.0)
    np.testing.assert_allclose(same, expected['cross_entropy'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('smoothing', slow_after(1, [0.2, 0.0]))
def test_several_labels_an_image(smoothing):
    known, q = ~np.isnan(SEVERAL), sigmoid(LOGITS)
    target = np.where(known, SEVERAL, 0) * (1 - smoothing) + smoothing / 2
    entropy = -(target * np.log(q) + (1 - target) * np.log(1 - q))
    away = target * (1 - q) + (1 - target) * q
    for name, each in {
        'cross_entropy': entropy,
        'bce': entropy,
        'focal': away**2 * entropy,
    }.items():
        rows = [
            row[k].mean() if k.any() else 0 for row, k in zip(each, known, strict=True)
        ]
        found = losses(name, SEVERAL, label_smoothing=smoothing)
        np.testing.assert_allclose(found, rows, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['cross_entropy', 'bce'])
def test_soft_targets_are_learned_and_not_measured(name):
    """A target t is the mean of the losses of 1 and 0, also with weights."""
    loss = losses_lib.Loss(name, pos_weight=(3.0, 0.5, 1.0, 2.0))
    soft = SEVERAL.copy()
    soft[:2, 1:3] = 0.7, 0.2
    one, zero = (
        loss.losses(LOGITS, np.where((soft > 0) & (soft < 1), value, soft))
        for value in (1.0, 0.0)
    )
    for share, column in ((0.7, 1), (0.2, 2)):
        alone = np.full_like(soft, np.nan)
        alone[:, column] = share
        parts = [
            loss.losses(LOGITS, np.where(np.isnan(alone), alone, value))
            for value in (1.0, 0.0)
        ]
        expected = share * parts[0] + (1 - share) * parts[1]
        found = loss.losses(LOGITS, alone)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    between = loss.losses(LOGITS, soft)[:2]
    assert ((between - one[:2]) * (between - zero[:2]) < 0).all()
    hidden = np.where((soft > 0) & (soft < 1), np.nan, soft)
    for found, expected in zip(
        losses_lib.measure(LOGITS, soft),
        losses_lib.measure(LOGITS, hidden),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    assert (np.asarray(loss.losses(LOGITS, hidden))[:2] != between).all()


def test_positives_weigh_more():
    """As in torch's BCEWithLogitsLoss: w * y * log(p) + (1 - y) * log(1 - p)."""
    weight = np.resize([3.0, 0.5, 1.0], SEVERAL.shape[1])
    known, q = ~np.isnan(SEVERAL), sigmoid(LOGITS)
    target = np.where(known, SEVERAL, 0)
    each = -(weight * target * np.log(q) + (1 - target) * np.log(1 - q))
    expected = np.where(known, each, 0).sum(-1) / np.maximum(known.sum(-1), 1)
    ones = (1.0,) * len(weight)

    @jax.jit
    def measure():
        several = (
            losses_lib.Loss(pos_weight=tuple(weight)),
            losses_lib.Loss(pos_weight=ones),
            losses_lib.Loss(),
            losses_lib.Loss('focal', pos_weight=tuple(weight)),
        )
        return [loss.losses(LOGITS, SEVERAL) for loss in several]

    found, alike, plain, focal = measure()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alike, plain, rtol=1e-6)
    each = np.where(target > 0, weight, 1) * -(
        target * (1 - q) ** 2 * np.log(q) + (1 - target) * q**2 * np.log(1 - q)
    )
    expected = np.where(known, each, 0).sum(-1) / np.maximum(known.sum(-1), 1)
    np.testing.assert_allclose(focal, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', losses_lib.LOSSES)
def test_gradients_are_finite_where_an_answer_is_sure(name):
    logits = jnp.array([[90.0, -90.0, 0.0], [-90.0, 90.0, 0.0]])
    for gamma in (0.0, 0.5, 2.0):
        loss = losses_lib.Loss(name, label_smoothing=0.1, focal_gamma=gamma)
        total = jax.jit(
            jax.grad(lambda z, loss=loss: loss.losses(z, CLASSES[:2]).sum())
        )
        assert np.isfinite(total(logits)).all()


@pytest.mark.parametrize('name', losses_lib.LOSSES)
def test_losses_are_linear_in_their_target(name):
    """What mixup relies on: by half and half of all pairs, a smoothed target."""
    mixed = np.mean([losses(name, np.full(6, c, np.int32)) for c in range(4)], 0)
    half = 0.5 * losses(name) + 0.5 * mixed
    found = losses(name, label_smoothing=0.5)
    np.testing.assert_allclose(found, half, rtol=1e-4, atol=1e-5)


def test_figures_stay_the_cross_entropy():
    found, correct = losses_lib.measure(LOGITS, CLASSES)
    rows = -np.log(softmax(LOGITS)[np.arange(6), CLASSES])
    np.testing.assert_allclose(found, rows, rtol=1e-5)
    assert correct.tolist() == (LOGITS.argmax(-1) == CLASSES).tolist()


def test_the_gradient_is_of_it():
    """Of the head alone, by hand; what is reported stays the cross-entropy."""
    module = create_model('BC-L10k4', num_classes=4)
    variables = init_variables(module, seed=0)
    head = variables['params']['classifier']
    features = RNG.normal(size=(6, head['kernel'].shape[0])).astype(np.float32)
    batch = {'features': features[:, None, None], 'label': CLASSES}
    differentiate = step.make_gradients(
        module,
        step.StepOptions(
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            seed=0,
            l2_penalty=0.0,
            frozen=len(module.stages()) - 1,
            loss=losses_lib.Loss('bce', label_smoothing=0.2),
        ),
    )
    state = step.new_state(variables, optax.sgd(0.1))
    gradients, (reported, _, _) = jax.jit(differentiate)(state, batch)
    logits = features @ head['kernel'] + head['bias']
    expected = features.T @ (sigmoid(logits) - targets(0.2)) / logits.size
    found = gradients['classifier']['kernel']
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    rows = -np.log(softmax(logits)[np.arange(6), CLASSES])
    np.testing.assert_allclose(reported, rows, rtol=1e-4)


def test_a_run_takes_the_fields(monkeypatch, tmp_path):
    fields = {'train.loss': 'focal', 'train.label_smoothing': 0.1, 'train.ema': 0.9}
    run = prepare.prepare(tiny_config(**fields), str(tmp_path))
    found = []
    monkeypatch.setattr(step, 'make_train_step', lambda *given: found.append(given[2]))
    monkeypatch.setattr(step, 'compile_train_step', lambda *_: None)
    training_run.compile_step(run, None, 0)
    (options,) = found
    assert (options.loss, options.ema) == (losses_lib.Loss('focal', 0.1, 2.0), 0.9)


FIELDS = dict(loss='focal', label_smoothing=0.1, focal_gamma=2.0)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'loss': 'mse'}, 'train.loss=mse is not known; use cross_entropy, focal, bce'),
        ({'label_smoothing': 1.0}, 'train.label_smoothing=1 must be at least 0 and'),
        ({'label_smoothing': -0.1}, 'train.label_smoothing=-0.1 must be at least 0'),
        ({'focal_gamma': -1.0}, 'train.focal_gamma=-1 must be at least 0'),
        ({'focal_gamma': float('nan')}, 'train.focal_gamma=nan must be'),
    ],
)
def test_bad_fields(fields, message):
    assert losses_lib.make_loss(**FIELDS) == losses_lib.Loss('focal', 0.1, 2.0)
    with pytest.raises(UserError, match=message):
        losses_lib.make_loss(**FIELDS | fields)
