"""The prediction for an image: probabilities, features and an explanation."""

import dataclasses
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from flax_densenet.errors import UserError
from flax_densenet.inference import overlay as overlay_lib
from flax_densenet.weights import conformal
from flax_densenet.weights import thresholds as thresholds_lib

NO_SETS = (
    'the model has no sets of classes, which are fitted after training; to add them, '
    'run calibrate'
)


class ClassProbability(NamedTuple):
    """A class and its probability, from 0 to 1."""

    class_name: str
    probability: float


def _format(value, is_probability):
    return f'{value:.1%}' if is_probability else f'{value:.4g}'


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """The parts of an image that support a class; notebooks draw it.

    Attributes:
      path: path of the file, as given.
      class_name: the class.
      probability: probability of the class, from 0 to 1.
      image: uint8 `[H, W, C]`, as prepared for the model.
      is_probability: False if `probability` is a raw output of the model.
      cam: float32 `[h, w]`, not negative: how much each position in the part that the
        model sees supports the class.
      original: uint8 `[H, W, 3]`, the image before it was cropped and resized, with no
        side above 768 pixels; None if it was not kept.
      box: the part of `original` that the model sees, in pixels: left, top, right,
        bottom.
      method: name of the method, with its options.
    """

    path: str
    class_name: str
    probability: float
    image: np.ndarray
    cam: np.ndarray
    is_probability: bool = True
    original: np.ndarray | None = None
    box: tuple[float, float, float, float] | None = None
    method: str = 'Grad-CAM'

    @property
    def overlay(self) -> np.ndarray:
        """The map drawn over the prepared image, uint8 `[H, W, 3]`."""
        return overlay_lib.overlay(self.image, self.cam)

    @property
    def picture(self) -> Image.Image:
        """The original next to its map, with the class and probability as caption.

        Parts that the model does not see are darkened.
        """
        caption = f'{self.class_name}  {_format(self.probability, self.is_probability)}'
        image = self.image if self.original is None else self.original
        box = None if self.original is None else self.box
        if self.method != 'Grad-CAM':
            caption += f'  ({self.method})'
        return overlay_lib.picture(image, self.cam, caption, box=box)

    def save(self, path):
        """Writes the picture; the extension chooses the format (`.jpg`, `.png`)."""
        self.picture.save(path)

    def __repr__(self):
        value = _format(self.probability, self.is_probability)
        return f'<{self.path!r}: {self.class_name} {value}, explained>'

    def _repr_png_(self):
        file = io.BytesIO()
        self.picture.save(file, 'PNG')
        return file.getvalue()


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one image.

    Attributes:
      path: path of the file, as given; `image 3` for the fourth of several images given
        as pixels or bytes.
      probabilities: float32 `[num_classes]`; None if the file could not be read.
      error: why the file could not be read, or None.
      features: pooled features `[F]` if requested.
      image: uint8 `[H, W, C]`, as prepared for the model, if a map was requested.
      cam: map `[h, w]` of the most likely or the requested class, if requested.
      class_names: names of the classes, in the order of `probabilities`.
      cam_class: index of the class of `cam`.
      unusual: score for how unlike the training images the image is. It is 0 for a
        median validation image, and above 1 if it exceeds nearly all of them; None if
        the model was not trained with `train.unusual`.
      sets: the data for `classes`; None if the model has none.
      is_probability: False for a model with `outputs='none'`: `probabilities` are then
        its raw outputs.
      original, box, method: see `Explanation`, if a map was requested.
      thresholds: the probability above which each class is positive, or None for a
        class without a threshold. None as a whole if there are no thresholds.
    """

    path: str
    probabilities: np.ndarray | None = None
    error: str | None = None
    features: np.ndarray | None = None
    image: np.ndarray | None = None
    cam: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    cam_class: int | None = None
    is_probability: bool = True
    original: np.ndarray | None = None
    box: tuple[float, float, float, float] | None = None
    method: str = 'Grad-CAM'
    unusual: float | None = None
    sets: conformal.ConformalSets | None = None

    @property
    def is_unusual(self) -> bool | None:
        """Whether the image does not look like the training images: `unusual` > 1.

        None if there is no score.
        """
        return None if self.unusual is None else self.unusual > 1

    def classes(self, coverage: float = 0.9) -> list[ClassProbability]:
        """A set of classes that contains the true one with probability `coverage`.

        The most likely class comes first. With a coverage of 0.9, the set contains the
        true class for at least 90% of images like the validation images, on average
        (split conformal prediction, see `weights.conformal`). If images have several
        labels, each label of an image is in the set with that probability.

        Args:
          coverage: between 0 and 1.

        Returns:
          Classes with their probabilities; an empty list if there is an error.

        Raises:
          UserError: the model has no such sets, or coverage is not between 0 and 1.
        """
        if self.probabilities is None:
            return []
        if self.sets is None:
            raise UserError(NO_SETS)
        inside = self.sets.contains(self.probabilities[None], coverage)[0]
        ordered = np.argsort(-self.probabilities, kind='stable')
        return [
            ClassProbability(self.class_names[i], float(self.probabilities[i]))
            for i in ordered
            if inside[i]
        ]

    thresholds: tuple[float | None, ...] | None = None

    @property
    def positive(self) -> tuple[str, ...] | None:
        """The classes whose probability is above their threshold.

        If an image can have several labels, these are its labels; the default threshold
        is 0.5. With two classes and a threshold for the positive one, this is the
        positive class or nothing. None if the model has no thresholds, or if there is
        an error.
        """
        if self.probabilities is None or self.thresholds is None:
            return None
        places = np.flatnonzero(
            thresholds_lib.is_positive(self.probabilities, self.thresholds)
        )
        return tuple(self.class_names[place] for place in places)

    @property
    def label(self) -> str | None:
        """The most likely class or label; None if there is an error."""
        return None if self.probabilities is None else self.top(1)[0].class_name

    @property
    def probability(self) -> float | None:
        """The probability of `label`, from 0 to 1; None if there is an error."""
        return None if self.probabilities is None else self.top(1)[0].probability

    def top(self, k: int = 5) -> list[ClassProbability]:
        """The k most likely classes, or all if there are fewer, most likely first.

        The list is empty if there is an error. If images have several labels, each
        label has its own probability.
        """
        if self.probabilities is None:
            return []
        places = np.argsort(-self.probabilities, kind='stable')[:k]
        return [
            ClassProbability(self.class_names[i], float(self.probabilities[i]))
            for i in places
        ]

    @property
    def explanation(self) -> Explanation | None:
        """The explanation; None if no map was requested, or if there is an error."""
        if self.cam is None or self.cam_class is None:
            return None
        assert self.probabilities is not None and self.image is not None
        return Explanation(
            self.path,
            self.class_names[self.cam_class],
            float(self.probabilities[self.cam_class]),
            self.image,
            self.cam,
            self.is_probability,
            self.original,
            self.box,
            self.method,
        )

    def __repr__(self):
        result = self.error
        if not result:
            result = f'{self.label} {_format(self.probability, self.is_probability)}'
        return f'<{self.path!r}: {result}>'
