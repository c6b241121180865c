"""Data sets of TensorFlow Datasets (TFDS), read without TensorFlow."""

import dataclasses
import os
import socket
from typing import Any

import numpy as np
from tqdm import tqdm

from flax_densenet.data import (
    group_columns,
    group_names,
    label_options,
    notes,
    readers,
    subgroup_columns,
)
from flax_densenet.errors import UserError
from flax_densenet.system import paths

# Maximum number of examples that are read automatically to find groups.
_GROUPED = 20_000


@dataclasses.dataclass
class TfdsReader(readers.Reader):
    """Splits of a TFDS data set: encoded images.

    Attributes:
      parts: data sources of the splits, with random access.
      features: names of the image and the label in an example.
      names: names of the splits.
    """

    parts: list[Any]
    features: tuple[str, str]
    names: list[str]
    labels: '_TfdsLabels' = dataclasses.field(init=False)
    labels_in_memory = False

    def __post_init__(self):
        self.labels = _TfdsLabels(self)

    def example(self, index):
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)

    def __getitem__(self, index):
        raw = self.example(index)[self.features[0]]
        return raw if isinstance(raw, (bytes, np.ndarray)) else bytes(raw)

    def name(self, index):
        for part, name in zip(self.parts, self.names, strict=True):
            if index < len(part):
                return f'{name}[{index}]'
            index -= len(part)
        raise IndexError(index)


class _TfdsLabels:
    """Labels of a `TfdsReader` by index or index array, read when needed."""

    ndim = 1

    def __init__(self, reader):
        self._reader = reader

    def __getitem__(self, index):
        if np.ndim(index):
            return np.array([self[i] for i in index], np.int32)
        return np.int32(self._reader.example(int(index))[self._reader.features[1]])


def find(
    name: str,
    *,
    tfds_dir: str | None,
    tfds_train: str,
    table: label_options.Options | None = None,
    **_,
) -> readers.Listing:
    """Finds the images of a TFDS data set; prepares it first if necessary.

    Args:
      name: `NAME` or `NAME:CONFIG`.
      tfds_dir: the folder of TFDS; None for its default.
      tfds_train: splits to train on, joined by `+`; empty for `train`.
      table: of which `groups` names the feature that tells the groups, and
        `subgroups` those that divide the images.

    Raises:
      UserError: no such set or split, or the set cannot be used without TensorFlow.
    """
    import tensorflow_datasets as tfds  # 1 s, and only here

    field = f'data.source=tfds:{name}'
    tfds_dir = tfds_dir and paths.resolve(tfds_dir, 'data.tfds_dir=')
    builder_name = name.replace(':', '/', 1)
    try:
        builder = tfds.builder(builder_name, data_dir=tfds_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f'{field}: TFDS has no such set ({first_line})') from error
    _prepare_tfds(builder, field)
    features = builder.info.features
    image_key = _only_key(features, tfds.features.Image, 'image', field)
    label_key = _only_key(features, tfds.features.ClassLabel, 'label', field)
    splits = list(builder.info.splits)
    train = ['train' if 'train' in splits else splits[0]]
    if tfds_train:
        train = [name.strip() for name in tfds_train.split('+')]
        unknown = [name for name in train if name not in splits]
        if unknown or len(set(train)) < len(train):
            raise UserError(
                f'data.tfds_train={tfds_train}: {builder_name} has the splits '
                f'{", ".join(splits)}; name some of them, once each, such as '
                'train+extra'
            )
    others = [s for s in ('validation', 'test') if s in splits and s not in train]
    names = train + others
    decoders = {image_key: tfds.decode.SkipDecoding()}
    parts = [builder.as_data_source(split=s, decoders=decoders) for s in names]
    reader = TfdsReader(parts, (image_key, label_key), names)
    ends = np.cumsum([len(part) for part in parts])[len(train) - 1 :]
    of_train, *rest = np.split(np.arange(ends[-1]), ends[:-1])
    if len(rest) == 2:
        notes.say(
            f'{field}: trains on {"+".join(train)}, validation chooses the best epoch, '
            'tests once on test'
        )
    groups, grouped_by = _find_groups(
        field, reader, features, int(ends[-1]), table.groups if table else 'auto'
    )
    subgroups = table.subgroups if table else 'none'
    _add_subgroups(field, reader, features, int(ends[-1]), subgroups)
    return readers.Listing(
        reader,
        features[label_key].names,
        of_train,
        rest[-1] if rest else None,
        groups=groups,
        val=rest[0] if len(rest) == 2 else None,
        grouped_by=grouped_by,
    )


