"""Files that vanish while a run goes on."""

import itertools
import os

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset, labeled_images, pipeline, unreadable
from flax_densenet.evaluation import evaluate
from flax_densenet.train import fit, loop, prepare, step, training_run
from helpers.marks import slow_after
from helpers.runs import tiny_config, write_images


@pytest.fixture
def source(tmp_path):
    folder = write_images(tmp_path / 'photos', {'ants': 12, 'bees': 12}, size=(8, 8))
    return dataset.load_source(f'folder:{folder}', image_size=8, bad_images='skip')


def lose(examples, positions):
    for position in positions:
        os.unlink(examples.name(position))


def take(batches, count):
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def column(batches, name):
    return np.concatenate([batch[name] for batch in batches])


def test_with_error_a_lost_file_ends_the_run_by_name(source):
    name = source.train.name(7)
    lose(source.train, [7])
    for batches in (
        pipeline.train_batches(source.train, batch_size=8, seed=0),
        pipeline.eval_batches(source.train, batch_size=8),
    ):
        with pytest.raises(UserError) as raised:
            take(batches, 9)
        message = 'is not there: fix or remove it, or set data.bad_images=skip'
        assert str(raised.value) == f'{name} {message}'


@pytest.mark.parametrize('balance', slow_after(1, ['sampler', 'none']))
def test_with_skip_the_next_one_stands_in(source, balance):
    settings = dict(batch_size=8, seed=0, bad_images='skip', balance=balance)
    count = len(source.train)
    images = [source.train[i]['image'].tobytes() for i in range(count)]
    steps = 3 * count // 8 + 1
    before = take(pipeline.train_batches(source.train, **settings), steps)
    lose(source.train, [3, 4, count - 1])
    stands = {images[3]: 5, images[4]: 5, images[-1]: 0}
    batches = pipeline.train_batches(source.train, **settings)
    after = take(batches, steps)
    assert set(after[0]) == {'image', 'label', 'epoch'}
    replaced = 0
    for was, now, label in zip(
        column(before, 'image'),
        column(after, 'image'),
        column(after, 'label'),
        strict=True,
    ):
        place = stands.get(was.tobytes())
        replaced += place is not None
        expected = was.tobytes() if place is None else images[place]
        assert now.tobytes() == expected
        assert source.train.labels[images.index(expected)] == label
    assert replaced >= 3 and batches.unread.total() == replaced
    assert set(batches.unread) == {3, 4, count - 1}
    assert column(before, 'epoch').tolist() == column(after, 'epoch').tolist()


def test_what_is_left_is_a_function_of_the_step(source):
    lose(source.train, [2, 9])
    settings = dict(batch_size=8, seed=0, bad_images='skip', augment='flip')
    whole = take(pipeline.train_batches(source.train, **settings), 9)
    later = take(pipeline.train_batches(source.train, **settings, start=4), 5)
    assert column(later, 'image').tobytes() == column(whole[4:], 'image').tobytes()


def test_skip_changes_nothing_where_all_is_read(source):
    settings = dict(batch_size=8, seed=0, augment='flip')
    one = take(pipeline.train_batches(source.train, **settings), 5)
    two = take(pipeline.train_batches(source.train, **settings, bad_images='skip'), 5)
    assert column(one, 'image').tobytes() == column(two, 'image').tobytes()


def test_the_cache_keeps_no_stand_in(source):
    cached = labeled_images.CachedExamples(source.train)
    lose(source.train, [3])
    batches = pipeline.train_batches(cached, batch_size=8, seed=0, bad_images='skip')
    take(batches, 9)
    assert set(batches.unread) == {3} and batches.unread[3] >= 2
    assert not cached._known[3] and cached._known.sum() == len(cached) - 1


def test_all_is_lost(source):
    """The disk, not a file: that ends the run, and says what is kept."""
    lose(source.train, range(len(source.train)))
    message = 'and the 18 images after it cannot be read any more; make their folder'
    with pytest.raises(UserError, match=message):
        take(
            pipeline.train_batches(
                source.train, batch_size=8, seed=0, bad_images='skip'
            ),
            1,
        )


