"""Sources, splits, and batches that are a function of the step."""

import itertools
import os

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset, pipeline, readers, tfds_source
from flax_densenet.data import images as images_lib
from helpers.paths import shared
from helpers.runs import write_images


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def rows(batches, key='image'):
    return [row.tobytes() for batch in batches for row in batch[key]]


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / 'photos', {'ants': 10, 'bees': 15, 'wasps': 5})


@pytest.fixture
def split_folder(tmp_path):
    write_images(tmp_path / 'photos/train', {'ants': 6, 'bees': 5})
    write_images(tmp_path / 'photos/val', {'ants': 3, 'bees': 2}, seed=1)
    return tmp_path / 'photos'


def load(folder, **fields):
    return dataset.load_source(f'folder:{folder}', **{'image_size': 16, **fields})


def test_digits():
    source = dataset.load_source('digits')
    assert (len(source.train), len(source.test)) == (1437, 360)
    assert source.train[0]['image'].shape == (32, 32, 3)
    counts = np.bincount(source.test.labels)
    assert counts.min() >= 34 and counts.max() <= 37  # even over the classes


def test_split_of_a_folder(folder):
    source = load(folder)
    assert source.class_names == ('ants', 'bees', 'wasps')
    assert (len(source.train), len(source.test)) == (24, 6)
    assert np.bincount(source.test.labels).tolist() == [2, 3, 1]
    parts = [
        {part.name(i) for i in range(len(part))} for part in (source.train, source.test)
    ]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 30
    for i in range(len(source.test)):
        example = source.test[i]
        class_name = os.path.basename(os.path.dirname(source.test.name(i)))
        assert source.class_names[example['label']] == class_name
        # Each class has a color of its own (write_images).
        assert example['image'].mean((0, 1)).argmax() == example['label']
    same, other = load(folder), load(folder, split_seed=1)
    assert same.test.indices.tolist() == source.test.indices.tolist()
    assert other.test.indices.tolist() != source.test.indices.tolist()


def sides(source, root):
    """Files below the root -> whether they are tested."""
    parts = (source.train, False), (source.test, True)
    return {
        os.path.relpath(part.name(i), root): tested
        for part, tested in parts
        for i in range(len(part))
    }


def test_a_split_outlasts_its_files(tmp_path):
    """What goes, comes or moves does not send the test images into training."""
    root = write_images(tmp_path / 'p', {'a': 40, 'b': 60, 'c': 23}, size=(4, 4))
    before = sides(load(root), root)
    os.rename(root, tmp_path / 'q')
    for way_to_write_it in ('q', 'q/', './q'):
        assert sides(load(f'{tmp_path}/{way_to_write_it}'), tmp_path / 'q') == before
    for name in ('a/000.jpg', 'b/030.jpg', 'c/022.jpg'):
        (tmp_path / 'q' / name).unlink()
    after = sides(load(tmp_path / 'q'), tmp_path / 'q')
    assert len(after) == 120 and sum(after.values()) == 24
    assert sum(after[name] != before[name] for name in after) <= 3


def test_split_with_one_image_of_a_class(tmp_path):
    source = load(write_images(tmp_path / 'p', {'a': 9, 'b': 1}))
    assert (len(source.train), len(source.test)) == (8, 2)


def test_folder_with_parts(split_folder):
    source = load(split_folder)
    assert (len(source.train), len(source.test)) == (11, 5)
    assert source.has_test
    names = [source.test.name(i) for i in range(5)]
    assert all('/val/' in name for name in names)


def test_what_is_in_the_folders(folder):
    (folder / 'ants' / '.DS_Store').write_bytes(b'x')
    (folder / 'ants' / 'notes.txt').write_text('x')
    (folder / '.git').mkdir()
    (folder / '__MACOSX').mkdir()
    deeper = folder / 'bees' / 'more'
    deeper.mkdir()
    (folder / 'bees' / '000.jpg').rename(deeper / 'a b.JPG')
    (deeper / 'loop').symlink_to(folder / 'bees')
    source = load(folder)
    assert source.class_names == ('ants', 'bees', 'wasps')
    assert len(source.train) + len(source.test) == 30


