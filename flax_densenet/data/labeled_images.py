"""Labeled images with random access, decoded when they are needed.

`dataset` makes `Examples` of the parts of a source; `pipeline` makes batches of them.
"""

import dataclasses
import functools

import numpy as np

from flax_densenet.data import images, readers
from flax_densenet.errors import UserError
from flax_densenet.settings import sizes


class Examples:
    """A random-access sequence of `{'image': uint8 [H, W, C], 'label': int32}`.

    Images are uint16 if the preparation keeps more than 8 bits. If images have several
    labels, `label` is float32 `[L]` of 0, 1, NaN (unknown) and, between 0 and 1, soft
    targets (see `soft_labels`).
    """

    def __init__(
        self, reader: readers.Reader, indices, preparation: images.Preparation
    ):
        self.reader = reader
        self.indices = np.asarray(indices, np.int64)
        self.preparation = preparation
        self._pictures = False

    @property
    def image_size(self) -> sizes.Size:
        """In pixels."""
        return self.preparation.size

    def at_size(self, size: sizes.Size) -> 'Examples':
        """The same images at another size."""
        if size == self.image_size:
            return self
        preparation = dataclasses.replace(self.preparation, size=size)
        return Examples(self.reader, self.indices, preparation)

    def as_pictures(self) -> 'Examples':
        """The same examples, with `image` from `images.load_picture`.

        Random crops then have the detail of the photograph and are resized once.
        Examples that are cached in memory stay resized.
        """
        examples = Examples(self.reader, self.indices, self.preparation)
        examples._pictures = True
        return examples

    def __len__(self):
        return len(self.indices)

    def __repr__(self):
        return f'{type(self.reader).__name__} of {len(self)} images'

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 `[N]` or float32 `[N, L]`; decodes no image."""
        return self.reader.labels[self.indices]

    @property
    def groups(self) -> np.ndarray | None:
        """int64 `[N]`: the group of each image (patient, site); None if unknown."""
        groups = self.reader.groups
        return None if groups is None else groups[self.indices]

    @property
    def subgroups(self) -> dict[str, np.ndarray]:
        """Further columns of the images, `[N]` by name: see `subgroup_columns.find`."""
        return {name: v[self.indices] for name, v in self.reader.subgroups.items()}

    def name(self, position: int) -> str:
        """The file of an example, or its position in the data set."""
        return self.reader.name(int(self.indices[position]))

    def __getitem__(self, position):
        index = int(self.indices[position])
        raw = self.reader[index]
        try:
            image = self._prepare(raw)
        except UserError as error:
            raise UserError(
                f'{self.reader.name(index)} {error}: fix or remove it, or set '
                'data.bad_images=skip'
            ) from error
        return {'image': image, 'label': self.reader.labels[index]}

    def _prepare(self, raw):
        if isinstance(raw, np.ndarray):
            if self._pictures:
                return images.to_picture(raw, self.preparation)
            return images.prepare_array(raw, self.preparation)
        load = images.load_picture if self._pictures else images.load_image
        return load(raw, self.preparation)


class CachedExamples(Examples):
    """Examples that keep decoded and resized images in memory."""

    def __init__(self, examples: Examples):
        super().__init__(examples.reader, examples.indices, examples.preparation)
        shape = len(self), *self.preparation.shape, self.preparation.channels
        self._images = np.empty(shape, self.preparation.dtype)
        self._known = np.zeros(len(self), bool)

    def at_size(self, size):
        """The same examples at another size, with their own cache."""
        examples = super().at_size(size)
        return self if examples is self else CachedExamples(examples)

    def as_pictures(self):
        return self

    def __getitem__(self, position):
        if not self._known[position]:
            self._images[position] = super().__getitem__(position)['image']
            self._known[position] = True
        label = self.reader.labels[self.indices[position]]
        return {'image': self._images[position], 'label': label}


class Numbered:
    """Examples, or their features, with their `position`."""

    def __init__(self, examples):
        self.examples = examples

    @property
    def preparation(self):
        return self.examples.preparation

    @property
    def labels(self):
        return self.examples.labels

    def at_size(self, size):
        return Numbered(self.examples.at_size(size))

    def as_pictures(self):
        return Numbered(self.examples.as_pictures())

    def name(self, position):
        return self.examples.name(position)

    def __len__(self):
        return len(self.examples)

    def __repr__(self):
        return repr(self.examples)

    def __getitem__(self, position):
        return self.examples[position] | {'position': np.int32(position)}


class Relabeled(Examples):
    """Examples whose label `i` becomes `new_labels[i]`.

    If images have several labels, label `new_labels[i]` is the old label `i`, and the
    others are unknown.
    """

    def __init__(self, examples: Examples, new_labels, count: int):
        super().__init__(examples.reader, examples.indices, examples.preparation)
        self._examples = examples
        self._new_labels = np.asarray(new_labels, np.int32)
        self._count = count

    def at_size(self, size):
        return Relabeled(self._examples.at_size(size), self._new_labels, self._count)

    def as_pictures(self):
        return Relabeled(self._examples.as_pictures(), self._new_labels, self._count)

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


def join(*parts: Examples) -> Examples:
    """The examples of some parts of a source, in the source's order."""
    indices = np.sort(np.concatenate([part.indices for part in parts]))
    return Examples(parts[0].reader, indices, parts[0].preparation)
