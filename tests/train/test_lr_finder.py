"""The learning-rate range test: its rates, when it stops, what it suggests."""

import json
import math
from unittest import mock

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.export import formats
from flax_densenet.report import plots
from flax_densenet.train import lr_finder, training_run
from helpers.marks import slow_after
from helpers.runs import tiny_config

TINY = {'model.block_sizes': (1, 1)}


@pytest.mark.slow
def test_a_range_test(tmp_path):
    # A checkpoint that is there is neither read, which would fail, nor changed.
    metadata = tmp_path / 'checkpoints' / '5' / 'metadata' / 'metadata'
    metadata.parent.mkdir(parents=True)
    metadata.write_text('{')
    found = lr_finder.find(tiny_config(**TINY), str(tmp_path), steps=40)

    assert sorted(path.name for path in tmp_path.rglob('*')) == [
        *('5', 'checkpoints', 'lr_find.json', 'metadata', 'metadata')
    ]
    assert metadata.read_text() == '{'
    assert json.loads((tmp_path / 'lr_find.json').read_text()) == found
    assert plots.save_rates(str(tmp_path), found) == 'lr_find.png'
    assert (tmp_path / 'lr_find.png').read_bytes()[:4] == b'\x89PNG'
    assert len(found['loss']) == len(found['mean']) == len(found['learning_rate']) == 40
    assert found['learning_rate'][0] == 1e-7
    assert found['learning_rate'][-1] == 10
    assert found['loss'][0] == pytest.approx(math.log(10), abs=0.3)
    assert found['stopped'] is None
    # With half of it and twice of it digits of 8x8 train well in four epochs.
    assert 3e-3 < found['suggestion'] < 0.3
    assert found['suggestion'] == pytest.approx(found['lowest_at'] / 10, rel=0.05)
    flag = f'--config.optimizer.learning_rate={found["suggestion"]:g}'
    assert lr_finder.describe(found) == (
        f'suggested: {flag} (a tenth of the rate with the lowest mean loss)'
    )


def test_rates_grow_by_one_factor():
    rates, schedule = lr_finder.make_rates(81), lr_finder.make_schedule(81)
    np.testing.assert_allclose(rates[1:] / rates[:-1], 10**0.1)
    stepwise = [float(schedule(np.int32(step))) for step in range(81)]
    np.testing.assert_allclose(stepwise, rates, rtol=1e-4)


def fake_losses(monkeypatch, losses):
    """Steps that change nothing and report these losses.

    Returns:
      A list that gets what the steps are made from.
    """
    left, seen = iter(losses), []

    def compile_step(run, state, frozen):
        seen.append((run, state, frozen))
        return lambda state, batch: (state, np.float32(next(left)))

    monkeypatch.setattr(training_run, 'compile_step', compile_step)
    # Drawing takes longer than all else here.
    monkeypatch.setattr(plots, 'plot_rates', lambda *_, **__: mock.Mock())
    return seen


@pytest.mark.slow
def test_it_stops_where_the_loss_diverges(tmp_path, monkeypatch):
    losses = [*np.linspace(2.4, 2.3, 20), *np.linspace(2.3, 0.5, 10), *[100.0] * 70]
    fake_losses(monkeypatch, losses)
    found = lr_finder.find(tiny_config(**TINY), str(tmp_path))
    assert found['data'] == 'digits'
    assert found['network'].startswith('DenseNet-BC (1, 1), growth ')
    assert len(found['loss']) == len(found['mean']) == 31
    assert found['stopped'] == 'the loss diverged'
    rates = lr_finder.make_rates(100)
    assert found['learning_rate'] == rates[:31].tolist()
    assert found['suggestion'] == pytest.approx(rates[29] / 10, rel=0.05)
    assert lr_finder.describe(found).endswith('; the loss diverged at 2.7e-05')