@pytest.mark.parametrize(
    ('prepare', 'message'),
    [
        (lambda p: None, 'there is no such folder'),
        (lambda p: p.mkdir(), 'no class folders'),
        (lambda p: write_images(p, {'a': 3}), r'one class only \(a\)'),
        (lambda p: write_images(p, {'a': 3, 'b': 0}), 'the folder b holds no images'),
        (lambda p: write_images(p, {'a': 1, 'b': 0}), 'the folder b holds no images'),
        (
            lambda p: (
                write_images(p / 'train', {'a': 1, 'b': 1}),
                write_images(p / 'val', {'a': 1, 'c': 1}),
            ),
            'class c is in val but not in train',
        ),
        (
            lambda p: (
                write_images(p / 'train', {'a': 1, 'b': 1}),
                write_images(p / 'test', {'a': 0}),
            ),
            'the folder test holds no images',
        ),
    ],
)
def test_bad_folders(prepare, message, tmp_path):
    prepare(tmp_path / 'photos')
    with pytest.raises(UserError, match=message):
        load(tmp_path / 'photos')


@pytest.mark.parametrize(
    ('source', 'fields', 'message'),
    [
        ('cifar', {}, 'use digits, folder:PATH, packed:DIR, tar:PATH or tfds'),
        ('digits:big', {}, 'digits takes no name'),
        ('folder:', {}, 'there is no such folder'),
        ('tfds:no_such_set', {}, 'TFDS has no such set'),
        ('digits', {'resize': 'pad'}, 'data.resize=pad is not known'),
        ('digits', {'bad_images': 'x'}, 'data.bad_images=x is not known'),
        ('digits', {'cache': 'disk'}, 'data.cache=disk is not known'),
        ('digits', {'image_size': -1}, 'data.image_size=-1'),
        ('digits', {'test_fraction': 1.0}, 'data.test_fraction=1.0'),
        (
            'digits',
            {'cache': 'memory', 'image_size': 512, 'cache_limit_gib': 1.0},
            '1797 images of 512x512 take 1.32 GiB',
        ),
    ],
)
def test_bad_fields(source, fields, message):
    with pytest.raises(UserError, match=message):
        dataset.load_source(source, **fields)