def _find_groups(field, reader, features, count, groups):
    """Groups int64 `[N]` from a feature, or None; their origin. Reads all examples."""
    named = groups.startswith('column:')
    feature = groups.removeprefix('column:') if named else None
    if groups == 'auto':
        feature = group_columns.group_of(features)
    if groups.startswith('path') or (named and feature not in features):
        raise UserError(
            f'data.groups={groups}: {field} has the features {", ".join(features)}; '
            'name one as column:NAME'
        )
    if feature is None:
        return None, ''
    if not named and count > _GROUPED:
        notes.say(
            f'{field}: images are split one by one; the feature {feature} may name the '
            f'owner of each image: data.groups=column:{feature} first reads it from '
            f'all {count:,} examples'
        )
        return None, ''
    found = _read(reader, [feature], count, 'groups')[feature]
    doubt = '' if named else group_columns.describe_doubt(feature, found)
    if doubt:
        notes.say(f'{field}: {doubt}')
        return None, ''
    numbers, lines = group_names.number(found, f'the feature {feature}', feature)
    if len(set(numbers.tolist())) > 1:
        for line in lines:
            notes.say(f'{field}: {line}')
        return numbers, f'the feature {feature}'
    if not named:
        notes.say(f'{field}: all images have the same {feature}, so it groups none')
        return None, ''
    raise UserError(
        f'data.groups={groups}: all images are of one group, which cannot be split; '
        'name another feature or set data.groups=none'
    )


def _read(reader, names, count, title):
    """Features of all examples as text, by name."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for index in tqdm(range(count), desc=title, leave=False, disable=None):
        example = reader.example(index)
        for name in names:
            value = np.asarray(example[name]).item()
            found[name].append(subgroup_columns.to_cell(value))
    return found


def _add_subgroups(field, reader, features, count, setting):
    """Features of numbers and words that divide the images; reads all examples."""
    if setting.startswith('path:'):
        return
    plain = [
        name
        for name, feature in features.items()
        if name not in reader.features and feature.shape == ()
    ]
    wanted = subgroup_columns.candidates(plain, setting)
    if wanted and setting == 'auto' and count > _GROUPED:
        notes.say(
            f'{field}: the features {", ".join(wanted)} may divide the images into '
            f'subgroups: data.subgroups={",".join(wanted)} reads them of all '
            f'{count:,} examples first'
        )
        return
    columns = _read(reader, wanted, count, 'subgroups') if wanted else {}
    line = subgroup_columns.add_of_columns(reader, setting, columns, field)
    if line:
        notes.say(line)


def _prepare_tfds(builder, field):
    if builder.is_prepared():
        formats = [f.value for f in builder.info.available_file_formats()]
        if 'array_record' not in formats:
            raise UserError(
                f'{field}: was prepared in {builder.data_dir} as {", ".join(formats)}, '
                'which cannot be read without TensorFlow; prepare it again with '
                "file_format='array_record'"
            )
        return
    import tensorflow_datasets as tfds

    where = (
        f'{field}: cannot be downloaded into {builder.data_dir}; prepare it on a '
        'machine with network access and set data.tfds_dir to its folder'
    )
    stock = type(builder).__module__.startswith('tensorflow_datasets.')
    downloads = os.path.join(builder._data_dir_root, 'downloads')
    if stock and not os.path.isdir(downloads) and not _has_network():
        raise UserError(where)  # TFDS itself would try again for minutes
    try:
        builder.download_and_prepare(file_format='array_record')
    except ImportError as error:
        raise UserError(
            f"{field}: preparing this set needs TensorFlow's image encoder, once: "
            "pip install 'flax_densenet[prepare]' and run again; training itself does "
            f'not use it ({error.name or error})'
        ) from error
    except (OSError, tfds.download.DownloadError) as error:
        raise UserError(f'{where} ({error})') from error


def _has_network():
    try:
        socket.getaddrinfo('storage.googleapis.com', 443)  # the cloud storage of TFDS
    except OSError:
        return False
    return True


def _only_key(features, kind, what, field):
    keys = [key for key, feature in features.items() if isinstance(feature, kind)]
    if len(keys) != 1:
        raise UserError(
            f'{field}: has {len(keys)} {what} features ({", ".join(features)}); only '
            'sets with one image and one class label can be used'
        )
    return keys[0]
