"""Losses, rates, optimizers and averages beside torch's, torchvision's and timm's."""

import importlib
import importlib.util

import jax
import numpy as np
import optax
import pytest

from flax_densenet import losses as losses_lib
from flax_densenet.train import ema, optimizers

torch = pytest.importorskip('torch')

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (16, 5)).astype(np.float32)
CLASSES = RNG.integers(0, 5, 16)
SEVERAL = RNG.integers(0, 2, (16, 5)).astype(np.float32)


@pytest.fixture(scope='module')
def torchvision():
    if importlib.util.find_spec('torchvision') is None:
        pytest.skip('torchvision is not installed')
    from benchmarks import torch_models

    return torch_models.import_torchvision()


@pytest.fixture(scope='module')
def timm(torchvision):
    timm = pytest.importorskip('timm')
    for part in ('loss', 'optim', 'utils'):
        importlib.import_module(f'timm.{part}')
    return timm


def ours(name, labels=CLASSES, **fields):
    """Losses, and the gradient of their mean."""
    loss = losses_lib.Loss(name, **fields)
    gradient = jax.grad(lambda logits: loss.losses(logits, labels).mean())
    return loss.losses(LOGITS, labels), jax.jit(gradient)(LOGITS)


def theirs(losses_of):
    """The same of a function of torch's logits."""
    logits = torch.tensor(LOGITS, requires_grad=True)
    losses = losses_of(logits)
    losses.mean().backward()
    return losses.detach().numpy(), logits.grad.numpy()


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_cross_entropy(smoothing):
    loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction='none')
    expected = theirs(lambda logits: loss(logits, torch.tensor(CLASSES)))
    assert_same(ours('cross_entropy', label_smoothing=smoothing), expected)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_bce(smoothing, timm):
    """timm's, of the recipe's authors, and torch's; of labels torch's."""
    target = torch.tensor(np.eye(5, dtype=np.float32)[CLASSES])
    target = target * (1 - smoothing) + smoothing / 5
    loss = torch.nn.BCEWithLogitsLoss(reduction='none')
    expected = theirs(lambda logits: loss(logits, target).mean(-1))
    found = ours('bce', label_smoothing=smoothing)
    assert_same(found, expected)
    whole = timm.loss.BinaryCrossEntropy(smoothing=smoothing)
    np.testing.assert_allclose(
        found[0].mean(), whole(torch.tensor(LOGITS), torch.tensor(CLASSES)), rtol=1e-5
    )
    expected = theirs(lambda logits: loss(logits, torch.tensor(SEVERAL)).mean(-1))
    for name in ('bce', 'cross_entropy'):
        assert_same(ours(name, SEVERAL), expected)


@pytest.mark.parametrize('gamma', [0.5, 2.0])
def test_focal(gamma, torchvision):
    focal, options = torchvision.ops.sigmoid_focal_loss, dict(alpha=-1, gamma=gamma)
    target = torch.tensor(SEVERAL)
    expected = theirs(lambda logits: focal(logits, target, **options).mean(-1))
    assert_same(ours('focal', SEVERAL, focal_gamma=gamma), expected)
    # The softmax of two classes is the sigmoid of their difference.
    labels = CLASSES % 2
    found = losses_lib.Loss('focal', focal_gamma=gamma).losses(LOGITS[:, :2], labels)
    expected = focal(
        torch.tensor(LOGITS[:, 1] - LOGITS[:, 0]),
        torch.tensor(labels, dtype=torch.float32),
        **options,
    )
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(('warmup', 'share'), [(0.0, 0.3), (2.0, 0.2)])
def test_one_cycle(warmup, share):
    schedule = optimizers.make_schedule(
        learning_rate=0.3,
        schedule='one_cycle',
        drop_at=(),
        warmup_epochs=warmup,
        epochs=10,
        steps_per_epoch=13.0,
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.3, total_steps=130, pct_start=share
    )
    for count in range(130):
        expected = optimizer.param_groups[0]['lr']
        assert float(schedule(count)) == pytest.approx(expected, rel=1e-4, abs=1e-7)
        optimizer.step()
        if count < 129:
            cycle.step()


PARAMS = {
    'kernel': RNG.normal(size=(4, 3)).astype(np.float32),
    'scale': RNG.uniform(0.5, 2, 3).astype(np.float32),
    'bias': np.zeros(3, np.float32),
}
GRADIENTS = [
    {name: RNG.normal(size=leaf.shape).astype(np.float32) for name, leaf in
     PARAMS.items()} for _ in range(4)
]  # fmt: skip


