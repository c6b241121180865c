"""Predicts in several processes; the first one writes all rows.

The first process lists the files once and distributes pieces of one batch each, in
turn, through the key-value store of the cluster. The others send back their
predictions. Devices exchange nothing.
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

# The number of pieces that a process has received but not sent back: two that its
# threads read, and more to continue with.
_AHEAD = 4
_ARRAYS = ('probabilities', 'features', 'image', 'cam')


class MultiProcessPredictor:
    """A `Predictor` on the first process that uses the predictors of all processes.

    It has everything that `outputs.run` needs. The other processes call `serve`.
    """

    def __init__(self, model: predictor.Predictor):
        self._model = model
        self.class_names = model.class_names
        self.feature_size = model.feature_size
        self.value_name = model.value_name
        self.class_index = model.class_index
        self.scores_unusual = model.scores_unusual
        self.check_coverage = model.check_coverage
        self.sets = model.sets
        self.thresholds = model.thresholds

    def stream(
        self, files: Iterable[str], **options
    ) -> Generator[Prediction, None, None]:
        """`Predictor.stream` over all processes, in the order of the files."""
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
                rows = processes.kv_get(f'rows/{number}')
                yield from _unpack(rows, self._model)


def serve(model: predictor.Predictor, **options):
    """Predicts the pieces that the first process sends to this one, until the end.

    Args:
      model: the predictor of this process.
      **options: options of `Predictor.stream`, the same as on the first process.
    """
    sizes: collections.deque[tuple[int, int]] = collections.deque()

    def names():
        for number in itertools.count(processes.index(), processes.count()):
            piece = json.loads(processes.kv_get(f'names/{number}'))
            if not piece:
                return
            sizes.append((number, len(piece)))
            yield from piece

    predictions = model.stream(names(), **options)
    while rows := list(itertools.islice(predictions, 1)):
        number, size = sizes.popleft()
        rows += itertools.islice(predictions, size - 1)
        processes.kv_set(f'rows/{number}', _pack(rows))


class _Pieces:
    """Divides the files into pieces and hands out those of other processes.

    Files are only listed as far as necessary to keep all processes busy.
    """

    def __init__(self, files, batch_size):
        self._files = iter(files)
        self._batch_size = batch_size
        self._sizes, self._own = [], collections.deque()

    def size(self, number):
        """The number of files in a piece; 0 after the last one."""
        while len(self._sizes) <= number + _AHEAD * processes.count():
            self._hand_out()
        return self._sizes[number]

    def own(self):
        """Yields the names in the pieces of the first process."""
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
            # Names need not be UTF-8; JSON escapes such bytes as \\udcXX.
            processes.kv_set(f'names/{number}', json.dumps(piece).encode())


def _pack(rows: list[Prediction]) -> bytes:
    """Encodes the predictions of a piece without pickle."""
    plain: list[dict[str, Any]] = [
        {
            'path': row.path,
            'error': row.error,
            'cam_class': row.cam_class,
            'is_probability': row.is_probability,
            'box': row.box,
            'method': row.method,
            'unusual': row.unusual,
        }
        for row in rows
    ]
    arrays: dict[str, Any] = {
        name: np.stack([getattr(row, name) for row in rows if row.error is None])
        for name in _ARRAYS
        if any(getattr(row, name) is not None for row in rows)
    }
    # Each original has its own size.
    for place, row in enumerate(rows):
        if row.original is not None:
            arrays[f'original{place}'] = row.original
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(plain).encode(), np.uint8)
    np.savez(buffer, plain=text, **arrays)
    return buffer.getvalue()


def _unpack(content, model):
    with np.load(io.BytesIO(content)) as saved:
        plain = json.loads(saved['plain'].tobytes())
        arrays = {name: iter(saved[name]) for name in _ARRAYS if name in saved}
        originals = [
            saved[name] if (name := f'original{place}') in saved else None
            for place in range(len(plain))
        ]
    for row, original in zip(plain, originals, strict=True):
        if row['error'] is not None:
            yield Prediction(row['path'], error=row['error'])
            continue
        values = {name: next(rows) for name, rows in arrays.items()}
        yield Prediction(
            row['path'],
            **values,
            class_names=model.class_names,
            cam_class=row['cam_class'],
            is_probability=row['is_probability'],
            original=original,
            box=row['box'] and tuple(row['box']),
            method=row['method'],
            unusual=row['unusual'],
            sets=model.sets,
            thresholds=model.thresholds,
        )
