"""Batch norm by groups: what a model computes for them, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.models import ghost_batch_norm
from flax_densenet.train import announce, checks, fit, prepare, step
from helpers.marks import exhaustive_after
from helpers.runs import change_settings, tiny_config

GROUP, COUNT = 2, 3
IMAGES = np.random.default_rng(0).standard_normal((6, 8, 8, 3), np.float32)


def make(**fields):
    return create_model(
        'BC-L10k4', num_classes=3, block_sizes=(1, 1), stem_features=4, **fields
    )


def run(module, variables, images):
    """Logits, the new batch statistics, and the gradient of a sum of the logits."""

    def total(params):
        logits, updated = module.apply(
            {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
        )
        weights = jnp.sin(jnp.arange(3.0)).reshape(1, -1)
        return (logits * weights).sum(), (logits, updated['batch_stats'])

    gradients, found = jax.jit(jax.grad(total, has_aux=True))(variables['params'])
    return {'logits': found[0], 'statistics': found[1], 'gradients': gradients}


def variables_of(module):
    """With running statistics that are not those of the start."""
    variables, rng = init_variables(module, 0), np.random.default_rng(1)
    variables['batch_stats'] = jax.tree.map(
        lambda leaf: leaf + rng.random(leaf.shape).astype(np.float32),
        variables['batch_stats'],
    )
    return variables


@pytest.fixture(scope='module')
def by_hand():
    """Each group by itself, through the plain layers."""
    module = make(fast=False)
    each = [
        run(module, variables_of(module), IMAGES[GROUP * n : GROUP * (n + 1)])
        for n in range(COUNT)
    ]
    return {
        'logits': np.concatenate([one['logits'] for one in each]),
        'statistics': jax.tree.map(
            lambda *leaves: np.mean(leaves, 0), *(one['statistics'] for one in each)
        ),
        'gradients': jax.tree.map(
            lambda *leaves: np.sum(leaves, 0), *(one['gradients'] for one in each)
        ),
    }


WAYS = exhaustive_after(
    1,
    [
        {'kernel': 'native'},
        {'kernel': 'xla'},
        {'fast': False},
        {'kernel': 'xla', 'remat': 'none'},
    ],
)


@pytest.mark.slow
@pytest.mark.parametrize('way', WAYS, ids=str)
def test_each_group_has_its_own_statistics(way, by_hand):
    """The running ones move once, to the average of where each group moves them."""
    if way.get('kernel') == 'native' and (reason := cpu_kernels.load()):
        pytest.skip(reason)
    module = make(batch_norm_group=GROUP, **way)
    found = run(module, variables_of(module), IMAGES)
    for name, expected in by_hand.items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            found[name],
            expected,
        )


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    'drops', exhaustive_after(1, ['drop_path_rate', 'dropout_rate'])
)
def test_groups_and_parts_drop_out_differently(drops):
    """Of the same images twice, as two groups and as two micro-batches."""
    fields = {drops: 0.5, 'kernel': 'xla'}
    variables, images = variables_of(make()), np.concatenate([IMAGES[:3]] * 2)
    module = make(**fields, batch_norm_group=3)
    logits, _ = jax.jit(
        lambda: module.apply(
            variables,
            images,
            train=True,
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(0)},
        )
    )()
    assert not np.allclose(logits[:3], logits[3:])
    options = dict(seed=0, l2_penalty=0.0, frozen=0, accumulate_steps=2)
    differentiate = step.make_gradients(
        make(**fields), step.StepOptions(mean=(0.5,) * 3, std=(0.2,) * 3, **options)
    )
    batch = {
        'image': np.uint8(30 * np.abs(images)).reshape(2, 3, *images.shape[1:]),
        'label': np.zeros((2, 3), np.int32),
    }
    state = step.new_state(variables, optax.sgd(0.1))
    _, (losses, _, _) = jax.jit(differentiate)(state, batch)
    assert not np.allclose(losses[0], losses[1])


@pytest.mark.slow
def test_only_training_has_groups():
    """In evaluation, and for all rows at once, there is nothing to divide."""
    module, plain = make(batch_norm_group=4, kernel='xla'), make(kernel='xla')
    variables = variables_of(module)

    def program(module, images, train):
        def apply(variables):
            return module.apply(variables, images, train=train, mutable=['batch_stats'])

        return str(jax.make_jaxpr(apply)(variables))

    assert program(module, IMAGES, False) == program(plain, IMAGES, False)
    assert program(module, IMAGES[:4], True) == program(plain, IMAGES[:4], True)
    with pytest.raises(UserError, match='batch_norm_group=4 does not divide a bat'):
        program(module, IMAGES, True)


@pytest.mark.parametrize(
    ('group', 'rows', 'devices', 'parts', 'expected'),
    [
        (0, 32, 8, 1, 0),
        (32, 32, 8, 1, 0),  # the whole batch
        (-1, 32, 1, 1, 0),
        (-1, 32, 8, 1, 4),
        (-1, 32, 4, 2, 4),
        (2, 32, 8, 1, 2),
        (8, 32, 8, 1, 8),  # two devices to a group
        (16, 32, 4, 2, 0),
        (5, 32, 1, 1, 'does not divide the 32 rows of a batch, .*; use 4 or 8$'),
        (3, 48, 8, 1, 3),
        (4, 48, 8, 1, 'batch, 6 on each of 8 devices, .*; use 3 or 6$'),
        (8, 48, 8, 1, 'use 6 or 12$'),
        (32, 32, 2, 2, 'the 16 rows of a micro-batch, 8 on each .* use 16$'),
    ],
)
def test_which_groups_there_can_be(group, rows, devices, parts, expected):
    fields = dict(rows=rows, devices=devices, accumulate_steps=parts)
    if isinstance(expected, int):
        assert ghost_batch_norm.resolve(group, **fields) == expected
    else:
        with pytest.raises(UserError, match=expected):
            ghost_batch_norm.resolve(group, **fields)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'model.batch_norm_group': -2}, 'model.batch_norm_group=-2 must be -1'),
        ({'model.batch_norm_group': 24}, '128 rows of a batch, .* use 16 or 32'),
        ({'train.accumulate_steps': 0}, 'train.accumulate_steps=0 must be from 1'),
        (
            {'train.accumulate_steps': 3},
            'batch_size=128 .* train.accumulate_steps=3 parts .*; use 120 or 132',
        ),
        ({'train.accumulate_steps': 64}, 'over 4 devices; use 256'),
    ],
)
def test_bad_fields_stop_before_anything_is_written(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fit.fit(tiny_config(**overrides), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_run_of_before_the_field(tmp_path, monkeypatch):
    run = prepare.prepare(tiny_config(), str(tmp_path))
    saved = {**run.metadata, 'model': dict(run.metadata['model'])}
    assert saved['model'].pop('batch_norm_group') == 0
    monkeypatch.setattr(checks.checkpoint_reader, 'find_latest', lambda workdir: None)
    saved = json.loads(json.dumps(saved))
    monkeypatch.setattr(checks.checkpoint_reader, 'load_json', lambda *place: saved)
    checks.check_same_run('there', run)
    change_settings(run, **{'model.batch_norm_group': 4})
    with pytest.raises(UserError, match='a run with model.batch_norm_group=0, not 4'):
        checks.check_same_run('there', run)


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        ((128, 1, 1), 'data.batch_size=128, model.batch_norm_group=1: batch norm sees'),
        ((8, 2, 0), None),  # a row for each device, and four for batch norm
        ((8, 2, -1), 'train.accumulate_steps=2, model.batch_norm_group=-1: batch norm'),
    ],
)
def test_groups_of_one_are_said(fields, said, tmp_path, capsys):
    names = 'data.batch_size', 'train.accumulate_steps', 'model.batch_norm_group'
    config = tiny_config(**dict(zip(names, fields, strict=True)))
    announce.announce(prepare.prepare(config, str(tmp_path)))
    out = capsys.readouterr().out
    if said is None:
        assert 'warning' not in out
    else:
        assert said in out and 'use larger groups' in out
