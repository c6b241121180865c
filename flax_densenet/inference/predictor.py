"""Predictions for images that nobody has labeled.

    from flax_densenet import load_trained

    model = load_trained('ckpt/birds')
    for found in model.predict(['a.jpg', 'b.jpg']):
        print(found.path, found.label, found.probability)
    model.explain('a.jpg')[0].save('why.png')

Files are read by threads while the device computes, in a few batch sizes that are
compiled when they are first wanted (`compiled`); no more than a few batches are in
memory, however many files there are.
"""

import concurrent.futures
import difflib
import functools
import itertools
import os
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from flax_densenet.data import images
from flax_densenet.errors import UserError
from flax_densenet.inference import programs
from flax_densenet.inference.prediction import Explanation, Prediction
from flax_densenet.system import paths
from flax_densenet.weights import trained as trained_lib


class Predictor:
    """A trained model, compiled when it is used; may be used from many threads.

    Images are given as files' names, `pathlib` paths, files' bytes, Pillow images or
    uint8 arrays `[H, W]`, `[H, W, 1]` or `[H, W, 3]`, of any size: they are prepared as
    the model's own training prepared them.
    """

    def __init__(
        self,
        trained: trained_lib.Trained,
        batch_size: int = 32,
        *,
        path: str | None = None,
    ):
        """Compiles nothing yet.

        Args:
          trained: see `trained.load_trained`.
          batch_size: images that are computed at a time, at most.
          path: where it was loaded from.
        """
        if batch_size < 1:
            raise UserError(f'batch_size={batch_size} must be at least 1')
        metadata = trained.metadata
        self.trained = trained
        self.path = path
        self.batch_size = batch_size
        self.multi_label = bool(metadata.get('multi_label'))
        self.preparation = trained_lib.preparation_of(metadata)
        self.programs = programs.Programs(trained, batch_size)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Numbers where imported weights have no names."""
        names = self.trained.class_names
        return names or tuple(map(str, range(self.trained.module.num_classes)))

    @property
    def feature_size(self) -> int:
        """F, the number of pooled features."""
        return self.trained.variables['params']['classifier']['kernel'].shape[0]

    def class_index(self, name: str) -> int:
        """The place of a class; a UserError says which there are."""
        if name in self.class_names:
            return self.class_names.index(name)
        near = difflib.get_close_matches(name, self.class_names, 1)
        known = self.class_names[:20]
        raise UserError(
            f'class {name} is none of the model; '
            + (f'did you mean {near[0]}? ' if near else '')
            + f'There are {", ".join(known)}'
            + (', ...' if len(known) < len(self.class_names) else '')
        )

    def predict(self, files, *, errors: str = 'raise') -> list[Prediction]:
        """Predictions for one image or for some, in their order.

        Args:
          files: an image (see the class), or an iterable of them.
          errors: `raise`, or `return`: a file that cannot be read is a `Prediction`
            with its `error`.

        Raises:
          UserError: the first file that cannot be read, by name.
        """
        return self._collect(files, errors)

    def explain(
        self, files, class_name: str | None = None, *, errors: str = 'raise'
    ) -> list[Explanation | None]:
        """Grad-CAM of one image or of some: where they speak for a class.

        Args:
          class_name: the class; by default each image's most likely one.
          errors: as of `predict`; `return` gives None for such a file.

        Raises:
          UserError: no such class, or a file that cannot be read.
        """
        index = -1 if class_name is None else self.class_index(class_name)
        found = self._collect(files, errors, cams=True, cam_class=index)
        return [one.explanation for one in found]

    def features(self, files) -> np.ndarray:
        """Pooled features float32 `[N, F]` of one image or of some: the classifier's
        input.

        Raises:
          UserError: a file that cannot be read, by name.
        """
        found = self._collect(files, 'raise', features=True)
        rows = [one.features for one in found]
        return np.stack(rows) if rows else np.zeros((0, self.feature_size), np.float32)

    def _collect(self, files, errors, **options):
        if errors not in ('raise', 'return'):
            raise UserError(f'errors={errors} is not known; use raise or return')
        one = isinstance(files, str | os.PathLike | bytes | Image.Image)
        if one or (isinstance(files, np.ndarray) and files.ndim < 4):
            files = [files]
        found = []
        for prediction in self.stream(files, **options):
            if prediction.error and errors == 'raise':
                raise UserError(f'{prediction.path} {prediction.error}')
            found.append(prediction)
        return found

    def load(self, file, *, max_pixels: int | None = None) -> np.ndarray:
        """An image (see the class) as the model sees it, uint8 `[S, S, C]`.

        Args:
          max_pixels: of a file; larger images are refused before they are decoded.

        Raises:
          UserError: with the reason, where it is no image or is cut short.
        """
        if isinstance(file, np.ndarray):
            shape = file.shape
            channels = 1 if file.ndim == 2 else shape[-1]
            if file.dtype != np.uint8 or file.ndim not in (2, 3) or 0 in shape:
                raise UserError(
                    f'is an array of {file.dtype} {list(shape)}; give uint8, 0 to 255, '
                    '[H, W] or [H, W, 3]'
                )
            if channels not in (1, 3, 4):
                raise UserError(f'has {channels} channels; give 1 or 3')
            return images.prepare_array(file, self.preparation)
        if isinstance(file, Image.Image):
            return images.prepare_image(file, self.preparation)
        return images.load_image(file, self.preparation, max_pixels=max_pixels)

    def compute(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities `[n, num_classes]` and features `[n, F]` of uint8 images."""
        return self.programs(batch)[:2]

    def cams(self, batch: np.ndarray, classes=None) -> np.ndarray:
        """Grad-CAM maps `[n, h, w]`, of the most likely classes or of `classes`."""
        return self.programs(batch, -1 if classes is None else classes)[2]

    def stream(
        self,
        files: Iterable[Any],
        *,
        threads: int = 4,
        features: bool = False,
        cams: bool = False,
        cam_class: int = -1,
    ) -> Generator[Prediction, None, None]:
        """Predictions in the order of the files, each as soon as its batch is done.

        A file that cannot be read gives a `Prediction` with its error, and the others
        go on.

        Args:
          files: images (see the class); no more are taken than two batches ahead.
          threads: that read and decode.
          features: also pooled features.
          cams: also images and Grad-CAM maps, of `cam_class` or, where that is -1, of
            each image's most likely class.
        """
        for chunk in self._read(files, threads):
            good = [image for _, image in chunk if not isinstance(image, str)]
            found: Iterator[Any] = iter(())
            if good:
                batch = np.stack(good)
                parts = self.programs(batch, cam_class if cams else None)
                maps = itertools.repeat(None) if parts[2] is None else parts[2]
                found = zip(*parts[:2], good, maps, strict=False)
            for path, image in chunk:
                if isinstance(image, str):
                    yield Prediction(path, error=image)
                    continue
                row, feature, image, cam = next(found)
                if not np.isfinite(row).all():
                    yield Prediction(path, error='gets no number from this model (NaN)')
                    continue
                chosen = int(row.argmax()) if cam_class < 0 else cam_class
                yield Prediction(
                    path,
                    probabilities=row,
                    features=feature if features else None,
                    image=image if cams else None,
                    cam=cam,
                    class_names=self.class_names,
                    cam_class=chosen if cams else None,
                )

    def _read(self, files, threads):
        """Lists of (path, image or error), a batch ahead of the device."""
        files = enumerate(files)

        def read(index, file):
            named = isinstance(file, str | os.PathLike)
            path = os.fspath(file) if named else f'image {index}'
            try:
                return path, self.load(file)
            except UserError as error:
                return path, str(error)

        pool = concurrent.futures.ThreadPoolExecutor(threads)
        try:
            waiting = []
            while True:
                wanted = 2 * self.batch_size - len(waiting)
                for index, file in itertools.islice(files, wanted):
                    waiting.append(pool.submit(read, index, file))
                if not waiting:
                    return
                now, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
                yield [task.result() for task in now]
        finally:
            pool.shutdown(cancel_futures=True)


def load_trained(
    path, *, batch_size: int = 32, mesh=None, tta: str | None = None
) -> Predictor:
    """A trained model, ready to predict.

    Args:
      path: the folder of a run, whose best checkpoint is taken, or a file or folder of
        weights (see `weight_file.load`).
      batch_size: images that are computed at a time, at most.
      mesh: of the devices to use, by default all.
      tta: in place of the run's `data.tta`.

    Raises:
      UserError: there is no such file or folder, or it holds no trained model.
    """
    path = paths.resolve(path, 'the model ')
    if not os.path.exists(path):
        raise UserError(
            f'{path}: there is no such file or folder; give the folder of a run or a '
            'file of weights'
        )
    trained = trained_lib.load_trained(path, 'best', mesh=mesh)
    if tta is not None:
        trained = trained.with_tta(tta)
    return Predictor(trained, batch_size, path=path)