def test_evaluation_leaves_them_out(source, monkeypatch):
    count = len(source.train)
    lose(source.train, [0, 6])
    batches = pipeline.eval_batches(source.train, batch_size=8, bad_images='skip')
    masks = column(list(batches), 'mask')
    assert np.flatnonzero(masks == 0).tolist() == [0, 6, *range(count, 24)]

    def step(variables, batch, **_):
        sums = {name: np.float32(batch['mask'].sum()) for name in ('correct', 'count')}
        return sums | {'loss': sums['count']}, np.zeros((8, 2))

    monkeypatch.setattr(evaluate, 'eval_step', step)
    monkeypatch.setattr(evaluate.mesh_lib, 'to_global', lambda batch, mesh: batch)
    settings = dict(batch_size=8, mesh=None, mean=(0,), std=(1,))
    metrics = evaluate.evaluate(None, {}, source.train, **settings, bad_images='skip')
    assert (metrics['accuracy'], metrics['count']) == (1, count - 2)
    assert metrics['unread'] == [0, 6]
    with pytest.raises(UserError, match='is not there'):
        evaluate.evaluate(None, {}, source.train, **settings)
    whole = evaluate.evaluate(None, {}, source.test, **settings, bad_images='skip')
    assert (whole['count'], 'unread' in whole) == (len(source.test), False)


def test_features_are_of_all_images(source):
    """A run begins with them; it can begin again without the file."""
    lose(source.train, [1])
    batches = pipeline.eval_batches(labeled_images.Numbered(source.train), batch_size=8)
    with pytest.raises(UserError, match='is not there'):
        list(batches)


@pytest.mark.parametrize('labels', [False, True])
def test_a_step_is_compiled_without_an_image(tmp_path, monkeypatch, labels):
    """What is compiled for is what batches have; it is known when none can be read."""
    photos = write_images(tmp_path / 'photos', {'ants': 20, 'bees': 20}, size=(8, 8))
    fields = {
        'data.source': f'folder:{photos}',
        'data.bad_images': 'skip',
        'data.size_schedule': ((0.5, 4),),
        'data.batch_size': 8,
    }
    if labels:
        paths = sorted(photos.glob('*/*'))
        rows = [
            f'{path.relative_to(photos)},{n % 2},{n % 3 > 0:d}\n'
            for n, path in enumerate(paths)
        ]
        table = tmp_path / 'labels.csv'
        table.write_text('image,red,round\n' + ''.join(rows))
        fields['data.labels'] = str(table)
    run = prepare.prepare(tiny_config(**fields), str(tmp_path / 'run'))
    first = run.source.train
    steps = {
        start: training_run.examples_at(run, run.source, start) for start in (0, 4)
    }
    examples = {start: there[0] for start, there in steps.items()}
    lose(first, range(len(first)))
    compiled = []
    monkeypatch.setattr(
        step, 'compile_train_step', lambda *arguments: compiled.append(arguments[2])
    )
    for start, example in examples.items():
        training_run.compile_step(run, None, 0, start)
        batch = compiled.pop()
        example = example | {'epoch': np.int32(0)}
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            name: ((8, *np.shape(value)), value.dtype)
            for name, value in example.items()
        }
    assert examples[0]['image'].shape != examples[4]['image'].shape


def test_what_is_said(source):
    said = unreadable.describe({5, 3}, source.train, 'left out')
    name = source.train.name(3)
    assert said == f'2 images cannot be read any more, the first is {name}; left out'
    assert unreadable.describe({}, source.train, '') == ''


@pytest.mark.slow
def test_a_run_goes_on(tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / 'photos', {'ants': 20, 'bees': 20}, size=(8, 8))
    config = tiny_config(
        **{
            'data.source': f'folder:{folder}',
            'data.batch_size': 8,
            'data.bad_images': 'skip',
            'train.epochs': 3,
        }
    )
    whole = fit.fit(config, str(tmp_path / 'whole')).best
    real = loop.take_epoch

    def lose_some(work, *args):
        if args[-1] == 2:
            lose(work.run.source.train, [3, 8])
            lose(work.run.source.test, [1])
        return real(work, *args)

    monkeypatch.setattr(loop, 'take_epoch', lose_some)
    capsys.readouterr()
    fit.fit(config, str(tmp_path / 'lost'))
    out = capsys.readouterr().out
    # What was read ahead before the files were lost still counts as read.
    assert out.count('2 images cannot be read any more') in (1, 2)
    assert out.count('1 images cannot be read any more, the first is') in (2, 3)
    assert 'replace them' in out and 'left out of the test' in out
    records = fit.run_folder.load_run(str(tmp_path / 'lost')).records
    counts = [record.get('train_unread', 0) for record in records]
    assert counts[0] == 0 and counts[1] in (0, 1, 2) and counts[2] == 2
    assert [record.get('test_unread', 0) for record in records] == [0, 1, 1]
    assert whole['train_count'] == records[2]['train_count']
