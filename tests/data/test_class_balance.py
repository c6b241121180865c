"""Classes of very different sizes, drawn evenly or weighed in the loss."""

import itertools
import re

import jax
import numpy as np
import optax
import pytest

from flax_densenet import UserError, create_model, init_variables, settings
from flax_densenet import losses as losses_lib
from flax_densenet.data import class_balance, dataset, labeled_images, pipeline
from flax_densenet.train import (
    announce,
    feature_cache,
    finetune,
    prepare,
    step,
    training_run,
)
from helpers.marks import slow_after
from helpers.runs import change_settings, tiny_config, write_images

COUNTS = {'ants': 30, 'bees': 3, 'wasps': 1}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = write_images(tmp_path_factory.mktemp('photos'), COUNTS, size=(8, 8))
    source = dataset.load_source(f'folder:{folder}', image_size=8)
    everything = labeled_images.join(source.train, source.test)
    return dataset.dataclasses.replace(source, train=everything)


def take(examples, count, **settings):
    settings = {'batch_size': 5, 'seed': 3, 'balance': 'sampler'} | settings
    batches = pipeline.train_batches(examples, **settings)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def column(batches, name):
    return np.concatenate([batch[name] for batch in batches])


@pytest.mark.slow
def test_an_epoch_draws_each_class_as_often(source):
    batches = take(source.train, 34)  # five epochs of 34
    labels, epochs = column(batches, 'label'), column(batches, 'epoch')
    for epoch in range(5):
        counts = np.bincount(labels[epochs == epoch])
        assert counts.sum() == 34 and counts.max() - counts.min() <= 1
    assert np.ptp(np.bincount(labels)) <= 1  # and none gains over the epochs
    assert np.bincount(column(take(source.train, 34, balance='none'), 'label')).tolist()
    images = column(batches, 'image')
    ants = [image.tobytes() for image in images[(labels == 0) & (epochs < 2)]]
    assert len(set(ants)) == len(ants) in (22, 23)  # all come before one comes again
    ants = [image.tobytes() for image in images[labels == 0]]
    assert len(set(ants)) == 30 and len(ants) in (56, 57)


def test_each_round_of_a_class_has_an_order_of_its_own():
    draws = class_balance.Draws(np.repeat([0, 1, 2], [30, 3, 1]), seed=0)
    # Every third draw is of the first class, whatever epoch it is counted in.
    turns = [draws(0, 3 * turn) for turn in range(90)]
    rounds = [turns[:30], turns[30:60], turns[60:]]
    assert [sorted(order) for order in rounds] == [list(range(30))] * 3
    assert len({tuple(order) for order in rounds}) == 3
    other = class_balance.Draws(np.repeat([0, 1, 2], [30, 3, 1]), seed=1)
    assert [other(0, 3 * turn) for turn in range(30)] != turns[:30]


def test_draws_are_mixed(source):
    labels = column(take(source.train, 34), 'label')
    assert (labels[:-1] == labels[1:]).mean() < 0.6
    assert (labels[3:] == labels[:-3]).mean() < 0.6  # not 0 1 2 0 1 2


@pytest.mark.parametrize('start', slow_after(1, [9, 1]))
def test_draws_are_a_function_of_the_step(source, start):
    settings = {'augment': 'shift_flip', 'batch_size': 7}
    whole = take(source.train, start + 6, **settings)
    later = take(source.train, 6, **settings, start=start)
    for name in ('image', 'label', 'epoch'):
        assert column(later, name).tobytes() == column(whole[start:], name).tobytes()
    other = take(source.train, 6, **settings, seed=4)
    assert column(other, 'image').tobytes() != column(whole[:6], 'image').tobytes()


def test_none_is_the_stream_as_it_was(source):
    """The order of the examples that a run of before goes on with."""
    found = column(take(source.train, 7, balance='none'), 'label')[:34]
    assert np.bincount(found).tolist() == [30, 3, 1]


def test_features_are_drawn_too(source):
    examples = feature_cache.FeatureExamples(
        np.arange(34, dtype=np.float32)[:, None], source.train.labels
    )
    labels = column(take(examples, 6, batch_size=17), 'label')
    assert np.bincount(labels).tolist() == [34, 34, 34]


@pytest.mark.slow
def test_draws_of_a_large_class():
    labels = np.array([0] * 1_000_003 + [1])
    draws = class_balance.Draws(labels, seed=1)
    found = [draws(2, slot) for slot in range(0, 40_000, 2)]
    assert len(set(found)) in (1, 20_000)  # of one class all, of the other one


