"""Real images to try an exported model on: those that it was trained for, or others."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_densenet.data import images as images_lib
from flax_densenet.errors import UserError
from flax_densenet.evaluation import results
from flax_densenet.inference import input_files
from flax_densenet.weights import trained as trained_lib

# An int8 export with so many CIFAR-10 images took 18 s on two cores, the small network
# of `configs/cifar.py:quick`.
MOST = 1000
CALIBRATION = 256
_FEW = 17


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images as the model sees them, uint8 `[N, S, S, C]`.

    Attributes:
      images: to compare on.
      labels: int32 `[N]` of these, or None where they are not known or several.
      calibration: others, of the training images where there are such.
      where: what they are, for a message.
    """

    images: np.ndarray
    labels: np.ndarray | None
    calibration: np.ndarray
    where: str


def of_files(
    patterns: Sequence[str], preparation: images_lib.Preparation, *, most: int = MOST
) -> Samples:
    """Images of files, folders and patterns, without labels.

    Raises:
      UserError: there are none, or one cannot be read.
    """
    input_files.check(patterns)
    found = []
    for path in input_files.find(patterns):
        try:
            found.append(images_lib.load_image(path, preparation))
        except UserError as error:
            raise UserError(f'--files: {path} {error}') from error
        if len(found) == most:
            break
    stacked = np.stack(found)
    where = f'{len(found)} images of {", ".join(patterns)}'
    return Samples(stacked, None, stacked[:CALIBRATION], where)


def of_data(
    trained: trained_lib.Trained, path: str, fields: dict[str, Any], *, whole: bool
) -> Samples:
    """Test images of a data source to compare on, training images to calibrate with.

    Args:
      path: of the model, for messages.
      fields: those of `config.data`.
      whole: up to MOST images; else a few.

    Raises:
      UserError: as of `results.find_examples`.
    """
    source, examples, _, _ = results.find_examples(trained, path, fields)
    chosen = _spread(len(examples), MOST if whole else _FEW)
    taken = [examples[n] for n in chosen]
    training = source.train if len(source.train) else source.test
    places = _spread(len(training), CALIBRATION if whole else 1)
    labels = np.array([one['label'] for one in taken])
    share = f' of {len(examples)}' if len(taken) < len(examples) else ''
    where = f'{len(taken)}{share} test images of {fields["source"]}'
    return Samples(
        np.stack([one['image'] for one in taken]),
        labels if labels.ndim == 1 else None,
        np.stack([training[n]['image'] for n in places]),
        where,
    )


def of_model(
    trained: trained_lib.Trained,
    path: str,
    fields: dict[str, Any],
    *,
    integers: bool = False,
    required: bool = False,
) -> Samples:
    """Images of a model's data or, if it has none that can be read, of scikit-learn.

    Args:
      path: of the model, for messages.
      fields: those of `config.data`, with an empty `source` if there is none.
      integers: an int8 file has to be calibrated on images of the model's kind.
      required: the data was named by the user, so that it must be readable.

    Raises:
      UserError: images that are needed are missing, or the data does not fit the model.
    """
    try:
        if fields['source']:
            return of_data(trained, path, fields, whole=integers)
    except UserError:
        if required or integers:
            raise
    if integers:
        raise UserError(
            '--precision=int8 needs images, to find the range of each feature map: '
            'add --config.data.source=folder:PHOTOS or --files=PATTERN'
        )
    return of_library(trained_lib.preparation_of(trained.metadata))


def of_library(preparation: images_lib.Preparation) -> Samples:
    """Parts of the two photographs that come with scikit-learn."""
    from sklearn.datasets import load_sample_images

    found = []
    for photograph in load_sample_images().images:
        height, width, _ = photograph.shape
        for top, left in ((0, 0), (0, width // 2), (height // 3, width // 4)):
            part = photograph[top : top + height // 2, left : left + width // 2]
            found.append(images_lib.prepare_array(part, preparation))
    stacked = np.stack(found)
    where = f'{len(found)} parts of the photographs of scikit-learn'
    return Samples(stacked, None, stacked, where)


def _spread(count, most):
    """At most so many places, evenly over all, so that all classes come."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def batches(stack: np.ndarray, size: int = 16):
    """The images, 16 at a time."""
    return [stack[start : start + size] for start in range(0, len(stack), size)]
