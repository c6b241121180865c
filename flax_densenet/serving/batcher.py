"""Batches images of several clients.

While the device computes, images gather in the next batch; if the device is idle, an
image waits a few milliseconds for others. A few batch sizes are compiled in advance, so
that a single image is not computed as a batch of sixteen.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from flax_densenet.inference import explain as explain_lib
from flax_densenet.inference import predictor

# Maximum number of images computed at a time.
BATCH_SIZE = 16
WAIT_S = 0.004
# Stands for the most likely class in `BatchResult.explained`.
MOST_LIKELY = -1


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """The outputs for one image.

    Attributes:
      probabilities: float32 `[num_classes]`.
      cam: map `[h, w]`, if requested.
      unusual: score of how unlike the training images it is; None if the model has no
        score.
    """

    probabilities: np.ndarray
    cam: np.ndarray | None = None
    unusual: float | None = None


@dataclasses.dataclass
class _Batch:
    """Waiting images; `classes` has None if no map is requested."""

    images: list[np.ndarray] = dataclasses.field(default_factory=list)
    classes: list[int | None] = dataclasses.field(default_factory=list)
    how: list[explain_lib.Options] = dataclasses.field(default_factory=list)
    full: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    answers: asyncio.Task | None = None


class Batcher:
    """Computes predictions for the tasks of one event loop, on a separate thread.

    The caller bounds the number of waiting images: each call of `predict` holds one.
    """

    def __init__(
        self,
        trained,
        *,
        batch_size: int,
        wait_s: float = WAIT_S,
        on_batch: Callable[[int], None] = lambda count: None,
        explain: Sequence[explain_lib.Options] = (explain_lib.DEFAULT,),
    ):
        """Compiles nothing yet.

        Args:
          trained: a `trained.Trained`.
          batch_size: maximum number of images computed at a time, as BATCH_SIZE.
          wait_s: seconds that an image waits for others while the device is idle.
          on_batch: called with the number of images of each batch before it is
            computed, on the thread of the event loop.
          explain: the methods for heat maps, the default first.
        """
        self.ready = False
        self._explain = tuple(explain)
        self.predictor = predictor.Predictor(trained, batch_size)
        self._wait_s = wait_s
        self._on_batch = on_batch
        self._open: _Batch | None = None
        self._device_is_free = asyncio.Lock()
        self._device = concurrent.futures.ThreadPoolExecutor(1, 'device')

    async def warm_up(self):
        """Compiles every batch size; `ready` is True afterwards.

        Methods other than the default are compiled for one image.
        """
        preparation = self.predictor.preparation
        shape = (1, *preparation.shape, preparation.channels)
        image = np.zeros(shape, preparation.dtype)
        programs = self.predictor.programs
        usual, *others = self._explain
        for size in programs.sizes:
            batch = np.repeat(image, size, 0)
            await self._on_device(programs.compile, size)
            # The first run allocates memory that later ones reuse.
            await self._on_device(programs, batch)
            if not usual.is_slow:
                await self._on_device(programs.compile, size, usual.method)
                await self._on_device(programs, batch, MOST_LIKELY, usual.method)
        for how in (usual, *others) if usual.is_slow else others:
            await self._on_device(self.predictor.cams, image, MOST_LIKELY, how)
        self.ready = True

    async def predict(
        self,
        image: np.ndarray,
        *,
        explain: int | None = None,
        how: explain_lib.Options = explain_lib.DEFAULT,
    ) -> BatchResult:
        """The outputs for one image, computed together with other waiting images.

        Args:
          image: uint8 `[H, W, C]`, from `predict.Predictor.load`.
          explain: index of the class for the map, `MOST_LIKELY`, or None.
          how: the method for the map.
        """
        batch = self._open
        if batch is None:
            batch = self._open = _Batch()
            batch.answers = asyncio.create_task(self._run(batch))
        place = len(batch.images)
        batch.images.append(image)
        batch.classes.append(explain)
        batch.how.append(how)
        if len(batch.images) == self.predictor.batch_size:
            batch.full.set()
            self._open = None
        # Shielded, since a client that disconnects must not end the batch of others.
        answers = batch.answers
        assert answers is not None  # set when the batch was made
        return (await asyncio.shield(answers))[place]

    def close(self):
        """Ends the thread after its current batch."""
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
        """Separates images with and without a map, so the others need not wait."""
        answers = [None] * len(batch.images)
        kinds = [
            None if of is None else how
            for of, how in zip(batch.classes, batch.how, strict=True)
        ]
        for kind in dict.fromkeys(kinds):
            places = [place for place, other in enumerate(kinds) if other == kind]
            images = np.stack([batch.images[place] for place in places])
            if kind is None:
                found = self.predictor.programs(images)
            else:
                classes = [batch.classes[place] for place in places]
                found = self._compute_maps(images, classes, kind)
            cams = itertools.repeat(None) if found.cams is None else found.cams
            for row, (place, cam) in enumerate(zip(places, cams, strict=False)):
                answers[place] = BatchResult(
                    found.probabilities[row],
                    cam,
                    None if found.unusual is None else float(found.unusual[row]),
                )
        return answers

    def _compute_maps(self, images, classes, how):
        """Computes single images for methods that are compiled for one image."""
        if how.is_slow or how == self._explain[0]:
            return self.predictor.compute_maps(images, classes, how)
        parts = [
            self.predictor.compute_maps(images[place : place + 1], of, how)
            for place, of in enumerate(classes)
        ]
        return type(parts[0])(
            *(
                None if one[0] is None else np.concatenate(one)
                for one in zip(*parts, strict=True)
            )
        )