@pytest.mark.parametrize('wrong', slow_after(1, [math.nan, math.inf]))
def test_it_stops_where_the_loss_is_not_finite(tmp_path, monkeypatch, wrong):
    fake_losses(monkeypatch, [2.3] * 30 + [1.0] * 5 + [wrong])
    found = lr_finder.find(tiny_config(**TINY), str(tmp_path))
    assert len(found['loss']) == 35
    assert found['stopped'] == 'the loss was not finite'
    json.loads((tmp_path / 'lr_find.json').read_text(), parse_constant=pytest.fail)
    fake_losses(monkeypatch, [2.3] * 5 + [wrong])
    with pytest.raises(UserError, match='was not finite after 5 steps .* data.mean'):
        lr_finder.find(tiny_config(**TINY), str(tmp_path))


def test_a_loss_that_diverges_at_once(tmp_path, monkeypatch):
    fake_losses(monkeypatch, [0.5, 100.0])
    with pytest.raises(UserError, match='the loss diverged after 2 steps .* init_from'):
        lr_finder.find(tiny_config(**TINY), str(tmp_path))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_no_suggestion_where_nothing_falls(tmp_path, monkeypatch):
    noise = 2.3 + 0.1 * np.random.default_rng(0).standard_normal(100)
    fake_losses(monkeypatch, noise)
    found = lr_finder.find(tiny_config(**TINY), str(tmp_path))
    assert found['suggestion'] is None
    assert lr_finder.describe(found).startswith(
        'no suggestion: the loss did not fall by more than its noise'
    )
    # Of weights that fit already, four times the lowest loss is noise.
    losses = 0.02 * np.random.default_rng(0).random(100)
    losses[0] = 1e-4
    fake_losses(monkeypatch, losses)
    assert lr_finder.find(tiny_config(**TINY), str(tmp_path))['stopped'] is None


def test_the_mean():
    np.testing.assert_allclose(lr_finder.smooth([3.0, 3.0, 3.0], 100), 3)
    means = lr_finder.smooth([1.0, 2.0], 100)
    np.testing.assert_allclose(means, [1, (0.09 + 0.2) / 0.19])
    means = lr_finder.smooth([1.0, 2.0], 20)
    np.testing.assert_allclose(means, [1, (0.25 + 1) / 0.75])


def test_the_first_means_are_not_the_lowest():
    """One batch that is easy by chance, before the rate changes anything."""
    losses = np.array([1.0, *[2.0, 2.2] * 30, *np.linspace(2, 1, 30), *[3.0] * 9])
    assert np.argmin(lr_finder.smooth(losses, 100)) == 0
    found = lr_finder.suggest(losses, 100)
    assert found == pytest.approx(lr_finder.make_rates(100)[90] / 10, rel=0.05)


