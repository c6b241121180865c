"""Makes batches of examples with grain, as a function of the seed and the step.

Images are decoded in grain's threads or processes when a batch needs them, so a set of
any size takes the memory of a few batches.

>>> from flax_densenet.data import dataset
>>> source = dataset.load_source('digits', image_size=16)
>>> batch = next(iter(train_batches(source.train, batch_size=8, seed=0)))
>>> batch['image'].shape, batch['label'].shape
((8, 16, 16, 3), (8,))
"""

import multiprocessing.connection
import os
import threading

import grain
import jax
import numpy as np
from absl import flags
from PIL import Image

from flax_densenet.data import (
    bands,
    class_balance,
    labeled_images,
    source_checks,
    unreadable,
)
from flax_densenet.data.augment import color, deep, geometry, policies
from flax_densenet.errors import UserError
from flax_densenet.system import process


class _Augment(grain.transforms.RandomMap):
    """Augments a training image: an array or, for random crops, a picture."""

    def __init__(self, recipe, color_jitter, policy, preparation=None):
        self.functions = geometry.RECIPES[recipe]
        self.preparation = preparation
        self.strengths = color.parse(color_jitter)
        self.policy = policies.parse(policy)

    def __bool__(self):
        return bool(self.functions or self.strengths or self.policy)

    def random_map(self, example, rng):
        image, functions = example['image'], self.functions
        if not isinstance(image, np.ndarray):
            height, width = self.preparation.shape
            box = geometry.crop_part(image.size, rng, aspect=width / height)
            image = self.preparation.apply_to_part(image, box)
            functions = [f for f in functions if f is not geometry.crop]
        for function in functions:
            image = function(image, rng)
        if self.strengths or self.policy:
            image = self._change_picture(image, rng)
        if isinstance(image, Image.Image):
            image = geometry.to_array(image)
        return example | {'image': image}

    def _change_picture(self, image, rng):
        if isinstance(image, np.ndarray) and image.dtype == np.uint16:
            return deep.change(image, rng, self.strengths, self.policy)
        if not isinstance(image, Image.Image):
            image = geometry.as_picture(image)
        if self.strengths:
            image = color.jitter(image, rng, self.strengths)
        return policies.apply(image, rng, self.policy) if self.policy else image


def check_train_batches(
    examples: labeled_images.Examples,
    batch_size: int,
    augment: str,
    workers: int,
    balance: str = 'none',
    color_jitter=(),
    policy: str = 'none',
):
    """Raises the errors of `train_batches` without starting threads."""
    if batch_size > len(examples):
        raise UserError(
            f'data.batch_size={batch_size} is larger than the {len(examples)} images '
            'to train on; use a smaller one'
        )
    source_checks.check_choice('augment', augment, geometry.RECIPES)
    changes = {
        'color_jitter': color.parse(color_jitter),
        'policy': policies.parse(policy),
    }
    preparation = _preparation_of(examples)
    for name, change in changes.items():
        if change and preparation and bands.are_kept(preparation.channels):
            raise UserError(
                f'data.{name} needs images in color or gray, not '
                f'data.channels={preparation.channels}'
            )
    source_checks.check_choice('balance', balance, class_balance.BALANCES)
    if balance == 'loss' and np.ndim(examples.labels) == 2:
        raise UserError(
            'data.balance=loss needs one class per image; with several labels use '
            'train.pos_weight=auto, or data.balance=sampler'
        )
    if workers and isinstance(examples, labeled_images.CachedExamples):
        raise UserError(
            f'data.workers={workers} cannot be combined with data.cache=memory, which '
            'processes do not share; use data.workers=0'
        )


