"""Predicts the classes of images.

    import flax_densenet

    model = flax_densenet.load('ckpt/birds')
    for prediction in model.predict(['a.jpg', 'b.jpg']):
        print(prediction.path, prediction.label, prediction.probability)
    model.explain('a.jpg')[0].save('why.png')

Threads read files while the device computes. Programs for a few batch sizes are
compiled when they are first needed (see `programs`). Only a few batches are in memory,
no matter how many files there are.
"""

import concurrent.futures
import difflib
import functools
import itertools
import logging
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from flax_densenet.data import image_formats, images
from flax_densenet.errors import UserError
from flax_densenet.inference import (
    decided,
    image_arguments,
    originals,
    perturbation,
    programs,
)
from flax_densenet.inference import explain as explain_lib
from flax_densenet.inference.prediction import Explanation, Prediction
from flax_densenet.models import layers
from flax_densenet.system import arguments, paths
from flax_densenet.weights import choices as choices_lib
from flax_densenet.weights import heads, published, weight_file
from flax_densenet.weights import precision as precision_lib
from flax_densenet.weights import trained as trained_lib

_LOGGER = logging.getLogger(__name__)
_DARK = 64  # of 255
# An image in any form that a `Predictor` reads.
ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


class Predictor(decided.Decided):
    """A trained model, compiled when it is used; safe to use from many threads.

    Images are file names, `pathlib` paths, the bytes of files, Pillow images, or arrays
    (numpy, JAX, ...) `[H, W]`, `[H, W, 1]` or `[H, W, 3]` of any size: uint8, or uint16
    for images with more than 8 bits. A model with 2, 4 or more channels takes arrays
    `[H, W, C]` and files with that number of channels. Images are prepared in the same
    way as in training.

    Attributes:
      trained: the model with its metadata.
      in_use: the model that computes: `trained`, possibly in another precision.
      batch_size: the largest number of images that are computed at once.
      multi_label: whether an image can have several labels.
      preparation: the preparation of images.
      programs: the compiled programs.
    """

    def __init__(
        self,
        trained: trained_lib.Trained,
        batch_size: int = 32,
        *,
        path: str | None = None,
        precision: str | None = None,
    ):
        """Creates a predictor; nothing is compiled yet.

        Args:
          trained: see `trained.load_trained`.
          batch_size: the largest number of images that are computed at once.
          path: where the model was loaded from.
          precision: `float32`, `bfloat16` or `auto`, see `weights.precision`; None
            works like `auto`, but is silent if nothing changes.

        Raises:
          UserError: the precision is unknown, or `batch_size` is below 1.
        """
        arguments.check_whole('batch_size', batch_size)
        self.trained = trained
        self.path = path
        self._told_of_dark = False
        self.batch_size = batch_size
        self.multi_label = trained.multi_label
        self.preparation = trained.preparation
        self.in_use = precision_lib.resolve(trained, path, precision)
        trained.notes.tell()
        self.programs = programs.Programs(self.in_use, batch_size)
        self.perturbations = perturbation.Perturbations(self.in_use)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """The class names; numbers if imported weights do not name their classes."""
        names = self.trained.class_names
        return names or tuple(map(str, range(self.trained.module.num_classes)))

    @property
    def value_name(self) -> str:
        """`probability`, or `value` for a model with `outputs='none'`."""
        return 'value' if self.trained.outputs == heads.NONE else 'probability'

    @property
    def feature_size(self) -> int:
        """The number of pooled features, F."""
        classifier = self.trained.variables['params']['classifier']
        # The classifier of an ensemble has an axis for its members.
        kernel = layers.linear_layers(classifier)[0]['kernel']
        return kernel.shape[-2] * self.trained.module.members

    def class_index(self, name: str) -> int:
        """The index of a class.

        Raises:
          UserError: the model has no such class; the message lists the classes.
        """
        if name in self.class_names:
            return self.class_names.index(name)
        near = difflib.get_close_matches(name, self.class_names, 1)
        known = self.class_names[:20]
        raise UserError(
            f'class {name} is none of the model; '
            + (f'did you mean {near[0]}? ' if near else '')
            + f'{"There" if near else "there"} are {", ".join(known)}'
            + (', ...' if len(known) < len(self.class_names) else '')
        )

    def predict(
        self, files: ImageLike | Iterable[ImageLike], *, errors: str = 'raise'
    ) -> list[Prediction]:
        """Predicts one image or several.

        Args:
          files: an image (see the class), or an iterable of images.
          errors: `raise`, or `return` to get a `Prediction` with an `error` for a file
            that cannot be read.

        Returns:
          Predictions in the order of the images.

        Raises:
          UserError: a file cannot be read; names the first one.
        """
        return self._collect(files, errors)

    def explain(
        self,
        files: ImageLike | Iterable[ImageLike],
        class_name: str | None = None,
        *,
        method: str = explain_lib.GRADCAM,
        steps: int | None = None,
        patches: int | None = None,
        errors: str = 'raise',
    ) -> list[Explanation | None]:
        """Explains the predictions for one image or several.

        Args:
          files: an image (see the class), or an iterable of images.
          class_name: the class to explain; by default the most likely class of each
            image.
          method: `gradcam`, `gradcam++`, `hirescam` or `layercam`, or the slower
            methods `occlusion` and `integrated_gradients`. All of them explain the
            logit of the class, without test-time augmentation.
          steps: for `integrated_gradients`, the number of points; by default 32.
          patches: for `occlusion`, the number of patches along the shorter side; by
            default 7.
          errors: see `predict`; with `return`, an unreadable file gives None.

        Returns:
          Explanations in the order of the images.

        Raises:
          UserError: the class or the method is unknown, or a file cannot be read.
        """
        index = -1 if class_name is None else self.class_index(class_name)
        how = explain_lib.make(method, steps=steps, patches=patches)
        predictions = self._collect(files, errors, cams=True, cam_class=index, how=how)
        return [one.explanation for one in predictions]

    def features(self, files: ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """Pooled features of images, the input of the classifier: float32 `[N, F]`.

        Args:
          files: an image (see the class), or an iterable of images.

        Raises:
          UserError: a file cannot be read.
        """
        predictions = self._collect(files, 'raise', features=True)
        rows = [one.features for one in predictions]
        return np.stack(rows) if rows else np.zeros((0, self.feature_size), np.float32)

    def _collect(self, files, errors, **options):
        if errors not in ('raise', 'return'):
            raise UserError(f'errors={errors} is not known; use raise or return')
        predictions = []
        for prediction in self.stream(image_arguments.as_list(files), **options):
            if prediction.error and errors == 'raise':
                raise UserError(f'{prediction.path} {prediction.error}')
            predictions.append(prediction)
        return predictions

    def load(self, file: ImageLike, *, max_pixels: int | None = None) -> np.ndarray:
        """Prepares an image (see the class) for the model: `[H, W, C]`.

        Args:
          file: the image.
          max_pixels: files with more pixels are refused before they are decoded.

        Raises:
          UserError: it is not an image or is truncated; the message gives the reason.
        """
        file = image_arguments.to_numpy(file)
        if isinstance(file, np.ndarray):
            image_arguments.check_array(file, self.preparation)
            return images.prepare_array(file, self.preparation)
        if isinstance(file, Image.Image):
            return images.prepare_image(file, self.preparation)
        image_arguments.check_file(file)
        image = images.load_image(file, self.preparation, max_pixels=max_pixels)
        if image.max(initial=0) < _DARK and not self._told_of_dark:
            self._tell_of_dark(file)
        return image

    def _tell_of_dark(self, file):
        """Warns once about 12-bit images and the like: black without a window."""
        if self.preparation.is_deep or self.preparation.window:
            return
        if image_formats.has_more_than_8_bits(file):
            self._told_of_dark = True
            name = 'an image' if isinstance(file, bytes) else os.fspath(file)
            _LOGGER.warning(
                f'warning: {name} has more than 8 bits but uses only a small part of '
                'their range, so the model sees it nearly black; for weights from '
                'other programs set data.window, such as '
                "--config.data.window='(0,4095)'; a model trained on such images finds "
                'its own'
            )

    def compute(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities `[N, num_classes]` and features `[N, F]` of prepared images.

        Args:
          batch: prepared images `[N, H, W, C]`.
        """
        return self.programs(batch)[:2]

    def cams(
        self,
        batch: np.ndarray,
        classes=None,
        how: explain_lib.Options = explain_lib.DEFAULT,
    ) -> np.ndarray:
        """Maps `[N, h, w]` for the most likely classes, or for `classes`."""
        classes = -1 if classes is None else classes
        maps = self.compute_maps(batch, classes, how).cams
        return np.stack(list(maps))

    def compute_maps(
        self, batch: np.ndarray, classes: Any, how: explain_lib.Options
    ) -> programs.Computed:
        """Computes the outputs for images, with a map for each image.

        Args:
          batch: prepared images `[N, H, W, C]`.
          classes: one class for all images, or one for each; -1 for the most likely.
          how: the method. A slow method computes each map when it is requested.
        """
        if not how.is_slow:
            return self.programs(batch, classes, how.method)
        found = self.programs(batch)
        classes = np.broadcast_to(classes, len(batch))
        chosen = np.where(classes < 0, found.probabilities.argmax(-1), classes).tolist()
        maps = (
            self.perturbations.map_of(image, of, how)
            for image, of in zip(batch, chosen, strict=True)
        )
        return found._replace(cams=maps)

    def stream(
        self,
        files: Iterable[Any],
        *,
        threads: int = 4,
        features: bool = False,
        cams: bool = False,
        cam_class: int = -1,
        how: explain_lib.Options = explain_lib.DEFAULT,
    ) -> Generator[Prediction, None, None]:
        """Yields predictions in the order of the files, batch by batch.

        A file that cannot be read gives a `Prediction` with an error.

        Args:
          files: images (see the class), read at most two batches ahead.
          threads: number of threads that read and decode.
          features: whether to return pooled features.
          cams: whether to return prepared images, originals and maps.
          cam_class: the class of the maps; -1 for the most likely class of each image.
          how: the method for the maps.
        """
        for chunk in self._read(files, threads, with_originals=cams):
            good = [image for _, image, _ in chunk if not isinstance(image, str)]
            results: Iterator[Any] = iter(())
            if good:
                batch = np.stack(good)
                if cams:
                    found = self.compute_maps(batch, cam_class, how)
                    maps: Iterable[Any] = found.cams
                else:
                    found, maps = self.programs(batch), itertools.repeat(None)
                scores = itertools.repeat(None)
                if found.unusual is not None:
                    scores = found.unusual.tolist()
                results = zip(*found[:2], good, maps, scores, strict=False)
            for path, image, (original, box) in chunk:
                if isinstance(image, str):
                    yield Prediction(path, error=image)
                    continue
                row, feature, image, cam, score = next(results)
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
                    is_probability=self.trained.outputs != heads.NONE,
                    original=original,
                    box=box,
                    method=how.describe(),
                    unusual=score,
                    sets=self.sets,
                    thresholds=self.thresholds,
                )

    def _read(self, files, threads, with_originals):
        """Yields batches of (path, image or error, (original, box)).

        It stays one batch ahead of the device.
        """
        files = enumerate(files)

        def read(index, file):
            named = isinstance(file, str | os.PathLike)
            path = os.fspath(file) if named else f'image {index}'
            shown = None, None
            try:
                file = image_arguments.to_numpy(file)
                image = self.load(file)
                if with_originals:
                    shown = originals.load(file, self.preparation)
                return path, image, shown
            except UserError as error:
                return path, str(error), shown

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
    path,
    *,
    batch_size: int = 32,
    mesh=None,
    tta: str | None = None,
    class_names: Sequence[str] | str | os.PathLike[str] | None = None,
    outputs: str | None = None,
    data: Mapping[str, Any] | None = None,
    precision: str | None = None,
    raw: bool = False,
    choices: choices_lib.Choices | None = None,
) -> Predictor:
    """Loads a trained model for prediction.

    Args:
      path: the folder of a run (its best checkpoint is used), a file or folder of
        weights, or a name of published weights (see `weight_file.load`).
      batch_size: the largest number of images that are computed at once.
      mesh: the devices to use; None for all.
      tta: test-time augmentation, instead of `data.tta` of the run.
      class_names: in the order of the outputs, or a file with the names. A network with
        one output takes two: negative and positive.
      outputs: `softmax`, `sigmoid` or `none`; by default as in the weights, or softmax.
      data: the preparation of images, for weights that do not define it: `mean`, `std`,
        `image_size`, `resize`, `crop_fraction`, `interpolation`, `channels`.
      precision: `float32`, `bfloat16` or `auto` (see `weights.precision`); None works
        like `auto`, but is silent if nothing changes.
      raw: leave out what was fitted after training: the calibration, thresholds and so
        on.
      choices: replaces `class_names`, `outputs`, `data` and `raw`.

    Raises:
      UserError: the file or folder does not exist, or has no trained model.
    """
    path = arguments.check_path('path', path, 'the folder of a run or weights')
    arguments.check_whole('batch_size', batch_size)
    if not published.is_name(path):
        path = paths.resolve(path, 'the model ')
    if not weight_file.is_weights(path) and not os.path.exists(path):
        raise UserError(
            f'{path}: there is no such file or folder; give the folder of a run, a '
            f'file of weights or the name of published ones{published.suggest(path)}'
        )
    precision_lib.check(precision)
    choices = choices or choices_lib.make(class_names, outputs, data, raw=raw)
    trained = trained_lib.load_trained(path, 'best', mesh=mesh, choices=choices)
    if tta is not None:
        trained = trained.with_tta(tta)
    return Predictor(trained, batch_size, path=path, precision=precision)
