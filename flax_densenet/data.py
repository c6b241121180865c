"""Sources of labelled images, and batches of them that depend on the step alone.

A source has `train` and `test` examples with random access; images are decoded when
asked for, inside grain's threads or processes, so a set of any size takes no more
memory than a few batches.

>>> source = load_source('digits', image_size=16)
>>> len(source.train), len(source.test), source.class_names[:3]
(1437, 360, ('0', '1', '2'))
>>> source.train[0]['image'].shape
(16, 16, 3)
>>> batch = next(iter(train_batches(source.train, batch_size=8, seed=0)))
>>> batch['image'].shape, batch['label'].shape
((8, 16, 16, 3), (8,))
"""

import dataclasses
import functools
import multiprocessing.connection
import os
import threading

import grain
import jax
import numpy as np

from flax_densenet import augment as augment_lib
from flax_densenet import balance as balance_lib
from flax_densenet import duplicates as duplicates_lib
from flax_densenet import images, unread
from flax_densenet import sources as sources_lib
from flax_densenet.errors import UserError

BAD_IMAGES = ('error', 'skip')
CACHES = ('none', 'memory')
_GIB = 2**30


class Examples:
    """A random-access sequence of `{'image': uint8 [S, S, C], 'label': int32}`.

    With several labels an image, `label` is float32 `[L]` of 0, 1 and NaN (not known).
    """

    def __init__(
        self, reader: sources_lib.Reader, indices, preparation: images.Preparation
    ):
        self.reader = reader
        self.indices = np.asarray(indices, np.int64)
        self.preparation = preparation

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.preparation.size

    def __len__(self):
        return len(self.indices)

    def __repr__(self):
        return f'{type(self.reader).__name__} of {len(self)} images'

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 `[len(self)]`, without decoding any image."""
        return self.reader.labels[self.indices]

    def name(self, position: int) -> str:
        """The file of an example, or its place in its data set."""
        return self.reader.name(int(self.indices[position]))

    def __getitem__(self, position):
        index = int(self.indices[position])
        raw = self.reader[index]
        try:
            if isinstance(raw, np.ndarray):
                image = images.prepare_array(raw, self.preparation)
            else:
                image = images.load_image(raw, self.preparation)
        except UserError as error:
            raise UserError(
                f'{self.reader.name(index)} {error}: mend or remove it, or set '
                'data.bad_images=skip'
            ) from error
        return {'image': image, 'label': self.reader.labels[index]}


class CachedExamples(Examples):
    """Examples that keep each decoded, resized image in memory once it was read."""

    def __init__(self, examples: Examples):
        super().__init__(examples.reader, examples.indices, examples.preparation)
        shape = len(self), self.image_size, self.image_size, self.preparation.channels
        self._images = np.empty(shape, np.uint8)
        self._known = np.zeros(len(self), bool)

    def __getitem__(self, position):
        if not self._known[position]:
            self._images[position] = super().__getitem__(position)['image']
            self._known[position] = True
        label = self.reader.labels[self.indices[position]]
        return {'image': self._images[position], 'label': label}


class Relabelled(Examples):
    """Examples whose label `i` becomes `new_labels[i]`.

    With several labels an image: label `new_labels[i]` is the old label `i`, the
    others are not known.
    """

    def __init__(self, examples: Examples, new_labels, count: int):
        super().__init__(examples.reader, examples.indices, examples.preparation)
        self._examples = examples
        self._new_labels = np.asarray(new_labels, np.int32)
        self._count = count

    @property
    def labels(self):
        return self._change(self._examples.labels)

    def _change(self, labels):
        if not isinstance(labels, np.ndarray) or labels.dtype != np.float32:
            return self._new_labels[labels]
        changed = np.full((*labels.shape[:-1], self._count), np.nan, np.float32)
        changed[..., self._new_labels] = labels
        return changed

    def __getitem__(self, position):
        example = self._examples[position]
        return example | {'label': self._change(example['label'])}


@dataclasses.dataclass(frozen=True)
class Source:
    """Training and test examples of the same classes.

    Attributes:
      multi_label: an image can have several labels; `class_names` are theirs.
      has_test: the set came with a test part; else `test` was split off by us.
      skipped: bad files left out, each with its reason.
      duplicates: groups of files of the same content, see `duplicates.Parts`.
    """

    name: str
    class_names: tuple[str, ...]
    train: Examples
    test: Examples
    has_test: bool = False
    multi_label: bool = False
    skipped: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()


# Side in pixels where data.image_size is 0.
DEFAULT_IMAGE_SIZES = {'digits': 32, 'folder': 224, 'tfds': 224}


def load_source(
    source: str,
    *,
    labels: str = '',
    image_size: int = 0,
    resize: str = 'stretch',
    crop_fraction: float = 1.0,
    interpolation: str = 'bilinear',
    channels: int = 3,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    bad_images: str = 'error',
    duplicates: str = 'report',
    cache: str = 'none',
    cache_limit_gib: float = 4.0,
    tfds_dir: str | None = None,
) -> Source:
    """Finds the images and labels of a data source; decodes none of them.

    Args:
      source: `digits` (scikit-learn's handwritten digits), `folder:PATH`
        (`PATH/CLASS/*`, or `PATH/{train,val}/CLASS/*`) or `tfds:NAME[:CONFIG]`.
      labels: a table of labels for the images of a `folder:`, see `labels`.
      image_size: side in pixels to which images are resized; 0 for the source's own.
      resize, crop_fraction, interpolation, channels: see `images.Preparation`.
      test_fraction: share of the images that is split off for the test, evenly over
        the classes, where the source has no test part of its own.
      split_seed: of that split.
      bad_images: `error` ends at a file that is no whole image, `skip` leaves it out.
      duplicates: of files of the same content in both parts: `report` tells of them,
        `drop` leaves them out of training, `ignore` does not look. A split of ours has
        copies on one side, unless `ignore`.
      cache: `memory` keeps decoded images of up to `cache_limit_gib` in memory.
      tfds_dir: where TFDS keeps its sets; None for its default.

    Raises:
      UserError: for everything that is wrong with the fields or the files.
    """
    kind, _, name = source.partition(':')
    if kind not in sources_lib.SOURCES:
        raise UserError(
            f'data.source={source} is not known; use digits, folder:PATH or '
            'tfds:NAME[:CONFIG]'
        )
    preparation = images.Preparation(
        image_size or DEFAULT_IMAGE_SIZES[kind],
        resize,
        crop_fraction,
        interpolation,
        channels,
    )
    _check_preparation(preparation)
    _check_fields(test_fraction, bad_images, cache)
    duplicates_lib.check(duplicates, kind)
    if labels and kind != 'folder':
        raise UserError(f'data.labels={labels} needs data.source=folder:PATH')
    found = sources_lib.SOURCES[kind](
        name, bad_images=bad_images, tfds_dir=tfds_dir, labels=labels
    )
    split = _find_parts(found, test_fraction, split_seed, duplicates)
    train, test = split.train, split.test
    if not len(train) or not len(test):
        copies = ' (copies of an image count as one)' if split.lines else ''
        raise UserError(
            f'data.source={source}: {len(train)} images to train on and {len(test)} to '
            f'test on are too few{copies}; add images, or a folder of test images '
            '(PATH/train and PATH/val)'
        )
    if split.summary:
        print(split.summary, flush=True)
    parts = [Examples(found.reader, indices, preparation) for indices in (train, test)]
    if cache == 'memory':
        _check_cache(sum(map(len, parts)), preparation, cache_limit_gib)
        parts = [CachedExamples(part) for part in parts]
    return Source(
        name=source,
        class_names=tuple(found.class_names),
        train=parts[0],
        test=parts[1],
        has_test=found.test is not None,
        multi_label=bool(labels),
        skipped=found.skipped,
        duplicates=split.lines,
    )


def _check_preparation(preparation):
    _check_choice('resize', preparation.resize, images.RESIZES)
    _check_choice('interpolation', preparation.interpolation, images.INTERPOLATIONS)
    _check_choice('channels', preparation.channels, (1, 3))
    if not 0 <= preparation.size <= 2**16:
        raise UserError(f'data.image_size={preparation.size} must be from 0 to {2**16}')
    if not 0 < preparation.crop_fraction <= 1:
        raise UserError(
            f'data.crop_fraction={preparation.crop_fraction} must be above 0, at most 1'
        )


def _check_fields(test_fraction, bad_images, cache):
    _check_choice('bad_images', bad_images, BAD_IMAGES)
    _check_choice('cache', cache, CACHES)
    if not 0 < test_fraction < 1:
        raise UserError(f'data.test_fraction={test_fraction} must be between 0 and 1')


def _check_choice(field, value, valid):
    if value not in valid:
        choices = ', '.join(map(str, valid))
        raise UserError(f'data.{field}={value} is not known; use {choices}')


def _check_cache(count, preparation, limit_gib):
    size = preparation.size
    need = count * size * size * preparation.channels / _GIB
    if need > limit_gib:
        raise UserError(
            f'data.cache=memory: {count} images of {size}x{size} take {need:.2f} GiB, '
            f'more than data.cache_limit_gib={limit_gib:g}; raise it or use '
            'data.cache=none'
        )
    print(f'data.cache=memory: {count} decoded images take {need:.2f} GiB', flush=True)


def _find_parts(found, test_fraction, split_seed, duplicates):
    """Training and test part, the copies among them seen to."""
    train, test = found.train, found.test
    if test is None:
        train, test = _split(found, test_fraction, split_seed)
    if duplicates == 'ignore' or not isinstance(found.reader, sources_lib.FileReader):
        return duplicates_lib.Parts(train, test)
    return duplicates_lib.settle(
        found.reader.paths,
        found.reader.labels,
        train,
        test,
        duplicates=duplicates,
        # A patient's images stay together, which the copies of one might undo.
        ours=found.test is None and found.groups is None,
    )


def _split(found, test_fraction, seed):
    """A seeded random split, even over the classes; groups stay together."""
    if seed < 0:
        raise UserError(f'data.split_seed={seed} must be 0 or above')
    train_size = int(len(found.train) * (1 - test_fraction))
    test_size = len(found.train) - train_size
    if not train_size or not test_size:
        return found.train[:train_size], found.train[train_size:]
    if isinstance(
        found.reader, sources_lib.TfdsReader
    ):  # labels would have to be read one by one
        order = np.random.default_rng(seed).permutation(found.train)
        return np.sort(order[:train_size]), np.sort(order[train_size:])
    if found.reader.labels.ndim == 2:
        groups = found.groups
        groups = found.train if groups is None else groups[found.train]
        return _split_groups(found.train, groups, test_size, seed)
    order = np.random.default_rng(seed).permutation(len(found.train))
    labels = found.reader.labels[found.train][order]
    # An image's place in its class, from 0 to 1: the first ones of all classes are the
    # test images, so each class gives its share, rounded.
    place, counts = np.empty(len(order)), np.bincount(labels)
    by_class = np.argsort(labels, kind='stable')
    first = np.cumsum(counts) - counts
    place[by_class] = np.arange(len(order)) - first[labels[by_class]] + 0.5
    order = order[np.argsort(place / counts[labels], kind='stable')]
    test, train = order[:test_size], order[test_size:]
    labels = found.reader.labels[found.train]
    # A class that only the test would have gives its first image there to training.
    classes, first = np.unique(labels[test], return_index=True)
    first = first[~np.isin(classes, labels[train])]
    train, test = np.append(train, test[first]), np.delete(test, first)
    return np.sort(found.train[train]), np.sort(found.train[test])


def _split_groups(indices, groups, test_size, seed):
    """As many whole groups as come closest to `test_size` images, the rest."""
    names, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    taken = np.abs(np.cumsum(counts[order]) - test_size).argmin() + 1
    is_test = np.isin(numbers, order[: min(taken, len(names) - 1)])
    return indices[~is_test], indices[is_test]


class _Augment(grain.transforms.RandomMap):
    def __init__(self, recipe):
        self.recipe = recipe

    def random_map(self, example, rng):
        image = augment_lib.augment(example['image'], rng, recipe=self.recipe)
        return example | {'image': image}


def check_train_batches(
    examples: Examples,
    batch_size: int,
    augment: str,
    workers: int,
    balance: str = 'none',
):
    """Raises the errors of `train_batches`, without starting any thread."""
    if batch_size > len(examples):
        raise UserError(
            f'data.batch_size={batch_size} is larger than the {len(examples)} images '
            'to train on; use a smaller one'
        )
    _check_choice('augment', augment, augment_lib.RECIPES)
    _check_choice('balance', balance, balance_lib.BALANCES)
    if balance != 'none' and np.ndim(examples.labels) == 2:
        raise UserError(
            f'data.balance={balance} needs one class an image; with data.labels use '
            'data.balance=none'
        )
    if workers and isinstance(examples, CachedExamples):
        raise UserError(
            f'data.workers={workers} does not go with data.cache=memory, which threads '
            'share and processes do not; use data.workers=0'
        )


def train_batches(
    examples: Examples,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    augment: str = 'none',
    balance: str = 'none',
    bad_images: str = 'error',
    threads: int = 4,
    workers: int = 0,
):
    """An endless stream of full batches, a function of the seed and the step alone.

    Each epoch goes through the examples once, in an order of its own. Where the
    batch size does not divide them, a batch holds the end of one epoch and the start
    of the next, so batch norm always sees a full batch; `epoch` says which is which.

    Args:
      batch_size: over all hosts; this host's share comes out.
      start: step at which to start.
      augment: a key of `augment.RECIPES`.
      balance: `sampler` draws the classes equally often, see `balance.Draws`; an epoch
        has as many images as without.
      bad_images: `skip` puts the next image in the place of one that cannot be read
        any more; the iterator is then a `unread.Batches`, which counts them.
      threads: decoding threads; each makes a whole batch.
      workers: decoding processes instead of threads, 0 for none.

    Returns:
      An iterator of `{'image': uint8 [n, S, S, 3], 'label': int32 [n],
      'epoch': int32 [n]}`, to be closed after use; epochs count from 0.

    Raises:
      UserError: fewer examples than rows of a batch; an unknown recipe.
    """
    check_train_batches(examples, batch_size, augment, workers, balance)
    count, hosts = len(examples), jax.process_count()
    skip = bad_images == 'skip' and isinstance(examples, Examples)
    source = unread.StandIns(examples) if skip else examples
    if balance == 'sampler':
        draws = balance_lib.Draws(examples.labels, seed)
        stream = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
        stream = stream.map_with_index(
            lambda position, slot: source[draws(position // count, slot)]
        )
    else:
        stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    stream = stream.map_with_index(
        lambda position, example: example | {'epoch': np.int32(position // count)}
    )
    # The host's share is taken last, so that the stream does not depend on how many
    # hosts there are.
    if augment_lib.RECIPES[augment]:
        stream = stream.random_map(_Augment(augment))
    stream = stream[jax.process_index() :: hosts]
    stream = stream.batch(batch_size // hosts, drop_remainder=True)
    batches = _iterate(stream[start:], threads, workers)
    return unread.Batches(batches) if skip else batches


def eval_batches(
    examples: Examples,
    *,
    batch_size: int,
    bad_images: str = 'error',
    threads: int = 4,
    workers: int = 0,
):
    """Every example once, in order, in batches of one shape on every host.

    Args:
      bad_images: `skip` gives mask 0 to an image that cannot be read any more; the
        iterator is then a `unread.Batches`, which counts them.

    Returns:
      An iterator of `{'image': uint8 [n, S, S, 3], 'label': int32 [n],
      'mask': float32 [n]}`; the last batch is filled up with rows of mask 0.
    """
    skip = bad_images == 'skip' and isinstance(examples, Examples)
    hosts = jax.process_count()
    steps = -(-len(examples) // batch_size)
    stream = grain.MapDataset.range(steps * batch_size)
    source = unread.StandIns(examples) if skip else examples
    stream = stream.map(_Padded(source))[jax.process_index() :: hosts]
    stream = stream.batch(batch_size // hosts, drop_remainder=True)
    batches = _iterate(stream, threads, workers)
    return unread.Batches(batches) if skip else batches


class _Padded(grain.transforms.Map):
    def __init__(self, examples):
        self.examples = examples

    def map(self, position):
        last = len(self.examples) - 1
        example = self.examples[min(int(position), last)]
        counts = position <= last and example.get('unread', -1) < 0
        return example | {'mask': np.float32(counts)}


def _iterate(stream, threads, workers):
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
    stream = stream.to_iter_dataset(options)
    if workers:
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_end_with_parent,
        )
    return iter(stream)


def _end_with_parent(*_):
    """Ends a decoding process where training is killed, which grain would not do."""

    def wait():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def join(first: Examples, second: Examples) -> Examples:
    """The examples of two parts of one source, in the source's order."""
    indices = np.sort(np.concatenate([first.indices, second.indices]))
    return Examples(first.reader, indices, first.preparation)
