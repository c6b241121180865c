"""Handles images that were readable when training started and no longer are.

With `data.bad_images=skip` they do not end the run: training uses the next readable
image instead, and evaluation leaves them out. Both are counted.
"""

import collections

import numpy as np

from flax_densenet.errors import UserError

# If this many in a row fail, it is the disk, not the files.
_MOST = 100


class SubstituteUnreadable:
    """Examples in which the next readable image replaces an unreadable one.

    They have a field `unread`: -1, or the position of the image that was replaced. The
    substitute depends only on which files are readable, so a run stays reproducible if
    its files do not change.
    """

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __repr__(self):
        return repr(self.examples)

    def __getitem__(self, position):
        """Raises `UserError` if a hundred images in a row cannot be read."""
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
            'the same command again, which resumes from the last checkpoint'
        )


class CountedBatches:
    """An iterator of batches of `SubstituteUnreadable` that counts the replaced images.

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
    """The line to print at the end of an epoch; empty if everything was read.

    Args:
      unread: positions in `examples`, from `CountedBatches`.
      what: what happened instead, such as `left out`.
    """
    if not unread:
        return ''
    return (
        f'{len(unread)} images cannot be read any more, the first is '
        f'{examples.name(min(unread))}; {what}'
    )