def test_more_steps_tell_a_fall_from_noise():
    rng = np.random.default_rng(0)

    def count_found(steps, fall):
        losses = 0.7 + 0.1 * rng.standard_normal((20, steps))
        losses[:, steps * 6 // 10 : steps * 8 // 10] -= fall
        return sum(lr_finder.suggest(curve, steps) is not None for curve in losses)

    assert count_found(400, 0.08) >= 17
    assert count_found(100, 0.08) <= 13
    assert count_found(100, 0) <= 2
    assert count_found(400, 0) <= 2


@pytest.mark.slow
def test_fine_tuning_is_tested_as_it_is_trained(tmp_path, monkeypatch, capsys):
    module = create_model('BC-L10k4', num_classes=10)
    variables = init_variables(module, seed=3)
    path = tmp_path / 'weights.safetensors'
    safetensors.save_file(formats.torch_arrays(module, variables), str(path))
    config = tiny_config(
        **{
            'train.freeze': 'denseblock1',
            'train.head_warmup_epochs': 1,
            'optimizer.layer_decay': 0.5,
            'optimizer.head_multiplier': 3.0,
            'optimizer.name': 'sgd',
            'optimizer.momentum': 0.0,
            'model.variant': None,
        }
    )
    config['init_from'] = str(path)
    seen = fake_losses(monkeypatch, [2.0] * 40)
    lr_finder.find(config, str(tmp_path / 'test'), steps=40)
    ((run, state, frozen),) = seen
    assert frozen == 2  # the stem and the first block, from the first step on
    assert 'classifier trains alone' not in capsys.readouterr().out
    np.testing.assert_array_equal(
        state.params['denseblock2']['denselayer1']['conv1']['kernel'],
        variables['params']['denseblock2']['denselayer1']['conv1']['kernel'],
    )
    live = {n: state.params[n] for n in ('denseblock2', 'denseblock3', 'classifier')}
    live |= {name: state.params[name] for name in ('transition2', 'norm5')}
    ones = jax.tree.map(np.ones_like, live)
    updates, _ = run.optimizer.update(ones, state.opt_state, live)
    shares = {
        name: jax.tree.leaves(tree)[0].ravel()[0] for name, tree in updates.items()
    }
    assert shares == pytest.approx(
        {
            'denseblock2': -0.25e-7,
            'transition2': -0.25e-7,
            'denseblock3': -0.5e-7,
            'norm5': -0.5e-7,
            'classifier': -3e-7,
        }
    )


def test_the_picture_shows_what_matters():
    rates = np.geomspace(1e-7, 10, 20)
    losses = np.array([2.3] * 10 + [1.0] * 5 + [500.0] * 5)
    figure = plots.plot_rates(rates, losses, lr_finder.smooth(losses, 20), 2e-3)
    (axes,) = figure.axes
    assert axes.get_xscale() == 'log'
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {'loss', 'mean', 'suggested: 0.002'}
    assert list(lines['suggested: 0.002'].get_xdata()) == [2e-3, 2e-3]
    np.testing.assert_array_equal(lines['loss'].get_ydata(), losses)
    assert axes.get_ylim()[0] < 1 < 2.3 < axes.get_ylim()[1] < 10
    figure = plots.plot_rates(rates, losses, losses, None)
    assert len(figure.axes[0].get_lines()) == 2


@pytest.mark.slow
def test_the_picture_says_of_what_it_is(tmp_path, monkeypatch):
    drawn, plot = [], plots.plot_rates

    def keep(*of, **how):
        drawn.append(plot(*of, **how))
        return drawn[0]

    monkeypatch.setattr(plots, 'plot_rates', keep)
    result = {
        'data': 'folder:鳥_$1$',
        'network': 'DenseNet-121, 7.98 M parameters',
        'suggestion': 2.9e-5,
        'learning_rate': [1e-7, 1e-6, 1e-5],
        'loss': [2.0, 1.0, 3.0],
        'mean': [2.0, 1.5, 2.0],
    }
    plots.save_rates(str(tmp_path), result)
    (axes,) = drawn[0].axes
    title = f'Learning-rate range test: {result["data"]}\n{result["network"]}'
    assert axes.get_title() == title
    assert 'suggested: 2.9e-05' in [line.get_label() for line in axes.get_lines()]


@pytest.mark.parametrize(
    ('overrides', 'steps', 'message'),
    [
        ({}, 39, '--steps=39 are too few; use 40 or more'),
        (
            {'data.batch_size': 2000},
            100,
            'data.batch_size=2000 is larger than the 1437',
        ),
        ({'optimizer.name': 'lion'}, 100, 'optimizer.name=lion'),
        ({'train.freeze': 'backbone'}, 100, 'freeze=backbone would keep random'),
    ],
)
def test_mistakes(overrides, steps, message, tmp_path):
    with pytest.raises(UserError, match=message):
        lr_finder.find(tiny_config(**overrides), str(tmp_path / 'run'), steps=steps)
    assert not (tmp_path / 'run').exists()


def test_a_workdir_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('x')
    fake_losses(monkeypatch, [])  # it is noticed before the first step
    with pytest.raises(UserError, match='--workdir=.* cannot be written'):
        lr_finder.find(tiny_config(), str(tmp_path / 'file' / 'run'))
