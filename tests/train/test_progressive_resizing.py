"""Progressive resizing: which epoch has which size, and what it is read at."""

import numpy as np
import pytest

from flax_densenet.data import dataset, labeled_images
from flax_densenet.errors import UserError
from flax_densenet.train import (
    nonfinite,
    prepare,
    progressive_resizing,
    step,
    training_run,
)
from helpers.runs import tiny_config

SCHEDULE = ((0.5, 4), (0.75, 6))


@pytest.mark.parametrize(
    'value',
    [
        ((0.5,),),
        ((0.5, 16, 3),),
        (0.8, 24, 0.5, 16),
        ((0.8, 24), (0.5, 16)),
        ((0.0, 16),),
        ((1.5, 16),),
        ((0.5, 16.5),),
        ((0.5, 0),),
        ('0.5:16',),
        (16,),
    ],
)
def test_what_is_refused(value):
    with pytest.raises(UserError, match=r"data.size_schedule=.*'\(\(0.5,16\),"):
        progressive_resizing.parse(value)


def test_one_pair_needs_no_other_brackets():
    assert (
        progressive_resizing.parse((0.5, 16))
        == progressive_resizing.parse([[0.5, 16]])
        == ((0.5, 16),)
    )
    assert progressive_resizing.parse(()) == ()


def test_of_few_epochs_a_share_may_have_none():
    schedule = progressive_resizing.parse(SCHEDULE)
    say = [progressive_resizing.describe(schedule, epochs=n, last=8) for n in (1, 2, 4)]
    assert say[0] == '6x6 up to epoch 1'
    assert say[1] == '4x4 up to epoch 1, 6x6 up to epoch 2'
    assert say[2] == '4x4 up to epoch 2, 6x6 up to epoch 3, then 8x8'
    for epochs in (1, 2, 4):
        said = progressive_resizing.describe(schedule, epochs=epochs, last=8)
        for epoch in range(1, epochs + 1):
            size = progressive_resizing.size_in(schedule, epoch, epochs=epochs, last=8)
            assert f'{size}x{size}' in said
    assert progressive_resizing.describe((), epochs=4, last=8) == ''


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    config = tiny_config(**{'data.size_schedule': SCHEDULE, 'train.epochs': 4})
    config['model']['block_sizes'] = (1,)
    return prepare.prepare(config, str(tmp_path_factory.mktemp('run')))


def test_the_step_alone_tells_the_size(run):
    count, rows = len(run.source.train), run.batch_size
    assert count % rows  # epochs end inside of batches
    last = step.last_step_of_epoch(4, count, rows)
    found = [run.size_at(start) for start in range(last)]
    expected = []
    for epoch, size in ((1, 4), (2, 4), (3, 6), (4, 8)):
        steps = step.last_step_of_epoch(epoch, count, rows) - step.last_step_of_epoch(
            epoch - 1, count, rows
        )
        expected += [size] * steps
        assert run.size_in(epoch) == size
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize(('start', 'size'), [(0, 4), (23, 6), (40, 8)])
def test_batches_have_the_size_of_their_step(run, start, size):
    batches = training_run.train_batches(run, run.source, start)
    batch = next(batches)
    batches.close()
    assert batch['image'].shape == (128, size, size, 3)
    whole = dataset.load_source('digits', image_size=size)
    plain = training_run.pipeline.train_batches(
        whole.train, batch_size=128, seed=0, start=start
    )
    np.testing.assert_array_equal(batch['image'], next(plain)['image'])
    plain.close()
    # Whoever looks for a bad image gets the same ones.
    found = nonfinite._batch_of(run, start + 1)
    np.testing.assert_array_equal(found['image'], batch['image'])
    assert run.source.test[0]['image'].shape == (8, 8, 3)


def test_images_in_memory_have_a_size_each():
    source = dataset.load_source('digits', image_size=8, cache='memory')
    small = source.train.at_size(4)
    assert small[3]['image'].shape == (4, 4, 3)
    assert isinstance(small, labeled_images.CachedExamples)
    assert source.train.at_size(8) is source.train
    assert source.train[3]['image'].shape == (8, 8, 3)
