"""Batches are a function of the step."""

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import images as images_lib
from flax_densenet.data import labeled_images, pipeline, readers
from helpers.marks import slow_after
from helpers.sources import load, rows, take


def test_an_epoch_holds_each_example_once(folder):
    source = load(folder)
    batches = take(pipeline.train_batches(source.train, batch_size=7, seed=3), 24)
    epochs = np.concatenate([batch['epoch'] for batch in batches])
    assert epochs.tolist() == sorted(epochs)
    everything = {source.train[i]['image'].tobytes() for i in range(24)}
    images = np.array(rows(batches), object)
    orders = []
    for epoch in range(7):
        seen = images[epochs == epoch]
        assert len(seen) == 24 and set(seen) == everything
        orders.append(tuple(seen))
    assert len(set(orders)) == 7  # each epoch in an order of its own


@pytest.mark.parametrize('start', slow_after(1, [5, 1, 40]))
def test_batches_are_a_function_of_the_step(folder, start):
    source = load(folder)
    settings = dict(batch_size=7, seed=3, augment='shift_flip')
    whole = take(pipeline.train_batches(source.train, **settings), start + 4)
    later = take(pipeline.train_batches(source.train, **settings, start=start), 4)
    for key in ('image', 'label', 'epoch'):
        assert rows(later, key) == rows(whole[start:], key)
    other = take(pipeline.train_batches(source.train, **{**settings, 'seed': 4}), 4)
    assert rows(other) != rows(whole[:4])


def test_augmentation_differs_between_epochs(folder):
    source = load(folder)
    plain = take(pipeline.train_batches(source.train, batch_size=24, seed=0), 1)
    changed = take(
        pipeline.train_batches(
            source.train, batch_size=24, seed=0, augment='crop_flip'
        ),
        2,
    )
    assert plain[0]['label'].tolist() == changed[0]['label'].tolist()
    # A crop of nearly the whole of a small image may leave it as it was.
    assert len(set(rows(plain)) & set(rows(changed))) <= 4
    assert len(set(rows(changed))) >= 44


def test_hosts_share_the_same_stream(folder, monkeypatch):
    source = load(folder)
    settings = dict(batch_size=8, seed=1, augment='flip')
    one = take(pipeline.train_batches(source.train, **settings), 6)
    monkeypatch.setattr(pipeline.jax, 'process_count', lambda: 2)
    shares = []
    for host in range(2):
        monkeypatch.setattr(pipeline.jax, 'process_index', lambda host=host: host)
        shares.append(take(pipeline.train_batches(source.train, **settings), 6))
    for step, batch in enumerate(one):
        both = np.concatenate([share[step]['image'] for share in shares])
        assert both.tobytes() == batch['image'].tobytes()  # in the same order


def test_hosts_share_each_part_of_a_batch(folder, monkeypatch):
    """With two parts a batch each part's rows are the same, however many hosts."""
    source = load(folder)
    settings = dict(batch_size=8, seed=1, micro_batches=2)
    one = take(pipeline.train_batches(source.train, **settings), 3)
    monkeypatch.setattr(pipeline.jax, 'process_count', lambda: 2)
    shares = []
    for host in range(2):
        monkeypatch.setattr(pipeline.jax, 'process_index', lambda host=host: host)
        shares.append(take(pipeline.train_batches(source.train, **settings), 3))
    for step, batch in enumerate(one):
        own = [share[step]['image'] for share in shares]
        own = [rows.reshape(2, 2, *rows.shape[1:]) for rows in own]
        assert np.concatenate(own, 1).tobytes() == batch['image'].tobytes()


def test_a_host_reads_its_rows_alone(folder, monkeypatch):
    """24 examples in batches of 8, and of 10, which do not divide them."""
    source = load(folder)
    monkeypatch.setattr(pipeline.jax, 'process_count', lambda: 2)
    for batch_size in (8, 10):
        read = {0: [], 1: []}
        for host in (0, 1):
            monkeypatch.setattr(pipeline.jax, 'process_index', lambda host=host: host)

            class Counted(labeled_images.Examples):
                def __getitem__(self, position, seen=read[host]):
                    seen.append(int(position))
                    return super().__getitem__(position)

            examples = Counted(
                source.train.reader, source.train.indices, source.train.preparation
            )
            batches = list(pipeline.eval_batches(examples, batch_size=batch_size))
        own = [n for n in range(24) if n % batch_size < batch_size // 2]
        assert sorted(read[0])[: len(own)] == own
        others = set(range(24)) - set(own)
        # What fills up the last batch is the last example again.
        assert set(read[0]) <= {*own, 23} and set(read[1]) <= others | {23}
        assert len(read[0]) == len(read[1]) == len(batches) * batch_size // 2


@pytest.mark.parametrize('hosts', [1, 2])
def test_evaluation_counts_each_example_once(folder, hosts, monkeypatch):
    source = load(folder)
    monkeypatch.setattr(pipeline.jax, 'process_count', lambda: hosts)
    seen, lengths = [], []
    for host in range(hosts):
        monkeypatch.setattr(pipeline.jax, 'process_index', lambda host=host: host)
        batches = list(pipeline.eval_batches(source.train, batch_size=10))
        lengths.append([len(batch['mask']) for batch in batches])
        images = np.array(rows(batches), object)
        seen += list(images[np.concatenate([b['mask'] for b in batches]) == 1])
    assert lengths == [[10 // hosts] * 3] * hosts
    assert sorted(seen) == sorted(source.train[i]['image'].tobytes() for i in range(24))


def test_cache_in_memory(folder, capsys):
    plain, cached = load(folder), load(folder, cache='memory')
    assert '30 decoded images take 0.00 GiB' in capsys.readouterr().out
    settings = dict(batch_size=8, seed=0)
    expected = rows(take(pipeline.train_batches(plain.train, **settings), 6))
    assert rows(take(pipeline.train_batches(cached.train, **settings), 6)) == expected
    for path in folder.rglob('*.jpg'):
        path.unlink()
    assert rows(take(pipeline.train_batches(cached.train, **settings), 6)) == expected


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'batch_size': 25}, 'larger than the 24 images to train on'),
        ({'augment': 'twirl'}, 'data.augment=twirl is not known; use none, flip'),
    ],
)
def test_bad_batches(folder, settings, message):
    with pytest.raises(UserError, match=message):
        pipeline.train_batches(
            load(folder).train, **{'batch_size': 4, 'seed': 0} | settings
        )


def test_cache_and_processes_do_not_go_together(folder):
    source = load(folder, cache='memory')
    with pytest.raises(UserError, match='data.workers=2 cannot be combined with'):
        pipeline.check_train_batches(source.train, 4, 'none', 2)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(folder):
    import tracemalloc

    paths = sorted(str(path) for path in folder.rglob('*.jpg'))

    def peak(repeats):
        reader = readers.FileReader(paths * repeats, np.zeros(30 * repeats, np.int32))
        preparation = images_lib.Preparation(64)
        examples = labeled_images.Examples(reader, np.arange(30 * repeats), preparation)
        tracemalloc.start()
        for batch in pipeline.eval_batches(examples, batch_size=10):
            assert len(batch['image']) == 10
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = peak(3), peak(60)
    assert many < 1.5 * few + 2e5
    assert 5 * many < 60 * 30 * 64 * 64 * 3  # what holding them all would take