def test_weights():
    labels = np.repeat([0, 1, 3], [30, 3, 1])
    weights = class_balance.class_weights(labels, 4)
    assert weights.dtype == np.float32 and weights[2] == 0
    np.testing.assert_allclose(weights[labels].mean(), 1, rtol=1e-6)
    shares = [weights[labels][labels == label].sum() for label in (0, 1, 3)]
    np.testing.assert_allclose(shares, 34 / 3, rtol=1e-6)


def test_the_weighted_mean_by_hand():
    losses, labels = np.array([1.0, 2.0, 4.0]), np.array([0, 1, 1])
    found = losses_lib.apply_class_weights(losses, labels, np.array([0.5, 2.0])).mean()
    assert float(found) == pytest.approx(12.5 / 3)
    assert losses_lib.apply_class_weights(losses, labels).mean() == 7 / 3


@pytest.mark.exhaustive
@pytest.mark.slow
def test_weights_act_through_the_gradient():
    """Of the head alone, eagerly: the gradient is the weighted mean of each row's."""
    module = create_model('BC-L10k4', num_classes=3)
    variables, optimizer = init_variables(module, seed=0), optax.sgd(1.0)
    width = variables['params']['norm5']['scale'].size
    rng = np.random.default_rng(0)
    batch = {
        'features': rng.normal(size=(4, 1, 1, width)).astype(np.float32),
        'label': np.array([0, 1, 2, 2], np.int32),
        'epoch': np.zeros(4, np.int32),
    }

    def learn(rows, weights):
        take = step.make_train_step(
            module,
            optimizer,
            step.StepOptions(
                mean=(0.5,) * 3,
                std=(0.5,) * 3,
                frozen=len(module.stages()) - 1,
                class_weights=weights,
            ),
        )
        state = step.new_state(variables, optimizer)
        state, loss = take(state, jax.tree.map(lambda leaf: leaf[rows], batch))
        before = variables['params']['classifier']['kernel']
        return np.asarray(state.params['classifier']['kernel']) - before, loss

    weights = np.array([2.0, 1.0, 0.25], np.float32)
    each = [learn([row] * 4, None)[0] for row in range(4)]
    plain, loss = learn(slice(None), None)
    changed, reported = learn(slice(None), weights)
    np.testing.assert_allclose(plain, np.mean(each, 0), atol=1e-6)
    weighed = [
        weights[label] * one for label, one in zip(batch['label'], each, strict=True)
    ]
    np.testing.assert_allclose(changed, np.mean(weighed, 0), atol=1e-6)
    assert np.abs(changed - plain).max() > 0.01
    assert reported == loss  # the cross-entropy, unweighted


@pytest.mark.parametrize(
    ('value', 'line'),
    [
        ('none', 'ants has 30 images to train on, wasps 1: data.balance=sampler would'),
        ('sampler', 'an epoch draws 11.33 of each class .ants has 30'),
        ('loss', 'an image weighs 0.378 to 11.3 .ants has 30'),
    ],
)
def test_what_is_said(source, value, line, capsys):
    run = run_of(source, value)
    announce._print_balance(run)
    assert re.search(line, capsys.readouterr().out)


def run_of(source, value, **fields):
    made = settings.from_config(tiny_config(**{'data.balance': value}))
    nothing = dict.fromkeys(training_run.TrainingRun.__dataclass_fields__) | {
        'source': source
    }
    plan = finetune.Plan(rates={}, frozen=0, head_epochs=0, stages=[('classifier',)])
    return training_run.TrainingRun(
        **nothing | {'settings': made, 'plan': plan} | fields
    )


def test_nothing_is_said_of_even_classes(capsys):
    names, labels = ('a', 'b'), np.repeat([0, 1], [29, 3])
    assert class_balance.describe(labels, names, 'none') == ''
    assert 'a has 30' in class_balance.describe(np.append(labels, 0), names, 'none')


def test_the_step_gets_the_weights(source):
    assert training_run.class_weights(run_of(source, 'none')) is None
    assert training_run.class_weights(run_of(source, 'sampler')) is None
    found = training_run.class_weights(run_of(source, 'loss'))
    np.testing.assert_allclose(found, 34 / 3 / np.array([30, 3, 1]), rtol=1e-6)


@pytest.mark.slow
def test_a_run_draws_evenly(source):
    for value, expected in (('none', [60, 6, 2]), ('sampler', [23, 23, 22])):
        run = run_of(source, value)
        change_settings(run, **{'data.batch_size': 34})
        batches = training_run.train_batches(run, source, 0)
        labels = np.concatenate([next(batches)['label'] for _ in range(2)])
        batches.close()
        assert np.bincount(labels).tolist() == expected


