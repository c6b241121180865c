"""Where labeled images come from: the loaders behind `dataset.load_source`.

A loader lists what there is (paths, arrays, records) and reads no more than it must;
decoding is left to `dataset.Examples`.
"""

import dataclasses
import os
import socket
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from flax_densenet.data import label_table, listing, tar
from flax_densenet.data.packed import reader as packed_reader
from flax_densenet.errors import UserError, printable


class Reader(Protocol):
    """Where images come from: `labels`, `[i]` (a file's path, bytes or an array)."""

    labels: np.ndarray

    def __getitem__(self, index: int) -> Any: ...

    def name(self, index: int) -> str: ...


@dataclasses.dataclass
class ArrayReader:
    """Images held as uint8 arrays `[N, H, W, 3]`."""

    images: np.ndarray
    labels: np.ndarray

    def __getitem__(self, index):
        return self.images[index]

    def name(self, index):
        return f'image {index}'


@dataclasses.dataclass
class FileReader:
    """Images held as files; labels int32 `[N]`, or float32 `[N, L]` (see `labels`).

    `root` is the folder that all of them are below.
    """

    paths: list[str]
    labels: np.ndarray
    root: str = ''

    def __getitem__(self, index):
        return self.paths[index]

    def name(self, index):
        return self.paths[index]

    def keys(self, indices):
        """Of each image what tells it from others, wherever the folder is: bytes."""
        below = (self.paths[i].removeprefix(self.root).lstrip('/') for i in indices)
        return [os.fsencode(path) for path in below]


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a loader of `SOURCES` finds; None in `test` asks for a split of `train`.

    Where labels are of two dimensions, an image can have several; `groups` then says
    by the image's index which ones must not be split.
    """

    reader: Reader
    class_names: list[str]
    train: np.ndarray
    test: np.ndarray | None
    skipped: tuple[str, ...] = ()
    groups: np.ndarray | None = None

    @property
    def multi_label(self) -> bool:
        """An image can have several labels."""
        labels = self.reader.labels
        return isinstance(labels, np.ndarray) and labels.ndim == 2


def _find_digits(name, **_):
    from sklearn import datasets  # 1 s, and only here

    if name:
        raise UserError(f'data.source=digits:{name}: digits takes no name; use digits')
    digits = datasets.load_digits()
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)
    reader = ArrayReader(np.repeat(gray[..., None], 3, -1), digits.target.astype('i4'))
    return Listing(reader, [str(n) for n in range(10)], np.arange(len(gray)), None)


def _find_folder(name, *, bad_images, labels, **_):
    root = os.path.expanduser(name)
    field = f'data.source=folder:{name}'
    if not name or not os.path.isdir(root):
        raise UserError(
            f'{field}: there is no such folder; give one that holds a folder of images '
            'for each class'
        )
    if labels:
        return _find_labeled(field, root, labels, bad_images)
    inside = listing.class_folders(root)
    train = next((name for name in tar.TRAIN if name in inside), None)
    test = next((name for name in tar.TEST if name in inside), None)
    parts = [root]
    if train is not None and test is not None:
        parts = [os.path.join(root, train), os.path.join(root, test)]
    names = _class_names(field, parts)
    paths, labels, first_test = _list_files(field, parts, names)
    bad = listing.check_files(paths, bad_images)
    good = np.array([i for i in range(len(paths)) if i not in bad], np.int64)
    counts = np.bincount(labels[good[good < first_test]], minlength=len(names))
    if not counts.all():
        raise UserError(
            f'{field}: no image of the folder {names[counts.argmin()]} can be read; '
            'mend them or remove it'
        )
    return Listing(
        FileReader(paths, labels, root),
        [printable(name) for name in names],
        good[good < first_test],
        good[good >= first_test] if len(parts) > 1 else None,
        tuple(f'{paths[i]} {reason}' for i, reason in bad.items()),
    )


def _class_names(field, parts):
    """The classes' folders, those of the training part."""
    names = listing.class_folders(parts[0])
    if len(names) < 2:
        found = f'one class only ({names[0]})' if names else 'no class folders'
        raise UserError(
            f'{field}: has {found}; make a folder of images for each of at least '
            'two classes'
        )
    for part in parts[1:]:
        extra = sorted(set(listing.class_folders(part)) - set(names))
        if extra:
            test, train = os.path.basename(part), os.path.basename(parts[0])
            raise UserError(
                f'{field}: class {extra[0]} is in {test} but not in {train}; add it '
                'there or remove it'
            )
    return names


def _list_files(field, parts, names):
    """Paths, labels int32 `[N]`, and the index of the first path of the test part."""
    paths, labels, sizes = [], [], []
    for part in parts:
        before = len(paths)
        for label, name in enumerate(names):
            folder = os.path.join(part, name)
            if part is not parts[0] and not os.path.isdir(folder):
                continue  # a class of which nothing is tested
            files = listing.image_files(folder)
            if not files and part is parts[0]:
                raise UserError(
                    f'{field}: the folder {name} holds no images; add some or remove it'
                )
            paths += files
            labels.append(np.full(len(files), label, np.int32))
        sizes.append(len(paths) - before)
    if not sizes[-1]:
        test = os.path.basename(parts[-1])
        raise UserError(f'{field}: the folder {test} holds no images')
    return paths, np.concatenate(labels), sizes[0]