def train_batches(
    examples: labeled_images.Examples,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    augment: str = 'none',
    color_jitter=(),
    policy: str = 'none',
    balance: str = 'none',
    bad_images: str = 'error',
    micro_batches: int = 1,
    threads: int = 4,
    workers: int = 0,
):
    """An endless stream of full batches, a function of the seed and the step.

    Each epoch goes through the examples once, in a new order. If the batch size does
    not divide them, a batch has the end of one epoch and the start of the next, so
    batch norm always sees a full batch; `epoch` distinguishes them.

    Args:
      examples: the training examples.
      batch_size: over all hosts; the iterator returns this host's share.
      seed: seed of the order and the augmentation.
      start: step at which to start.
      augment: a key of `geometry.RECIPES`, applied first.
      color_jitter: a value for `color.parse`.
      policy: a value for `policies.parse`.
      balance: `sampler` draws all classes equally often, see `class_balance.Draws`. The
        number of images in an epoch stays the same.
      bad_images: `skip` replaces an image that can no longer be read with the next one.
        The iterator is then an `unreadable.CountedBatches`, which counts them.
      micro_batches: number of micro-batches in a batch (`mesh.to_global`); each is
        spread over all hosts.
      threads: decoding threads, each of which makes entire batches.
      workers: decoding processes instead of threads; 0 for none.

    Returns:
      An iterator of `{'image': uint8 or uint16 [n, H, W, C], 'label': int32 [n],
      'epoch': int32 [n]}`, to be closed after use. Epochs count from 0.

    Raises:
      UserError: fewer examples than a batch has rows, or an unknown recipe.
    """
    check_train_batches(
        examples, batch_size, augment, workers, balance, color_jitter, policy
    )
    count, hosts = len(examples), jax.process_count()
    preparation = _preparation_of(examples)
    changes = _Augment(augment, color_jitter, policy, preparation)
    skip = bad_images == 'skip' and preparation is not None
    if preparation is not None and geometry.crop in changes.functions:
        examples = examples.as_pictures()
    source = unreadable.SubstituteUnreadable(examples) if skip else examples
    if balance == 'sampler':
        draws = class_balance.Draws(examples.labels, seed)
        stream = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
        stream = stream.map_with_index(
            lambda position, slot: source[draws(position // count, slot)]
        )
    else:
        stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    stream = stream.map_with_index(
        lambda position, example: example | {'epoch': np.int32(position // count)}
    )
    # The host's share is taken last, so that the stream does not depend on the number
    # of hosts.
    if changes:
        stream = stream.random_map(changes)
    stream = _own_rows(stream, batch_size // micro_batches)
    stream = stream.batch(batch_size // hosts, drop_remainder=True)
    batches = _iterate(stream[start:], threads, workers)
    return unreadable.CountedBatches(batches) if skip else batches


def _preparation_of(examples):
    """The preparation of images; None for examples that are not images (features)."""
    return getattr(examples, 'preparation', None)


def eval_batches(
    examples: labeled_images.Examples | labeled_images.Numbered,
    *,
    batch_size: int,
    bad_images: str = 'error',
    threads: int = 4,
    workers: int = 0,
):
    """Every example once, in order, in batches of the same shape on every host.

    Args:
      Args: examples: the examples to evaluate on.
      batch_size: over all hosts.
      bad_images: `skip` gives mask 0 to an image that can no longer be read. The
        iterator is then an `unreadable.CountedBatches`, which counts them.
      threads, workers: see `train_batches`.

    Returns:
      An iterator of `{'image': uint8 or uint16 [n, H, W, C], 'label': int32 [n],
      'mask': float32 [n]}`. The last batch is padded with rows of mask 0.
    """
    skip = bad_images == 'skip' and _preparation_of(examples) is not None
    hosts = jax.process_count()
    steps = -(-len(examples) // batch_size)
    stream = grain.MapDataset.range(steps * batch_size)
    source = unreadable.SubstituteUnreadable(examples) if skip else examples
    stream = _own_rows(stream, batch_size).map(_Padded(source))
    stream = stream.batch(batch_size // hosts, drop_remainder=True)
    batches = _iterate(stream, threads, workers)
    return unreadable.CountedBatches(batches) if skip else batches


def _own_rows(stream, batch_size):
    """This host's rows of each batch, which no other host reads.

    They are consecutive, so the global batch has its rows in the stream's order,
    whatever the number of hosts: each example gets the same dropout.
    """
    hosts = jax.process_count()
    if hosts == 1:
        return stream
    rows = grain.MapDataset.range(len(stream) // hosts)
    return rows.map(_OwnRow(stream, batch_size, jax.process_index(), hosts))


class _OwnRow(grain.transforms.Map):
    def __init__(self, stream, batch_size, host, hosts):
        self.stream = stream
        self.batch_size = batch_size
        self.host, self.hosts = host, hosts

    def map(self, number):
        share = self.batch_size // self.hosts
        batch, row = divmod(int(number), share)
        return self.stream[batch * self.batch_size + self.host * share + row]


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
        if not flags.FLAGS.is_parsed():  # by a program without absl; grain reads some
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_set_up_worker,
        )
    return iter(stream)


def _set_up_worker(*_):
    """Ends a decoding process if training is killed; grain would not do that."""
    process.quiet_pillow()

    def wait():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