def test_what_cannot_be_balanced(source):
    with pytest.raises(UserError, match='data.balance=even is not known; use none, s'):
        pipeline.check_train_batches(source.train, 4, 'none', 0, 'even')
    several = feature_cache.FeatureExamples(
        np.zeros((4, 2)), np.zeros((4, 3), np.float32)
    )
    pipeline.check_train_batches(several, 4, 'none', 0, 'sampler')
    with pytest.raises(UserError, match='loss needs one class .* train.pos_weight'):
        pipeline.check_train_batches(several, 4, 'none', 0, 'loss')


# Mass is rare, effusion common, and one cell is unknown.
SEVERAL = np.array([[1, 0]] * 2 + [[0, 1]] * 5 + [[np.nan, 0]] + [[0, 0]] * 2)
NAMES = ('mass', 'effusion')


def test_draws_of_several_labels():
    """Each label's positives, and images without any, come equally often."""
    draws = class_balance.Draws(SEVERAL, seed=0)
    drawn = [draws(epoch, slot) for epoch in range(9) for slot in range(10)]
    groups = [
        'none' if not (row > 0.5).any() else NAMES[int(np.nanargmax(row))]
        for row in SEVERAL[drawn]
    ]
    assert {group: groups.count(group) for group in set(groups)} == {
        **dict.fromkeys(NAMES, 30),
        'none': 30,
    }
    assert set(drawn) == set(range(10))
    line = class_balance.describe_label_draws(SEVERAL, NAMES)
    assert line.endswith('(training images: mass 2, effusion 5, none 3)')


@pytest.mark.parametrize(
    ('text', 'weights'),
    [
        ('', ()),
        ('auto', (3.5, 1.0)),  # 7 and 5 negatives to 2 and 5 positives
        ('5', (5, 5)),
        ('mass=10', (10, 1)),
        ('effusion=2, mass = 0.5', (0.5, 2)),
    ],
)
def test_weights_of_positives(text, weights):
    assert class_balance.positive_weights(text, SEVERAL, NAMES) == weights


def test_soft_targets_are_neither_positive_nor_negative():
    soft = np.where(np.isnan(SEVERAL), 0.8, SEVERAL)
    assert class_balance.positive_weights('auto', soft, NAMES) == (3.5, 1.0)
    lines = [class_balance.describe_label_draws(x, NAMES) for x in (soft, SEVERAL)]
    assert lines[0] == lines[1]
    ours, known = (class_balance.Draws(x, seed=0) for x in (soft, SEVERAL))
    assert [ours(0, n) for n in range(10)] == [known(0, n) for n in range(10)]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('mas=2', 'did you mean mass?'),
        ('car', 'a number above 0'),
        ('-1', 'a number above 0'),
        ('mass=inf', 'a number above 0'),
        ('2,3', 'a number above 0'),
    ],
)
def test_weights_that_cannot_be_read(text, message):
    with pytest.raises(UserError) as error:
        class_balance.positive_weights(text, SEVERAL, NAMES)
    assert f'train.pos_weight={text}' in str(error.value)
    assert message in str(error.value)


def test_a_run_weighs_positives_and_draws_labels(tmp_path, caplog):
    folder = write_images(tmp_path, {'x': 12}, size=(8, 8))
    names = [f'x/{n:03}.jpg,{int(n < 4)},{int(n % 2)}' for n in range(12)]
    table = tmp_path / 'labels.csv'
    table.write_text('\n'.join(['image,mass,effusion', *names]))
    fields = {
        **{'data.source': f'folder:{folder}', 'data.labels': str(table)},
        **{'data.balance': 'sampler', 'data.batch_size': 4},
        'train.pos_weight': 'mass=4',
    }
    run = prepare.prepare(tiny_config(**fields), str(tmp_path / 'run'))
    assert run.step_options(0).loss.pos_weight == (4.0, 1.0)
    with caplog.at_level('INFO'):
        announce.announce(run)
    assert (
        'train.pos_weight=mass=4: a positive weighs mass 4, effusion 1' in caplog.text
    )
    assert 'data.balance=sampler: draws each label' in caplog.text


def test_weights_of_positives_need_labels(tmp_path):
    with pytest.raises(UserError, match='for one class per image use data.balance'):
        prepare.prepare(tiny_config(**{'train.pos_weight': 'auto'}), str(tmp_path))
