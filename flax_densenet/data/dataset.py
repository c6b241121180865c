"""Sources of labeled images with random access; `pipeline` makes batches of them.

A source has `train` and `test` examples. Images are decoded when they are needed, in
grain's threads or processes, so a set of any size takes the memory of a few batches.

>>> source = load_source('digits', image_size=16)
>>> len(source.train), len(source.test), source.class_names[:3]
(1437, 360, ('0', '1', '2'))
>>> source.train[0]['image'].shape
(16, 16, 3)
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_densenet import settings
from flax_densenet.data import (
    deep,
    images,
    label_options,
    labeled_images,
    notes,
    source_checks,
    sources,
    splits,
)
from flax_densenet.data import duplicates as duplicates_lib
from flax_densenet.data import folds as folds_lib
from flax_densenet.errors import UserError
from flax_densenet.settings import sizes

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Training, validation and test examples of the same classes.

    Attributes:
      test: measured once at the end if there are validation examples; otherwise after
        each epoch.
      val: choose the best epoch; None if the source has only two parts.
      multi_label: whether images can have several labels, with the names `class_names`.
      has_test: whether the source has a test part; otherwise `test` was split off.
      skipped: unreadable files that were left out, each with the reason.
      duplicates: groups of files with the same content, see `duplicates.Parts`.
    """

    name: str
    class_names: tuple[str, ...]
    train: labeled_images.Examples
    test: labeled_images.Examples
    has_test: bool = False
    multi_label: bool = False
    skipped: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()
    val: labeled_images.Examples | None = None

    @property
    def selection(self) -> labeled_images.Examples:
        """The examples that choose the best epoch: `val`, or `test` if it is None."""
        return self.test if self.val is None else self.val

    @property
    def parts(self) -> dict[str, labeled_images.Examples]:
        """`train`, `val` if there is one, and `test`, by name."""
        found = {'train': self.train, 'val': self.val, 'test': self.test}
        return {name: part for name, part in found.items() if part is not None}


# In pixels, if data.image_size is 0.
DEFAULT_IMAGE_SIZES = dict.fromkeys(sources.SOURCES, 224) | dict(digits=32)
# Of `load_source`.
_DEFAULTS: dict[str, Any] = {'resize': 'stretch', 'interpolation': 'bilinear'}
_DEFAULTS |= {'crop_fraction': 1.0, 'channels': 3}


def load_source(
    source: str, known_classes: Sequence[str] | None = None, **fields: Any
) -> Source:
    """`from_settings` with fields by name; those not given have their defaults.

    Args:
      source: as `data.source`.
      known_classes: see `from_settings`.
      **fields: of `settings.SourceSettings` and `settings.PreparationSettings`.
    """
    names = {field.name for field in dataclasses.fields(settings.PreparationSettings)}
    preparation = {name: fields.pop(name) for name in names & fields.keys()}
    return from_settings(
        settings.SourceSettings(source, **fields),
        settings.PreparationSettings(**_DEFAULTS | preparation),
        known_classes,
    )


def from_settings(
    data: settings.SourceSettings,
    preparation: settings.PreparationSettings,
    known_classes: Sequence[str] | None = None,
) -> Source:
    """Finds the images and labels of a data source; decodes no images.

    Args:
      data: which images there are, and how they are split.
      preparation: without open fields, but for `image_size=0` (the source's default),
        and `window` and `bit_depth`, which are then found in the images (see
        `deep.resolve`).
      known_classes: the classes of a trained model that is to be evaluated. Then one
        class and one image are enough, and a part can be empty.

    Raises:
      UserError: a field or a file is invalid.
    """
    kind, name = sources.parse(data.source, data.labels)
    prepared = _make_preparation(preparation, kind)
    source_checks.check_fields(
        data.test_fraction, data.val_fraction, data.bad_images, data.cache
    )
    chosen = folds_lib.choose(data.folds, data.fold, for_training=known_classes is None)
    duplicates_lib.check(data.duplicates, kind)
    listing = sources.load(
        kind,
        name,
        bad_images=data.bad_images,
        **dict[str, Any](tfds_dir=data.tfds_dir, tfds_train=data.tfds_train),
        labels=data.labels,
        table=_table_options(data, chosen.for_training),
        known_classes=known_classes,
        channels=prepared.channels,
    )
    divided, seen = _divide(data, listing, chosen)
    prepared = deep.resolve(
        prepared,
        listing.reader,
        seen,
        window=preparation.window,
        bit_depth=preparation.bit_depth,
    )
    return Source(
        name=data.source,
        class_names=tuple(listing.class_names),
        **_make_parts(data, listing, divided, prepared),
        has_test=listing.test is not None and not data.fold,
        multi_label=listing.multi_label,
        skipped=listing.skipped,
        duplicates=divided.lines,
    )


