"""Fine-tuning: what is frozen stays, what trains does at its rate, and resumes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.data import dataset, labeled_images
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.evaluation import evaluate
from flax_densenet.models import summary
from flax_densenet.train import (
    feature_cache,
    finetune,
    fit,
    optimizers,
    step,
)
from flax_densenet.weights import trained as trained_lib
from helpers.blocks import require_native
from helpers.marks import exhaustive_after
from helpers.networks import compiled
from helpers.runs import (
    Stopped,
    assert_equal_bits,
    final_arrays,
    read_records,
    stop_after,
    tiny_config,
)
from helpers.steps import MEAN, STD, make_batch

# BC-L10k4: a stem without a norm, three blocks of one layer.
STAGES = [
    {'conv0'},
    {'denseblock1', 'transition1'},
    {'denseblock2', 'transition2'},
    {'denseblock3', 'norm5'},
    {'classifier'},
]
# The same with two blocks.
TWO = [*STAGES[:2], {'denseblock2', 'norm5'}, {'classifier'}]
SIZE = {'data.image_size': 8, 'data.batch_size': 100, 'data.test_fraction': 0.7}
SIZE |= {'model.block_sizes': (1, 1, 1)}


def equal_leaves(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return [np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves]


def take_steps(frozen):
    """Variables before and after two steps, and the compiled step's operations."""
    module = create_model(
        'BC-L10k4', num_classes=3, block_sizes=(1, 1), dropout_rate=0.2
    )
    optimizer = finetune.make_optimizer(
        lambda first: optax.adamw(0.01, weight_decay=0.1),
        {n: float(i >= frozen) for i, names in enumerate(TWO) for n in names},
    )
    mesh, variables = mesh_lib.make_mesh(), init_variables(module, 0)
    state = mesh_lib.replicate(step.new_state(variables, optimizer), mesh)
    train_step = step.make_train_step(
        module,
        optimizer,
        step.StepOptions(mean=MEAN, std=STD, l2_penalty=0.1, frozen=frozen),
    )
    batch = mesh_lib.to_global(make_batch(0), mesh)
    compiled = step.compile_train_step(train_step, state, batch, mesh)
    for _ in range(2):
        state, _ = compiled(state, batch)
    state = jax.device_get(state)
    after = {'params': state.params, 'batch_stats': state.batch_stats}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    return variables, after, moments, compiled.cost_analysis()['flops']


