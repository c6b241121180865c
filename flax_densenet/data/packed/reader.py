"""Reads packed images: ArrayRecord shards with an index, as `pack` writes them.

The folder of a pack has

- `pack.json`, the manifest: classes, parts, and size and SHA-256 of all other files;
- `index.safetensors`: the label of each image, the name and a hash of its original
  file, and its group, so that labels, names and copies are known without reading
  images;
- `train-00000.array_record`, ...: a record per image, a msgpack map of the encoded
  image, label, name and hash, which other programs can read, too.

Images are in the source's order, those of the test part last. The index of a shard has
the offset of each image, so reading one takes a single read, while a separate file also
takes a walk through folders. ArrayRecord checks a hash of each record at each read.
"""

import bisect
import hashlib
import itertools
import os
from typing import Any

import numpy as np

from flax_densenet.data import readers
from flax_densenet.data.packed import manifest as manifest_lib
from flax_densenet.data.packed import records
from flax_densenet.data.packed.manifest import REMEDY
from flax_densenet.errors import UserError
from flax_densenet.system import paths

INDEX = 'index.safetensors'
_HASH = 16


def hash_file(content: bytes) -> bytes:
    """A hash of 16 bytes that identifies copies of an image file."""
    return hashlib.blake2b(content, digest_size=_HASH).digest()


def to_record(image: bytes, label, name: bytes, source: bytes) -> bytes:
    """Encodes an image as a record.

    Args:
      image: the encoded image.
      label: int32, or float32 `[L]`.
      name: path of the original file below the source's folder.
      source: `hash_file` of that file.
    """
    import msgpack

    label = int(label) if np.ndim(label) == 0 else np.asarray(label, '<f4').tobytes()
    return msgpack.packb(
        {'image': image, 'label': label, 'name': name, 'source': source}
    )


def from_record(record: bytes) -> dict[str, Any]:
    """Decodes a record: `image`, `label`, `name` and `source`, as in `to_record`.

    Raises:
      ValueError: it is not a valid record.
    """
    import msgpack

    try:
        fields = msgpack.unpackb(record)
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        raise ValueError('not a msgpack map') from error
    kinds: dict[str, Any] = {
        'image': bytes,
        'label': (int, bytes),
        'name': bytes,
        'source': bytes,
    }
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        raise ValueError('no image with its label, name and source')
    for name, kind in kinds.items():
        if not isinstance(fields[name], kind):
            raise ValueError(f'a {name} of the wrong type')
    if len(fields['source']) != _HASH:
        raise ValueError('a source of the wrong length')
    if isinstance(fields['label'], bytes):
        fields['label'] = np.frombuffer(fields['label'], '<f4')
    return fields