def _make_preparation(fields, kind):
    """How images are prepared, before `window` and `bit_depth` are known."""
    preparation = images.Preparation(
        sizes.parse(fields.image_size) or DEFAULT_IMAGE_SIZES[kind],
        *(fields.resize, fields.crop_fraction, fields.interpolation, fields.channels),
    )
    source_checks.check_preparation(preparation, fields.window, fields.bit_depth)
    return preparation


def _table_options(data, for_training):
    return label_options.Options(
        data.label_kind,
        tuple(data.label_columns),
        data.groups,
        data.blank_labels,
        data.uncertain_labels,
        data.split,
        for_training=for_training,
        soft=data.soft_labels,
        subgroups=data.subgroups,
        held_out_chooses=not data.val_fraction and not data.folds,
    )


def _make_parts(data, listing, divided, preparation):
    """The examples of each part by its name, with a cache if requested."""
    indices, reader = divided.indices, listing.reader
    reader.groups = listing.groups
    parts = {
        name: labeled_images.Examples(reader, i, preparation)
        for name, i in indices.items()
    }
    if data.cache == 'memory':
        count = sum(map(len, parts.values()))
        source_checks.check_cache(count, preparation, data.cache_limit_gib)
        parts = {
            name: labeled_images.CachedExamples(part) for name, part in parts.items()
        }
    return parts


def _divide(data, listing, folds):
    """The parts of a source, and the images to inspect for their values."""
    divided = splits.find_splits(
        listing,
        *(data.test_fraction, data.split_seed, data.duplicates),
        val_fraction=data.val_fraction,
        folds=folds if folds.folds else None,
    )
    # All folds together may have no test part.
    has_both = folds.for_training and not (folds.folds and not folds.fold)
    _say_parts(data.source, listing, divided, for_training=has_both)
    if not folds.fold:
        line = splits.describe_missing(listing, divided.indices) if has_both else ''
        if line:
            notes.say(f'data.source={data.source}: {line}')
        return divided, divided.train
    # All folds get the same preparation.
    return divided, np.sort(np.concatenate(list(divided.indices.values())))


def _say_parts(source, listing, divided, *, for_training):
    """Checks the sizes of parts; logs groups and copies in several of them."""
    if for_training:
        _check_counts(source, divided)
        if listing.groups is not None:
            line = splits.describe_groups(
                listing.groups, listing.grouped_by, divided.indices, listing.reader.name
            )
            notes.say(f'data.source={source}: {line}')
    if divided.summary:
        _LOGGER.info(divided.summary)


def _check_counts(source, split):
    train, test = len(split.train), len(split.test)
    if train and test and split.val is not None and not len(split.val):
        raise UserError(
            f'data.source={source}: {train} training images are too few to split off a '
            'validation part; set data.val_fraction=0, or a larger share'
        )
    if not train and split.val is not None and len(split.val):
        raise UserError(
            f'data.source={source}: {len(split.val)} validation images leave none to '
            'train on; lower data.val_fraction'
        )
    if not train or not test:
        copies = ' (copies of an image count as one)' if split.lines else ''
        raise UserError(
            f'data.source={source}: {train} images to train on and {test} to '
            f'test on are too few{copies}; add images, or a folder of test images '
            '(PATH/train and PATH/val)'
        )
