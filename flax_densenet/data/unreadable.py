"""Images that were there when training started and cannot be read later on.

With `data.bad_images=skip` such a one does not end the run: in training the next image
that can be read stands for it, in evaluation it is left out. Both are counted.
"""

import collections

import numpy as np

from flax_densenet.errors import UserError

# After so many in a row it is the disk, not the files.
_MOST = 100


class SubstituteUnreadable:
    """Examples with `unread`: -1, or the position of the one that this stands for.

    Which one stands in depends on what can be read, on nothing else, so a run stays
    reproducible as far as its files do.
    """

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __repr__(self):
        return repr(self.examples)

    def __getitem__(self, position):
        """Raises UserError where a hundred images in a row cannot be read."""
        count = len(self.examples)
        for step in range(min(_MOST, count)):
            try:
                example = self.examples[(position + step) % count]
            except UserError:
                continue
            return example | {'unread': np.int32(position if step else -1)}
        raise UserError(
            f'{self.examples.name(position)} and the {min(_MOST, count) - 1} images '
            'after it cannot be read any more; make their folder readable and run '
            'the same command again, which goes on from the last checkpoint'
        )


class CountedBatches:
    """An iterator of batches of `SubstituteUnreadable` that keeps account of them.

    Attributes:
      unread: how often each position could not be read.
    """

    def __init__(self, iterator):
        self._iterator = iterator
        self.unread = collections.Counter()

    def __iter__(self):
        return self

    def __next__(self):
        batch = dict(next(self._iterator))
        positions = batch.pop('unread')
        self.unread.update(positions[positions >= 0].tolist())
        return batch

    def close(self):
        self._iterator.close()


def describe(unread, examples, what: str) -> str:
    """The line for the end of an epoch; empty where everything was read.

    Args:
      unread: positions in `examples`, as of `CountedBatches`.
      what: became of them.
    """
    if not unread:
        return ''
    return (
        f'{len(unread)} images cannot be read any more, the first is '
        f'{examples.name(min(unread))}; {what}'
    )
