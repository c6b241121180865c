"""Predictions for image files that nobody has labelled.

Files are read by threads while the device computes; a batch always has the same shape,
so there is one compilation, and no more than a few batches are in memory, however many
files there are.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_densenet import evaluate, explain, images
from flax_densenet.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
      path: of the file, as it was given.
      probabilities: float32 `[num_classes]`; None where the file is no image.
      error: why the file could not be read, else None.
      features: pooled features `[F]`, where asked for.
      image: uint8 `[S, S, C]`, as the model saw it, where a map was asked for.
      cam: Grad-CAM `[h, w]` of the most likely class, where asked for.
    """

    path: str
    probabilities: np.ndarray | None = None
    error: str | None = None
    features: np.ndarray | None = None
    image: np.ndarray | None = None
    cam: np.ndarray | None = None


@functools.partial(jax.jit, static_argnames=('module', 'mean', 'std', 'multi_label'))
def _compute(variables, batch, *, module, mean, std, multi_label):
    """Probabilities and pooled features of a batch of uint8 images."""
    batch = evaluate.normalise(batch, mean=mean, std=std)
    maps = module.apply(variables, batch, method='features')
    logits = module.apply(variables, maps, method='head')
    pooled = jax.nn.relu(maps).astype(jnp.float32).mean((1, 2))
    of = jax.nn.sigmoid if multi_label else jax.nn.softmax
    return of(logits.astype(jnp.float32)), pooled


class Predictor:
    """A trained model with one compiled batch shape; may be used from many threads."""

    def __init__(self, trained: evaluate.Trained, batch_size: int = 32):
        """Compiles nothing yet.

        Args:
          trained: see `evaluate.load_trained`.
          batch_size: images of each call to the device; smaller calls are filled up.
        """
        if batch_size < 1:
            raise UserError(f'batch_size={batch_size} must be at least 1')
        metadata = trained.metadata
        self.trained = trained
        self.batch_size = batch_size
        self.multi_label = bool(metadata.get('multi_label'))
        self.preparation = evaluate.preparation_of(metadata)
        self._options = {
            'module': trained.module,
            'mean': tuple(metadata['mean']),
            'std': tuple(metadata['std']),
        }

    @property
    def class_names(self) -> tuple[str, ...]:
        """Numbers where imported weights have no names."""
        names = self.trained.class_names
        return names or tuple(map(str, range(self.trained.module.num_classes)))

    def load(self, file, *, max_pixels: int | None = None) -> np.ndarray:
        """An image file (path or bytes) as the model sees it, uint8 `[S, S, C]`."""
        return images.load_image(file, self.preparation, max_pixels=max_pixels)

    def compute(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities `[n, num_classes]` and features `[n, F]` of uint8 images."""
        probabilities, features = _compute(
            self.trained.variables,
            self._fill(batch),
            multi_label=self.multi_label,
            **self._options,
        )
        count = len(batch)
        return np.asarray(probabilities)[:count], np.asarray(features)[:count]

    def cams(self, batch: np.ndarray, classes=None) -> np.ndarray:
        """Grad-CAM maps `[n, h, w]`, of the most likely classes or of `classes`."""
        count = len(batch)
        chosen = np.full(self.batch_size, -1, np.int32)
        if classes is not None:
            chosen[:count] = classes
        options = dict(self._options)
        module = options.pop('module')
        normalised = evaluate.normalise(self._fill(batch), **options)
        _, cams = explain.grad_cam(
            self.trained.variables, normalised, chosen, module=module
        )
        return np.asarray(cams)[:count]

    def _fill(self, batch):
        if len(batch) > self.batch_size:
            raise ValueError(f'{len(batch)} images, batches have {self.batch_size}')
        missing = self.batch_size - len(batch)
        return np.concatenate([batch, np.repeat(batch[-1:], missing, 0)])

    def stream(
        self,
        files: Iterable[str],
        *,
        threads: int = 4,
        features: bool = False,
        cams: bool = False,
    ) -> Iterator[Prediction]:
        """Predictions in the order of the files, each as soon as its batch is done.

        A file that cannot be read gives a `Prediction` with its error, and the others
        go on.
        """
        for chunk in self._read(files, threads):
            good = [image for _, image in chunk if not isinstance(image, str)]
            found: Iterator[Any] = iter(())
            if good:
                batch = np.stack(good)
                probabilities, pooled = self.compute(batch)
                maps = self.cams(batch) if cams else itertools.repeat(None)
                found = zip(probabilities, pooled, good, maps, strict=False)
            for path, image in chunk:
                if isinstance(image, str):
                    yield Prediction(path, error=image)
                    continue
                row, feature, image, cam = next(found)
                yield Prediction(
                    path,
                    probabilities=row,
                    features=feature if features else None,
                    image=image if cams else None,
                    cam=cam,
                )

    def _read(self, files, threads):
        """Lists of (path, image or error), a batch ahead of the device."""
        files = iter(files)

        def read(path):
            try:
                return path, self.load(path)
            except UserError as error:
                return path, str(error)

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            waiting = []
            while True:
                wanted = 2 * self.batch_size - len(waiting)
                for path in itertools.islice(files, wanted):
                    waiting.append(pool.submit(read, path))
                if not waiting:
                    return
                now, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
                yield [task.result() for task in now]