def subgroup_tensors(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """What divides the images, for the index of a pack.

    Args:
      name: of the column.
      values: numbers, or words, `[N]`.
    """
    if values.dtype.kind == 'f':
        return {f'subgroup_numbers {name}': values.astype(np.float64)}
    words, places = np.unique(values, return_inverse=True)
    text = '\0'.join(words.tolist()).encode()
    return {
        f'subgroup_words {name}': np.frombuffer(text, np.uint8),
        f'subgroup_places {name}': places.astype(np.int32),
    }


class PackedReader(readers.Reader):
    """The images of a pack: encoded bytes.

    It can be used by several threads and sent to other processes, which open their own
    files. It keeps the labels in memory (4 bytes per image), and for each open shard 8
    bytes per image and a buffer.

    Attributes:
      labels: int32 `[N]`, or float32 `[N, L]`.
      groups: int64 `[N]`, the group of each image; or None.
    """

    def __init__(self, folder: str, manifest: manifest_lib.Manifest):
        self.folder, self.manifest = folder, manifest
        self._ends = list(itertools.accumulate(s.count for s in manifest.shards))
        self._pool = records.Pool(
            [os.path.join(folder, s.file) for s in manifest.shards],
            [s.count for s in manifest.shards],
        )
        self._index = None
        self.labels = self._load_labels()
        self.groups = None
        if 'groups' in self._tensors().keys():  # noqa: SIM118
            self.groups = self._tensors().get_tensor('groups')
            self._check('groups', self.groups.dtype == np.int64)
        self.subgroups = self._load_subgroups()

    def _load_subgroups(self):
        """What divides the images, as `subgroup_tensors` made it."""
        tensors, found = self._tensors(), {}
        for key in tensors.keys():  # noqa: SIM118
            kind, _, name = key.partition(' ')
            if kind not in ('subgroup_numbers', 'subgroup_places') or not name:
                continue
            values = tensors.get_tensor(key)
            if kind == 'subgroup_numbers':
                self._check(key, values.dtype == np.float64)
                found[name] = values
            else:
                self._check(key, values.dtype == np.int32)
                words = tensors.get_tensor(f'subgroup_words {name}')
                words = bytes(words).decode(errors='replace').split('\0')
                self._check(key, (values >= 0).all() and (values < len(words)).all())
                found[name] = np.array(words)[values]
            self._check(key, len(found[name]) == len(self))
        return found

    def __len__(self):
        return self._ends[-1]

    def __getstate__(self):
        return self.__dict__ | {'_index': None}

    def __getitem__(self, index: int) -> bytes:
        return self.read(index)['image']

    def read(self, index: int) -> dict[str, Any]:
        """Reads the record of an image, see `from_record`.

        Raises:
          UserError: it cannot be read; names the shard.
        """
        index = int(index)
        number = bisect.bisect_right(self._ends, index)
        shard = self.manifest.shards[number]
        position = index - self._ends[number] + shard.count
        try:
            fields = from_record(self._pool.read(number, position))
            if not _same(fields['label'], self.labels[index]):
                raise ValueError(
                    'its label differs from the index: it belongs to another pack'
                )
        except (RuntimeError, ValueError, OSError) as error:
            reason = ' '.join(str(error).split())[:120]
            path = os.path.join(self.folder, shard.file)
            raise UserError(
                f'{path}: image {position} cannot be read ({reason}); the shard is '
                f'damaged: {REMEDY}, or set data.bad_images=skip'
            ) from error
        return fields

    def name(self, index: int) -> str:
        """Path of the original file of an image, below its source's folder."""
        tensors = self._tensors()
        first, end = tensors.get_slice('name_ends')[index : index + 2].tolist()
        names = tensors.get_slice('names')
        self._check('names', 0 <= first <= end <= names.get_shape()[0])
        return os.fsdecode(names[first:end].tobytes())

    def keys(self, indices) -> list[bytes]:
        names = self._tensors().get_tensor('names').tobytes()
        ends = self._tensors().get_tensor('name_ends')
        good = np.all(ends[1:] >= ends[:-1]) and ends[0] >= 0 and ends[-1] <= len(names)
        self._check('names', bool(good))
        indices = np.asarray(indices)
        places = zip(ends[indices].tolist(), ends[indices + 1].tolist(), strict=True)
        return [names[first:end] for first, end in places]

    def copies(self, indices) -> list[list[int]]:
        hashes = self._tensors().get_tensor('sources')
        self._check(
            'sources', hashes.dtype == np.uint8 and hashes.shape[1:] == (_HASH,)
        )
        indices = np.sort(np.asarray(indices, np.int64))
        keys = np.ascontiguousarray(hashes[indices]).view(f'V{_HASH}')[:, 0]
        _, which, counts = np.unique(keys, return_inverse=True, return_counts=True)
        order = np.argsort(which, kind='stable')
        ends = np.cumsum(counts)
        return sorted(
            indices[order[ends[i] - counts[i] : ends[i]]].tolist()
            for i in np.flatnonzero(counts > 1)
        )

    def _tensors(self):
        """The index file, which gives access to single tensors."""
        if self._index is None:
            import safetensors

            path = os.path.join(self.folder, INDEX)
            try:
                self._index = safetensors.safe_open(path, 'numpy')
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(f'{path} is damaged ({error}); {REMEDY}') from error
        return self._index

    def _load_labels(self):
        absent = {'labels', 'names', 'name_ends', 'sources'} - set(
            self._tensors().keys()
        )
        if absent:
            path = os.path.join(self.folder, INDEX)
            raise UserError(f'{path} has no {", ".join(sorted(absent))}; {REMEDY}')
        labels = self._tensors().get_tensor('labels')
        classes = len(self.manifest.class_names)
        if self.manifest.multi_label:
            good = labels.dtype == np.float32 and labels.shape[1:] == (classes,)
            good = good and bool(
                np.all(((labels >= 0) & (labels <= 1)) | (labels != labels))
            )
        else:
            good = labels.dtype == np.int32 and labels.shape[1:] == ()
            good = good and bool(np.all((labels >= 0) & (labels < classes)))
        self._check('labels', good)
        for name, count in (('labels', 0), ('sources', 0), ('name_ends', 1)):
            shape = self._tensors().get_slice(name).get_shape()
            self._check(name, shape[:1] == [len(self) + count])
        return labels

    def _check(self, name, good):
        if not good:
            path = os.path.join(self.folder, INDEX)
            raise UserError(f'{path}: its {name} do not belong to this pack; {REMEDY}')


def _same(label, expected):
    if isinstance(label, int):
        return label == expected
    return np.array_equal(label, expected, equal_nan=True)


def load(name: str) -> PackedReader:
    """Opens a pack: reads its manifest and index, checks the sizes of the shards.

    Raises:
      UserError: a file is missing, truncated or damaged. Damage inside a shard is found
        when the image is read, or by `writer.verify`.
    """
    records.check_installed()
    folder = paths.resolve(name, 'data.source=packed:')
    if not name or not os.path.isfile(os.path.join(folder, manifest_lib.FILE)):
        raise UserError(
            f'data.source=packed:{name}: there is no {manifest_lib.FILE}; give '
            'a folder that pack has completed'
        )
    manifest = manifest_lib.load(folder)
    for shard in manifest.shards:
        manifest_lib.check_size(os.path.join(folder, shard.file), shard.bytes)
    path = os.path.join(folder, INDEX)
    manifest_lib.check_size(path, manifest.index_bytes)
    if manifest_lib.sha256(path) != manifest.index_sha256:
        raise UserError(f'{path} is damaged (its SHA-256 differs); {REMEDY}')
    return PackedReader(folder, manifest)
