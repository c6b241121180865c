"""Some of the images of a data source."""

import numpy as np

from flax_densenet.data import labeled_images


class Subset(labeled_images.Examples):
    """A subset of other examples, without copying their memory."""

    def __init__(self, examples: labeled_images.Examples, positions):
        super().__init__(
            examples.reader, examples.indices[positions], examples.preparation
        )
        self._examples = examples
        self._positions = np.asarray(positions, np.int64)

    def at_size(self, size):
        return Subset(self._examples.at_size(size), self._positions)

    def as_pictures(self):
        return Subset(self._examples.as_pictures(), self._positions)

    @property
    def labels(self):
        return self._examples.labels[self._positions]

    def __getitem__(self, position):
        return self._examples[int(self._positions[position])]