def test_bad_images(folder):
    whole = (folder / 'bees' / '003.jpg').read_bytes()
    (folder / 'bees' / '003.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / 'ants' / '004.jpg').write_text('not an image')
    with pytest.raises(UserError, match='ants/004.jpg is not an image.*skip'):
        load(folder)
    source = load(folder, bad_images='skip')
    assert len(source.train) + len(source.test) == 28
    assert [line.split('/')[-1][:7] for line in source.skipped] == [
        '004.jpg',
        '003.jpg',
    ]
    assert len(rows(take(pipeline.eval_batches(source.train, batch_size=4), 99)))


def test_a_bad_image_met_later_is_named(folder):
    source = load(folder)
    path = source.train.name(7)
    os.truncate(path, 200)
    with pytest.raises(UserError, match=f'{path} cannot be decoded.*bad_images=skip'):
        take(pipeline.train_batches(source.train, batch_size=8, seed=0), 9)


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


@pytest.mark.parametrize('start', [1, 5, 40])
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

            class Counted(dataset.Examples):
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
    with pytest.raises(UserError, match='data.workers=2 does not go with'):
        pipeline.check_train_batches(source.train, 4, 'none', 2)


def test_relabeled_and_joined(folder):
    source = load(folder)
    renamed = dataset.Relabeled(source.train, [5, 7, 9], 10)
    assert set(renamed.labels) == {5, 7, 9}
    assert [renamed[i]['label'] for i in range(24)] == renamed.labels.tolist()
    everything = dataset.join(source.train, source.test)
    assert sorted(everything.indices) == list(range(30))


def test_hymenoptera():
    source = dataset.load_source(f'folder:{shared("data/hymenoptera")}', image_size=32)
    assert (len(source.train), len(source.test)) == (245, 153)
    assert source.class_names == ('ants', 'bees')
    batches = take(pipeline.eval_batches(source.train, batch_size=50), 99)
    assert sum(batch['mask'].sum() for batch in batches) == 245


@pytest.fixture(scope='module')
def tfds():
    return pytest.importorskip('tensorflow_datasets')


def make_builder(tfds, class_name, image, with_test):
    """A TFDS builder of 12 images, 8 to train on; the label is in each image."""

    def info(self):
        features = {
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
            'label': tfds.features.ClassLabel(names=['left', 'right']),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def split_generators(self, downloads):
        parts = {'train': self._generate_examples(range(8))}
        if with_test:
            parts['extra'] = self._generate_examples(range(12, 13))
            parts['test'] = self._generate_examples(range(8, 12))
        return parts

    def generate_examples(self, numbers):
        for number in numbers:
            yield number, {'image': image(number), 'label': number % 2}

    return type(
        class_name,
        (tfds.core.GeneratorBasedBuilder,),
        {
            'VERSION': tfds.core.Version('1.0.0'),
            'pkg_dir_path': None,
            '_info': info,
            '_split_generators': split_generators,
            '_generate_examples': generate_examples,
        },
    )


def png(number):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new('RGB', (12, 10), (number * 20, number % 2 * 255, 0)).save(file, 'PNG')
    file.seek(0)
    return file


@pytest.mark.parametrize('with_test', [True, False])
def test_tfds_without_tensorflow(tfds, tmp_path, with_test):
    name = 'TinyWith' if with_test else 'TinyWithout'
    make_builder(tfds, name, png, with_test)(
        data_dir=tmp_path, file_format='array_record'
    ).download_and_prepare()
    name = 'tfds:tiny_with' if with_test else 'tfds:tiny_without'
    source = dataset.load_source(name, image_size=8, tfds_dir=str(tmp_path))
    assert source.class_names == ('left', 'right')
    sizes = (8, 4) if with_test else (6, 2)
    assert (len(source.train), len(source.test)) == sizes
    for part in (source.train, source.test):
        for i in range(len(part)):
            example = part[i]
            assert example['image'].shape == (8, 8, 3)
            assert (example['image'][0, 0, 1] == 255) == example['label']
        assert part.labels.tolist() == [part[i]['label'] for i in range(len(part))]
    batch = take(pipeline.train_batches(source.train, batch_size=4, seed=0), 1)[0]
    assert batch['image'].shape == (4, 8, 8, 3)
    everything = dataset.join(source.train, source.test)
    assert sorted(everything[i]['image'][0, 0, 0] for i in range(len(everything)))[
        -1
    ] == (220 if with_test else 140)


def test_several_splits_of_tfds(tfds, tmp_path):
    make_builder(tfds, 'TinySplits', png, True)(
        data_dir=tmp_path, file_format='array_record'
    ).download_and_prepare()
    fields = dict(image_size=8, tfds_dir=str(tmp_path))
    source = dataset.load_source('tfds:tiny_splits', tfds_train='train+extra', **fields)
    assert (len(source.train), len(source.test)) == (9, 4)
    seen = sorted(source.train[i]['image'][0, 0, 0] for i in range(9))
    assert seen == [20 * n for n in (*range(8), 12)]
    assert source.train.name(8).startswith('extra[')
    source = dataset.load_source('tfds:tiny_splits', tfds_train='test', **fields)
    assert (len(source.train), len(source.test)) == (3, 1)  # a split of it
    for name in ('train+none', 'train+train', 'train+'):
        with pytest.raises(UserError, match=f'tfds_train={name.replace("+", ".")}'):
            dataset.load_source('tfds:tiny_splits', tfds_train=name, **fields)


def test_tfds_set_that_needs_tensorflow(tfds, tmp_path):
    make_builder(tfds, 'TinyArrays', lambda n: np.zeros((8, 8, 3), np.uint8), True)
    with pytest.raises(UserError, match=r"pip install 'flax_densenet\[prepare\]'"):
        dataset.load_source('tfds:tiny_arrays', tfds_dir=str(tmp_path))


def test_stock_tfds_set_without_network(tfds, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, '_has_network', lambda: False)
    with pytest.raises(UserError, match='tfds:mnist: cannot be downloaded into'):
        dataset.load_source('tfds:mnist', tfds_dir=str(tmp_path))


def test_memory_does_not_grow_with_the_number_of_images(folder):
    import tracemalloc

    paths = sorted(str(path) for path in folder.rglob('*.jpg'))

    def peak(repeats):
        reader = readers.FileReader(paths * repeats, np.zeros(30 * repeats, np.int32))
        preparation = images_lib.Preparation(64)
        examples = dataset.Examples(reader, np.arange(30 * repeats), preparation)
        tracemalloc.start()
        for batch in pipeline.eval_batches(examples, batch_size=10):
            assert len(batch['image']) == 10
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = peak(3), peak(60)
    assert many < 1.5 * few + 2e5
    assert 5 * many < 60 * 30 * 64 * 64 * 3  # what holding them all would take