def take_ours(**fields):
    optimizer = optimizers.make_optimizer(0.05, momentum=0.9, **fields)
    state, params = optimizer.init(PARAMS), PARAMS
    update = jax.jit(optimizer.update)
    for gradient in GRADIENTS:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def take_theirs(make, decay, weight_decay):
    tensors = {k: torch.tensor(v, requires_grad=True) for k, v in PARAMS.items()}
    undecayed = [] if decay == 'all' else [tensors['scale'], tensors['bias']]
    decayed = [v for v in tensors.values() if not any(v is one for one in undecayed)]
    groups = [{'params': decayed, 'weight_decay': weight_decay}]
    if undecayed:
        groups.append({'params': undecayed, 'weight_decay': 0.0})
    optimizer = make(groups)
    for gradient in GRADIENTS:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[name])
        optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def assert_same_steps(found, expected):
    for name, leaf in PARAMS.items():
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-6)
        assert np.abs(found[name] - leaf).max() > 1e-3


@pytest.mark.parametrize('decay', optimizers.DECAYS)
def test_lamb(decay, timm):
    """timm's, without the clipping that is a field of its own here."""
    expected = take_theirs(
        lambda groups: timm.optim.Lamb(groups, lr=0.05, max_grad_norm=None), decay, 0.1
    )
    found = take_ours(name='lamb', weight_decay=0.1, decay=decay)
    assert_same_steps(found, expected)
    adam = take_ours(name='adamw', weight_decay=0.1, decay=decay)
    assert not np.allclose(found['kernel'], adam['kernel'], rtol=1e-2)


@pytest.mark.parametrize('decay', optimizers.DECAYS)
@pytest.mark.parametrize('name', ['adam', 'adamw', 'sgd'])
def test_weight_decay(name, decay):
    make = {
        'adam': lambda groups: torch.optim.Adam(groups, lr=0.05),
        'adamw': lambda groups: torch.optim.AdamW(groups, lr=0.05),
        'sgd': lambda groups: torch.optim.SGD(
            groups, lr=0.05, momentum=0.9, nesterov=True
        ),
    }[name]
    expected = take_theirs(make, decay, 0.1)
    assert_same_steps(take_ours(name=name, weight_decay=0.1, decay=decay), expected)


def make_network():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    network[1].num_batches_tracked = None  # an average of it would mean nothing
    return network


def values_of(network):
    """As `{'params', 'batch_stats'}`, of numpy copies."""
    kinds = {
        'params': network.named_parameters(),
        'batch_stats': network.named_buffers(),
    }
    return {
        kind: {name: tensor.detach().numpy().copy() for name, tensor in found}
        for kind, found in kinds.items()
    }


def train_a_step(network, number):
    generator = torch.Generator().manual_seed(number)
    network(torch.randn(8, 3, generator=generator) + number).square().sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 0.05 * parameter.grad
            parameter.grad = None


@pytest.mark.parametrize('warm', [False, True])
def test_average(warm, timm):
    """torch's with buffers, in the long run; timm's for the first steps.

    timm's warm-up is 1 - (1 + n / gamma) ** -power, which is ours for gamma 9, power 1.
    """
    network, decay = make_network(), 0.7
    average = ema.start(values_of(network), ['0.weight', '0.bias', '1.weight',
        '1.bias', '1.running_mean', '1.running_var'])  # fmt: skip
    if warm:
        other = timm.utils.ModelEmaV3(
            network, decay=decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0
        )
    else:
        other = torch.optim.swa_utils.AveragedModel(
            network,
            multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay),
            use_buffers=True,
        )
        other.update_parameters(network)  # the first one is a copy
    for number in range(20):
        train_a_step(network, number)
        here = values_of(network)
        average = ema.update(
            average,
            here['params'],
            here['batch_stats'],
            decay=decay,
            step=jax.numpy.int32(number if warm else 10**6),
        )
        if warm:
            other.update(network, step=number + 2)
        else:
            other.update_parameters(network)
        for kind, found in values_of(other.module).items():
            for name, expected in found.items():
                np.testing.assert_allclose(
                    average[kind][name], expected, rtol=1e-4, atol=1e-6
                )
    moved = here['batch_stats']['1.running_mean']
    assert not np.allclose(average['batch_stats']['1.running_mean'], moved, rtol=1e-2)
