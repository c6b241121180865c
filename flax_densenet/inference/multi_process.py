"""Predictions by several processes: each takes some files, the first writes all rows.

The first process lists the files and hands out pieces of a batch's size in turn through
the cluster's store, so that what is listed is listed once, whatever changes meanwhile;
the others send back what they found. Nothing is exchanged between devices.
"""

import collections
import io
import itertools
import json
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np

from flax_densenet.distributed import processes
from flax_densenet.inference import predictor
from flax_densenet.inference.prediction import Prediction

# Pieces that each process has been given and has not sent back: two that its threads
# read, and one to go on with meanwhile.
_AHEAD = 4
_ARRAYS = ('probabilities', 'features', 'image', 'cam')


class MultiProcessPredictor:
    """A `predictor.Predictor` of this process's devices that works with the others.

    All that `outputs.run` asks of a model. On the first process; the others
    `serve` it.
    """

    def __init__(self, model: predictor.Predictor):
        self._model = model
        self.class_names = model.class_names
        self.feature_size = model.feature_size
        self.class_index = model.class_index

    def stream(
        self, files: Iterable[str], **options
    ) -> Generator[Prediction, None, None]:
        """As `predictor.Predictor.stream`, in the order of the files."""
        pieces = _Pieces(files, self._model.batch_size)
        own = self._model.stream(pieces.own(), **options)
        for number in itertools.count():
            size = pieces.size(number)
            if not size:
                return
            who = number % processes.count()
            if who == 0:
                yield from itertools.islice(own, size)
            else:
                yield from _unpack(processes.kv_get(f'rows/{number}'), self.class_names)


def serve(model: predictor.Predictor, **options):
    """Predicts the pieces that the first process gives to this one, until it ends.

    Args:
      **options: of `predictor.Predictor.stream`, as the first process has them.
    """
    sizes: collections.deque[tuple[int, int]] = collections.deque()

    def names():
        for number in itertools.count(processes.index(), processes.count()):
            piece = json.loads(processes.kv_get(f'names/{number}'))
            if not piece:
                return
            sizes.append((number, len(piece)))
            yield from piece

    found = model.stream(names(), **options)
    while rows := list(itertools.islice(found, 1)):
        number, size = sizes.popleft()
        rows += itertools.islice(found, size - 1)
        processes.kv_set(f'rows/{number}', _pack(rows))


class _Pieces:
    """Files in pieces, of which the first process keeps its own.

    Listed no further than is needed to keep all processes busy.
    """

    def __init__(self, files, batch_size):
        self._files = iter(files)
        self._batch_size = batch_size
        self._sizes, self._own = [], collections.deque()

    def size(self, number):
        """Files of a piece; 0 behind the last one."""
        while len(self._sizes) <= number + _AHEAD * processes.count():
            self._hand_out()
        return self._sizes[number]

    def own(self):
        """Names of the first process's pieces."""
        for number in itertools.count(0, processes.count()):
            while len(self._sizes) <= number:
                self._hand_out()
            if not self._sizes[number]:
                return
            yield from self._own.popleft()

    def _hand_out(self):
        number = len(self._sizes)
        piece = list(itertools.islice(self._files, self._batch_size))
        self._sizes.append(len(piece))
        if number % processes.count() == 0:
            self._own.append(piece)
        elif number < processes.count() or self._sizes[number - processes.count()]:
            # Names need not be UTF-8; JSON has their bytes as \\udcXX.
            processes.kv_set(f'names/{number}', json.dumps(piece).encode())


def _pack(rows: list[Prediction]) -> bytes:
    """Of a piece, without anything that would run when it is read."""
    plain: list[dict[str, Any]] = [
        {'path': row.path, 'error': row.error, 'cam_class': row.cam_class}
        for row in rows
    ]
    arrays: dict[str, Any] = {
        name: np.stack([getattr(row, name) for row in rows if row.error is None])
        for name in _ARRAYS
        if any(getattr(row, name) is not None for row in rows)
    }
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(plain).encode(), np.uint8)
    np.savez(buffer, plain=text, **arrays)
    return buffer.getvalue()


def _unpack(content, class_names):
    with np.load(io.BytesIO(content)) as found:
        plain = json.loads(found['plain'].tobytes())
        arrays = {name: iter(found[name]) for name in _ARRAYS if name in found}
    for row in plain:
        if row['error'] is not None:
            yield Prediction(row['path'], error=row['error'])
            continue
        values = {name: next(rows) for name, rows in arrays.items()}
        yield Prediction(
            row['path'],
            **values,
            class_names=class_names,
            cam_class=row['cam_class'],
        )