def _find_labeled(field, root, table, bad_images):
    """The images of a folder that a table of labels names, by path or by name."""
    found = label_table.read(table)
    by_name, twice = {}, set()
    for path in listing.image_files(root):
        by_name[os.path.relpath(path, root)] = path
        name = os.path.basename(path)
        if by_name.setdefault(name, path) != path:
            twice.add(name)
    paths = [by_name.get(os.path.normpath(name)) for name in found.images]
    absent = [n for n, path in zip(found.images, paths, strict=True) if path is None]
    if absent and bad_images != 'skip':
        raise UserError(
            f'data.labels={table}: {len(absent)} of its {len(paths)} images are not in '
            f'{root}, the first is {absent[0]}; add them, or set data.bad_images=skip'
        )
    unclear = next((name for name in found.images if name in twice), None)
    if unclear:
        raise UserError(
            f'{field}: {unclear} is in several folders; name it in {table} by its path '
            f'below {root}'
        )
    there = [index for index, path in enumerate(paths) if path is not None]
    paths = [paths[index] for index in there]
    bad = listing.check_files(paths, bad_images)
    good = np.array([i for i in range(len(paths)) if i not in bad], np.int64)
    skipped = [f'{name} is not there' for name in absent]
    skipped += [f'{paths[i]} {reason}' for i, reason in bad.items()]
    print(
        f'data.labels={table}: {len(found.names)} labels '
        f'({printable(", ".join(found.names[:20]))}) of {len(good)} images'
        + (
            f'; not used: {printable(", ".join(found.ignored))}'
            if found.ignored
            else ''
        ),
        flush=True,
    )
    train, test = good, None
    if found.parts is not None:
        part = found.parts[there][good]
        train, test = good[part == 0], good[part == 1]
    return Listing(
        FileReader(paths, found.values[there], root),
        list(found.names),
        train,
        test,
        tuple(skipped),
        None if found.groups is None else found.groups[there],
    )


def _find_tar(name, *, bad_images, **_):
    reader, names, first_test = tar.load(name)
    bad = listing.check_files(reader, bad_images, name=reader.name)
    good = np.array([i for i in range(len(reader)) if i not in bad], np.int64)
    rest = None if first_test is None else good[good >= first_test]
    return Listing(
        reader,
        names,
        good if rest is None else good[good < first_test],
        rest,
        tuple(f'{reader.name(i)} {reason}' for i, reason in bad.items()),
    )


def _find_packed(name, **_):
    reader = packed_reader.load(name)
    count, rest = reader.manifest.count('train'), None
    if reader.manifest.has_test:
        rest = np.arange(count, len(reader))
    names = list(reader.manifest.class_names)
    return Listing(reader, names, np.arange(count), rest, groups=reader.groups)


@dataclasses.dataclass
class TfdsReader:
    """One or two splits of a TFDS set: encoded images, each read when asked for."""

    parts: list[Any]
    keys: tuple[str, str]
    names: list[str]
    labels: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        self.labels = _TfdsLabels(self)

    def example(self, index):
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)

    def __getitem__(self, index):
        raw = self.example(index)[self.keys[0]]
        return raw if isinstance(raw, (bytes, np.ndarray)) else bytes(raw)

    def name(self, index):
        for part, name in zip(self.parts, self.names, strict=True):
            if index < len(part):
                return f'{name}[{index}]'
            index -= len(part)
        raise IndexError(index)


class _TfdsLabels:
    """Labels of a `TfdsReader` by index or index array, read when asked for."""

    def __init__(self, reader):
        self._reader = reader

    def __getitem__(self, index):
        if np.ndim(index):
            return np.array([self[i] for i in index], np.int32)
        return np.int32(self._reader.example(int(index))[self._reader.keys[1]])


def _find_tfds(name, *, tfds_dir, tfds_train, **_):
    import tensorflow_datasets as tfds  # 1 s, and only here

    field = f'data.source=tfds:{name}'
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
                f'{", ".join(splits)}; name some of them once each, as train+extra'
            )
    test = [s for s in ('test', 'validation') if s in splits and s not in train][:1]
    names = train + test
    decoders = {image_key: tfds.decode.SkipDecoding()}
    parts = [builder.as_data_source(split=s, decoders=decoders) for s in names]
    reader = TfdsReader(parts, (image_key, label_key), names)
    count = sum(len(part) for part in parts[: len(train)])
    rest = count + np.arange(len(parts[-1])) if test else None
    return Listing(reader, features[label_key].names, np.arange(count), rest)


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
        f'{field}: cannot be downloaded into {builder.data_dir}; prepare it where '
        'there is a network and set data.tfds_dir to the folder that holds it'
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
        socket.getaddrinfo('storage.googleapis.com', 443)  # TFDS' own store
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


SOURCES: dict[str, Callable[..., Listing]] = {
    'digits': _find_digits,
    'folder': _find_folder,
    'packed': _find_packed,
    'tar': _find_tar,
    'tfds': _find_tfds,
}