@pytest.fixture(scope='module')
def steps():
    return {frozen: take_steps(frozen) for frozen in (0, 2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize('frozen', exhaustive_after(1, [2, 0, 3]))
def test_what_is_frozen_keeps_its_bits(steps, frozen):
    """Parameters and statistics, with dropout, decay and penalty; the rest changes."""
    before, after, moments, _ = steps[frozen]
    live = set().union(*TWO[frozen:])
    trained = 0
    for collection, parts in before.items():
        assert parts.keys() == after[collection].keys()
        for name, part in parts.items():
            for equal in equal_leaves(part, after[collection][name]):
                assert equal != (name in live), (collection, name)
            if collection == 'params' and name in live:
                trained += sum(leaf.size for leaf in jax.tree.leaves(part))
    assert moments == 2 * trained + 1  # Adam's, and its counter


@pytest.mark.slow
def test_frozen_parts_cost_no_backward_pass(steps):
    """Backward is twice forward; at least what is frozen of that is not computed."""
    all_of_it, two_stages, head = (steps[frozen][3] for frozen in (0, 2, 3))
    assert head < 0.45 * all_of_it
    assert head < two_stages < 0.8 * all_of_it


@pytest.mark.slow
def test_frozen_blocks_have_no_backward_call():
    require_native()
    module = create_model('BC-L10k4', num_classes=3, kernel='native')
    optimizer = optax.sgd(0.1)
    state = step.new_state(init_variables(module, 0), optimizer)
    calls = {}
    for frozen in (0, 2, 3, 4):
        train_step = step.make_train_step(
            module, optimizer, step.StepOptions(mean=MEAN, std=STD, frozen=frozen)
        )
        text = jax.jit(train_step).lower(state, make_batch(0)).as_text()
        calls[frozen] = [
            text.count(f'flax_densenet_DenseBlock{name}')
            for name in ('ForwardTrain', 'ForwardEval', 'Backward')
        ]
    assert calls == {0: [3, 0, 3], 2: [2, 1, 2], 3: [1, 2, 1], 4: [0, 3, 0]}


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize('fast', exhaustive_after(1, [True, False]))
def test_frozen_stages_compute_as_in_evaluation(fast):
    module = create_model(
        'BC-L10k4', num_classes=3, dropout_rate=0.5, stem='imagenet', fast=fast
    )
    variables = init_variables(module, 0)
    images = jnp.asarray(make_batch(0, size=32)['image'], jnp.float32) / 255

    def pyramid(train, frozen):
        rngs = {'dropout': jax.random.key(0)} if frozen < 4 else None
        options = dict(train=train, frozen=frozen, rngs=rngs, mutable=['batch_stats'])
        return compiled(module, method='pyramid', **options)(variables, images)[0]

    evaluated = pyramid(False, 0)
    for frozen in (0, 2, 4):
        same = [
            np.allclose(ours, theirs, rtol=1e-5)
            for ours, theirs in zip(pyramid(True, frozen), evaluated, strict=True)
        ]
        assert same == [block < frozen for block in (1, 2, 3)]


@pytest.mark.slow
def test_rates_are_those_of_the_updates():
    module = create_model('densenet121', num_classes=3)
    assert finetune.make_rates(module, layer_decay=0.8)['norm0'] == 0.8**5
    module = create_model('BC-L10k4', num_classes=3)
    rates = finetune.make_rates(
        module, freeze='denseblock1', layer_decay=0.5, head_multiplier=3.0
    )
    by_hand = {
        'conv0': 0, 'denseblock1': 0, 'transition1': 0, 'denseblock2': 0.25,
        'transition2': 0.25, 'denseblock3': 0.5, 'norm5': 0.5, 'classifier': 3,
    }  # fmt: skip
    assert rates == by_hand
    optimizer = finetune.make_optimizer(
        lambda first: optimizers.make_optimizer(
            lambda count: 0.1, name='sgd', momentum=0.0, weight_decay=0.0
        ),
        rates,
    )
    params = init_variables(module, 0)['params']
    gradients = {name: params[name] for name, rate in by_hand.items() if rate}
    updates, _ = optimizer.update(gradients, optimizer.init(params), gradients)
    assert updates.keys() == gradients.keys()
    for name, update in updates.items():
        jax.tree.map(
            lambda u, g, rate=by_hand[name]: np.testing.assert_allclose(
                u, -0.1 * rate * g, rtol=1e-6
            ),
            update,
            gradients[name],
        )


def test_rates_leave_the_state_as_it_is():
    """So they may change in a resumed run; without them nothing is computed."""
    module, plain = create_model('BC-L10k4', num_classes=3), optax.adam(0.1)
    params = init_variables(module, 0)['params']
    ones, others = (finetune.make_rates(module, layer_decay=d) for d in (1.0, 0.5))
    assert finetune.make_optimizer(lambda first: plain, ones) is plain
    scaled = finetune.make_optimizer(lambda first: plain, others)
    states = [optimizer.init(params) for optimizer in (plain, scaled)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


@pytest.mark.slow
def test_the_rest_begins_when_the_head_is_warm():
    """Adam's first step of either is the schedule's rate at that step of training."""
    rates = {'body': 0.5, 'classifier': 1.0}
    optimizer = finetune.make_optimizer(
        lambda first: optax.adam(lambda count: 0.01 * (first + count + 1.0)),
        rates,
        head_steps=20,
    )
    params = {'body': jnp.ones(1), 'classifier': jnp.ones(1)}
    state = optimizer.init(params)
    start = state['rest']
    for count in range(22):
        names = ['classifier'] if count < 20 else ['body', 'classifier']
        gradients = {name: jnp.ones(1) for name in names}
        updates, state = optimizer.update(gradients, state, gradients)
        assert updates.keys() == set(names)
        for name in names:
            expected = -0.01 * (count + 1) * rates[name]
            np.testing.assert_allclose(updates[name], expected, rtol=1e-4)
        if count < 20:
            assert_equal_bits(state['rest'], start)


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('pretrained')
    # Running statistics settle within these few steps.
    overrides = {'model.momentum': 0.5, 'optimizer.learning_rate': 0.01}
    config = tiny_config(**SIZE, **overrides)
    fit.fit(config, str(workdir))
    return str(workdir)


def fit_in_parts(config, workdir, monkeypatch, steps):
    """Ends after so many steps; the next call goes on."""
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Stopped):
            fit.fit(config, str(workdir))


@pytest.mark.slow
def test_head_warmup_and_resuming(pretrained, tmp_path, monkeypatch, capsys):
    overrides = {
        'model.dropout_rate': 0.1,
        'data.augment': 'shift_flip',
        'optimizer.schedule': 'cosine',
        'optimizer.layer_decay': 0.5,
        'train.epochs': 4,
        'train.freeze': 'denseblock1',
        'train.head_warmup_epochs': 2,
    }
    config = tiny_config(**SIZE, **overrides) | {'init_from': pretrained}
    fit.fit(config, str(tmp_path / 'whole'))
    out = capsys.readouterr().out
    assert 'frozen: conv0 to transition1; up to epoch 2 the classifier trains' in out
    assert out.count('compiled in') == 2

    start = trained_lib.load_trained(pretrained, 'latest').variables

    def changed(variables):
        return {
            name
            for collection, parts in jax.device_get(start).items()
            for name, part in parts.items()
            if not all(equal_leaves(part, variables[collection][name]))
        }

    parts = tmp_path / 'parts'
    fit_in_parts(config, parts, monkeypatch, 8)  # in epoch 2: the head's
    assert 'compiled in' in capsys.readouterr().out
    fit_in_parts(config, parts, monkeypatch, 9)  # in epoch 3, the first of the rest
    assert 'resuming after epoch 1' in capsys.readouterr().out
    step_, arrays = final_arrays(parts)
    assert step_ == 11 and changed(arrays['model']) == {'classifier'}
    # The optimizer's state has other parts with another setting.
    other = config | {'train': config['train'] | {'freeze': 'none'}}
    with pytest.raises(UserError, match='freeze=denseblock1, not none; use another'):
        fit.fit(other, str(parts))
    fit.fit(config | {'init_from': ''}, str(parts))  # the checkpoint has weights
    assert 'resuming after epoch 2' in capsys.readouterr().out
    step_, arrays = final_arrays(parts)
    assert step_ == 22 and changed(arrays['model']) == set().union(*STAGES[2:])
    assert_equal_bits(arrays, final_arrays(tmp_path / 'whole')[1])


@pytest.fixture
def reads(monkeypatch):
    """Positions of the images that are read."""
    positions, get = [], labeled_images.Examples.__getitem__

    def read(self, position):
        positions.append(position)
        return get(self, position)

    monkeypatch.setattr(labeled_images.Examples, '__getitem__', read)
    return positions


@pytest.mark.slow
def test_cached_features_change_nothing(
    pretrained, tmp_path, monkeypatch, capsys, reads
):
    """Figures and checkpoints are those of computing them in each epoch."""
    overrides = {'train.freeze': 'backbone', 'train.epochs': 3}
    config = tiny_config(**SIZE, **overrides, **{'optimizer.learning_rate': 0.1})
    config['init_from'] = pretrained
    fit.fit(config, str(tmp_path / 'cached'))
    assert len(reads) == 600 + 1300  # once: 539 and 1258, in batches of 100
    assert 'features of 1797 images, 9 each' in capsys.readouterr().out
    off = config | {'train': config['train'] | {'cache_features': 'off'}}
    fit.fit(off, str(tmp_path / 'computed'))
    assert len(reads) > 1900 + 3 * 1797
    assert 'features of' not in capsys.readouterr().out

    first, *_, last = read_records(tmp_path / 'cached')
    assert last['train_loss'] < 0.9 * first['train_loss']  # there is something to see
    records = [read_records(tmp_path / name) for name in ('cached', 'computed')]
    for cached, computed in zip(*records, strict=True):
        assert cached.keys() == computed.keys()
        for name in ('train_loss', 'test_loss'):
            assert cached[name] == pytest.approx(computed[name], rel=1e-4)
        for name in ('epoch', 'step', 'train_count', 'learning_rate'):
            assert cached[name] == computed[name]
    # Whole models, of which the backbone is that of the start.
    arrays, computed = (final_arrays(tmp_path / n)[1] for n in ('cached', 'computed'))
    assert jax.tree.structure(arrays) == jax.tree.structure(computed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), arrays, computed
    )
    start = jax.device_get(trained_lib.load_trained(pretrained, 'latest').variables)
    for collection, parts in start.items():
        for name, part in parts.items():
            equal = all(equal_leaves(part, arrays['model'][collection][name]))
            assert equal == (name != 'classifier')

    fit_in_parts(config, tmp_path / 'parts', monkeypatch, 8)  # in epoch 2
    fit.fit(config, str(tmp_path / 'parts'))
    assert 'resuming after epoch 1' in capsys.readouterr().out
    assert_equal_bits(arrays, final_arrays(tmp_path / 'parts')[1])


@pytest.mark.exhaustive
@pytest.mark.slow
def test_features_with_several_labels_an_image():
    """In their order, the last batch not full; labels with what is not known."""
    module = create_model('BC-L10k4', num_classes=3)
    images = make_batch(0, size=8, count=13)['image']
    labels = np.random.default_rng(0).choice([0, 1, np.nan], (13, 3)).astype('f')
    examples = [
        {'image': image, 'label': label}
        for image, label in zip(images, labels, strict=True)
    ]
    source = dataset.Source('', ('a', 'b', 'c'), examples[:9], examples[9:])
    variables = init_variables(module, 0)
    cached = feature_cache.cache_features(
        module, variables, source, changes=[], limit_gib=1.0, batch_size=4,
        mesh=mesh_lib.make_mesh(), mean=MEAN, std=STD,
    )  # fmt: skip
    found = [*cached.train, *cached.test]
    np.testing.assert_array_equal([example['label'] for example in found], labels)
    logits = [
        evaluate.forward(module, variables, batch, mean=MEAN, std=STD)
        for batch in (
            {'image': images},
            {'features': np.stack([example['features'] for example in found])},
        )
    ]
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert np.ptp(logits[0], axis=0).min() > 1e-3  # images can be told apart


@pytest.mark.parametrize(
    ('changes', 'limit', 'reason'),
    [
        (['data.mixup=0.2'], 1.0, 'data.mixup=0.2 changes the images'),
        (
            [],
            1e-5,
            'they would take 0.00 GiB, more than data.cache_limit_gib=1e-05',
        ),
    ],
)
def test_where_features_are_not_cached(changes, limit, reason, capsys):
    module = create_model('BC-L10k4', num_classes=10)
    source = dataset.load_source('digits', image_size=8)
    cached = feature_cache.cache_features(
        module, None, source, changes=changes, limit_gib=limit, batch_size=100,
        mesh=None, mean=MEAN, std=STD,
    )  # fmt: skip
    assert cached is None
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'train.freeze': 'all'}, 'freeze=all is not known; use none, backbone, dense'),
        ({'train.freeze': 'denseblock4'}, 'use none, .*denseblock3$'),
        (
            {'train.head_warmup_epochs': 2},
            '=2 must be 0 or above, and below .*epochs=2',
        ),
        ({'train.head_warmup_epochs': -1}, 'head_warmup_epochs=-1 must be 0 or above'),
        ({'optimizer.layer_decay': 0.0}, 'layer_decay=0 must be above 0 and at most 1'),
        ({'optimizer.layer_decay': 1.1}, 'layer_decay=1.1 must be above 0 and at most'),
        ({'optimizer.head_multiplier': 0.0}, 'head_multiplier=0 must be above 0'),
        (
            {'train.cache_features': 'on'},
            'cache_features=on is not known; use auto, off',
        ),
        ({'train.freeze': 'backbone'}, 'freeze=backbone would keep random .*init_from'),
        ({'train.head_warmup_epochs': 1}, 'head_warmup_epochs=1 would keep random'),
    ],
)
def test_mistakes(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fit.fit(tiny_config(**SIZE, **overrides), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_summary():
    module = create_model('BC-L10k4', num_classes=10)
    rates = finetune.make_rates(module, freeze='denseblock2', layer_decay=0.5)
    lines = summary.format_summary(module, (32, 32, 3), rates=rates).splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines}
    assert table['transition2'][-1] == 'frozen'
    assert table['norm5'][-2:] == ['x', '0.5']
    assert table['classifier'][-2:] == ['x', '1']
    trained = [table[name][1] for name in ('denseblock3', 'norm5', 'classifier')]
    assert table['trained'] == [f'{sum(int(n.replace(",", "")) for n in trained):,}']
    plain = summary.format_summary(
        module, (32, 32, 3), rates=finetune.make_rates(module)
    )
    assert plain == summary.format_summary(module, (32, 32, 3))
