"""What a model says of an image: probabilities, features, and where it looked."""

import dataclasses
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from flax_densenet.inference import overlay as overlay_lib


class ClassProbability(NamedTuple):
    """A class and its probability, 0 to 1."""

    class_name: str
    probability: float


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Where in an image a model sees a class (Grad-CAM); a notebook shows its picture.

    Attributes:
      path: of the file, as it was given.
      class_name: what was looked for.
      probability: of that class, 0 to 1.
      image: uint8 `[S, S, C]`, as the model saw it.
      cam: float32 `[h, w]`, 0 or above: how much each place speaks for the class.
    """

    path: str
    class_name: str
    probability: float
    image: np.ndarray
    cam: np.ndarray

    @property
    def overlay(self) -> np.ndarray:
        """The map laid over the image, uint8 `[S, S, 3]`."""
        return overlay_lib.overlay(self.image, self.cam)

    @property
    def picture(self) -> Image.Image:
        """Image and overlay side by side, under class and probability."""
        caption = f'{self.class_name}  {self.probability:.1%}'
        return overlay_lib.picture(self.image, self.cam, caption)

    def save(self, path):
        """Writes the picture; the name's ending (`.jpg`, `.png`) tells the format."""
        self.picture.save(path)

    def __repr__(self):
        return f'<{self.path!r}: {self.class_name} {self.probability:.1%}, explained>'

    def _repr_png_(self):
        file = io.BytesIO()
        self.picture.save(file, 'PNG')
        return file.getvalue()


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one image.

    Attributes:
      path: of the file, as it was given; `image 3` for the fourth of images given as
        pixels or bytes.
      probabilities: float32 `[num_classes]`; None where the file is no image.
      error: why the file could not be read, else None.
      features: pooled features `[F]`, where asked for.
      image: uint8 `[S, S, C]`, as the model saw it, where a map was asked for.
      cam: Grad-CAM `[h, w]` of the most likely class or of the one that was named,
        where asked for.
      class_names: of the probabilities.
      cam_class: whose map `cam` is, an index.
    """

    path: str
    probabilities: np.ndarray | None = None
    error: str | None = None
    features: np.ndarray | None = None
    image: np.ndarray | None = None
    cam: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    cam_class: int | None = None

    @property
    def label(self) -> str | None:
        """The most likely class; of several labels the most likely one. None: error."""
        return None if self.probabilities is None else self.top(1)[0].class_name

    @property
    def probability(self) -> float | None:
        """Of `label`, 0 to 1; None where there is an error."""
        return None if self.probabilities is None else self.top(1)[0].probability

    def top(self, k: int = 5) -> list[ClassProbability]:
        """The k most likely classes or fewer, the likeliest first; `[]` for an error.

        Of several labels an image, each has a probability of its own.
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
        """What `cam` shows; None where no map was asked for, or for an error."""
        if self.cam is None or self.cam_class is None:
            return None
        assert self.probabilities is not None and self.image is not None
        return Explanation(
            self.path,
            self.class_names[self.cam_class],
            float(self.probabilities[self.cam_class]),
            self.image,
            self.cam,
        )

    def __repr__(self):
        said = self.error or f'{self.label} {self.probability:.1%}'
        return f'<{self.path!r}: {said}>'
