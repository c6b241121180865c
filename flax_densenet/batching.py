"""Images of several clients, computed together.

While the device computes, images gather in the next batch; an image that finds the
device idle waits a few milliseconds for others. A few shapes are compiled beforehand,
so that a single image is not computed as a batch of sixteen.

>>> split(9, (1, 4, 16))  # one after the other, in these shapes
[4, 4, 1]
>>> split(13, (1, 4, 16))  # filled up, where that costs a third at most
[16]
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from flax_densenet import predict

# On a CPU sixteen take sixteen times as long as one, on a GPU hardly longer.
SHAPES = (1, 4, 16)
WAIT_S = 0.004
# `Answer.explained` is of the most likely class.
MOST_LIKELY = -1


def split(count: int, shapes: Sequence[int]) -> list[int]:
    """The shapes in which `count` images are computed.

    Args:
      count: of images, at least 1.
      shapes: compiled batch sizes, ascending, the first of them 1.
    """
    chosen = []
    while count > 0:
        chosen.append(max(shape for shape in shapes if 3 * shape <= 4 * count))
        count -= chosen[-1]
    return chosen


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model says of one image.

    Attributes:
      probabilities: float32 `[num_classes]`.
      cam: Grad-CAM `[h, w]`, where asked for.
    """

    probabilities: np.ndarray
    cam: np.ndarray | None = None


@dataclasses.dataclass
class _Batch:
    """Images that wait; `classes` has None where no map is wanted."""

    images: list[np.ndarray] = dataclasses.field(default_factory=list)
    classes: list[int | None] = dataclasses.field(default_factory=list)
    full: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    answers: asyncio.Task | None = None


class Batcher:
    """Computes what the tasks of one event loop ask for, on one thread of its own.

    How many images wait is bounded by who calls: each call of `predict` holds one.
    """

    def __init__(
        self,
        trained,
        *,
        shapes: Sequence[int],
        wait_s: float = WAIT_S,
        on_batch: Callable[[int], None] = lambda count: None,
    ):
        """Compiles nothing yet.

        Args:
          trained: an `evaluate.Trained`.
          shapes: batch sizes to compile, as SHAPES.
          wait_s: seconds that an image waits for others while the device is idle.
          on_batch: called with the number of images of each batch before it is
            computed, on the thread of the event loop.
        """
        self.ready = False
        self.predictor = predict.Predictor(trained, shapes[0])
        self._predictors = {
            size: predict.Predictor(trained, size) for size in shapes[1:]
        } | {shapes[0]: self.predictor}
        self._shapes = tuple(shapes)
        self._wait_s = wait_s
        self._on_batch = on_batch
        self._open: _Batch | None = None
        self._device_is_free = asyncio.Lock()
        self._device = concurrent.futures.ThreadPoolExecutor(1, 'device')

    async def warm_up(self):
        """Compiles every shape; `ready` is True afterwards."""
        metadata = self.predictor.trained.metadata
        side = metadata['image_size']
        image = np.zeros((side, side, len(metadata['mean'])), np.uint8)
        for size, predictor in sorted(self._predictors.items()):
            batch = np.repeat(image[None], size, 0)
            await self._on_device(predictor.compute, batch)
            await self._on_device(predictor.cams, batch)
        self.ready = True

    async def predict(self, image: np.ndarray, *, explain: int | None = None) -> Answer:
        """What the model says of one image, computed with those that wait.

        Args:
          image: uint8 `[S, S, C]`, as `predict.Predictor.load` gives it.
          explain: index of the class whose map is wanted, `MOST_LIKELY`, or None.
        """
        batch = self._open
        if batch is None:
            batch = self._open = _Batch()
            batch.answers = asyncio.create_task(self._run(batch))
        place = len(batch.images)
        batch.images.append(image)
        batch.classes.append(explain)
        if len(batch.images) == self._shapes[-1]:
            batch.full.set()
            self._open = None
        # Shielded, since a client that leaves must not end the others' batch.
        return (await asyncio.shield(batch.answers))[place]

    def close(self):
        """Ends the thread once it has computed what it is at."""
        self._device.shutdown(wait=False, cancel_futures=True)

    async def _run(self, batch):
        async with self._device_is_free:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait_s):
                    await batch.full.wait()
            if self._open is batch:
                self._open = None
            self._on_batch(len(batch.images))
            return await self._on_device(self._compute, batch)

    async def _on_device(self, function, *args):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._device, function, *args)

    def _compute(self, batch):
        probabilities = self._in_shapes(
            lambda predictor, images, _: predictor.compute(images)[0],
            batch.images,
            [MOST_LIKELY] * len(batch.images),
        )
        wanted = [i for i, of in enumerate(batch.classes) if of is not None]
        maps = self._in_shapes(
            lambda predictor, images, classes: predictor.cams(images, classes),
            [batch.images[i] for i in wanted],
            [batch.classes[i] for i in wanted],
        )
        cams = dict(zip(wanted, maps, strict=True))
        return [Answer(row, cams.get(i)) for i, row in enumerate(probabilities)]

    def _in_shapes(self, function, images, classes):
        """The rows of `function(predictor, images, classes)`, shape after shape."""
        rows, start = [], 0
        for size in split(len(images), self._shapes):
            part = slice(start, start + size)
            rows += list(
                function(self._predictors[size], np.stack(images[part]), classes[part])
            )
            start += size
        return rows
