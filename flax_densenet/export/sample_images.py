"""Loads real images for verifying an exported model."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from flax_densenet import settings as settings_lib
from flax_densenet.data import bands, source_names
from flax_densenet.data import images as images_lib
from flax_densenet.errors import UserError
from flax_densenet.evaluation import measured_data
from flax_densenet.inference import input_files
from flax_densenet.weights import trained as trained_lib

# With this many CIFAR-10 images, an int8 export of the small network in
# `configs/cifar.py:quick` took 18 s on two cores.
MOST = 1000
CALIBRATION = 256
_FEW = 17


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images prepared for the model, uint8 `[N, H, W, C]`.

    Attributes:
      images: images for comparing the file with the model.
      labels: int32 `[N]`; None if unknown, or if an image has several labels.
      calibration: images for calibration, from the training images if there are any.
      where: a description of the images, for messages.
    """

    images: np.ndarray
    labels: np.ndarray | None
    calibration: np.ndarray
    where: str


def from_files(
    patterns: Sequence[str], preparation: images_lib.Preparation, *, most: int = MOST
) -> Samples:
    """Loads images from files, folders and patterns, without labels.

    Raises:
      UserError: there are no images, or one cannot be read.
    """
    input_files.check(patterns)
    loaded = []
    for path in input_files.find(patterns):
        try:
            loaded.append(images_lib.load_image(path, preparation))
        except UserError as error:
            raise UserError(f'--files: {path} {error}') from error
        if len(loaded) == most:
            break
    stacked = np.stack(loaded)
    # Cards show it, too, so folders are left out.
    names = [os.path.basename(os.path.normpath(pattern)) for pattern in patterns]
    where = f'{len(loaded)} images of {", ".join(names)}'
    return Samples(stacked, None, stacked[:CALIBRATION], where)


def from_data(
    trained: trained_lib.Trained,
    path: str,
    settings: settings_lib.Settings,
    *,
    thorough: bool,
) -> Samples:
    """Loads test images of a data source, and training images for calibration.

    Args:
      trained: the model.
      path: the model's path, for error messages.
      settings: the data and its preparation.
      thorough: load up to MOST images; otherwise only a few.

    Raises:
      UserError: see `measured_data.find_examples`.
    """
    source, examples, _, _ = measured_data.find_examples(
        trained, path, settings, to_measure=False
    )
    chosen = _spread(len(examples), MOST if thorough else _FEW)
    taken = [examples[n] for n in chosen]
    training = source.train if len(source.train) else source.test
    places = _spread(len(training), CALIBRATION if thorough else 1)
    labels = np.array([one['label'] for one in taken])
    share = f' of {len(examples)}' if len(taken) < len(examples) else ''
    what = 'images' if examples is source.train else 'test images'
    name = source_names.public_source(settings.data.source)
    where = f'{len(taken)}{share} {what} of {name}'
    return Samples(
        np.stack([one['image'] for one in taken]),
        labels if labels.ndim == 1 else None,
        np.stack([training[n]['image'] for n in places]),
        where,
    )


def from_model(
    trained: trained_lib.Trained,
    path: str,
    settings: settings_lib.Settings,
    *,
    integers: bool = False,
    required: bool = False,
) -> Samples:
    """Images from the model's data, or from scikit-learn if it cannot be read.

    Args:
      trained: the model.
      path: the model's path, for messages.
      settings: settings of the data, with an empty `source` if there is none.
      integers: whether the file is int8; its calibration needs images of the model's
        kind.
      required: whether the user named the data; it must then be readable.

    Raises:
      UserError: necessary images are missing, or the data does not fit the model.
    """
    try:
        if settings.data.source:
            return from_data(trained, path, settings, thorough=integers)
    except UserError:
        if required or integers:
            raise
    if integers:
        raise UserError(
            '--precision=int8 needs images to measure the range of each feature map: '
            'add --config.data.source=folder:PHOTOS or --files=PATTERN'
        )
    return from_library(trained.preparation)


def from_library(preparation: images_lib.Preparation) -> Samples:
    """Crops of the two photographs that come with scikit-learn."""
    from sklearn.datasets import load_sample_images

    crops = []
    for photograph in load_sample_images().images:
        height, width, _ = photograph.shape
        for top, left in ((0, 0), (0, width // 2), (height // 3, width // 4)):
            part = photograph[top : top + height // 2, left : left + width // 2]
            if bands.are_kept(preparation.channels):  # parts of each photograph in turn
                part = part[..., np.arange(preparation.channels) % 3]
            crops.append(images_lib.prepare_array(part, preparation))
    stacked = np.stack(crops)
    where = f'{len(crops)} parts of the photographs of scikit-learn'
    return Samples(stacked, None, stacked, where)


def _spread(count, most):
    """At most this many indices, evenly spread, so that all classes are included."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def batches(stack: np.ndarray, size: int = 16):
    """Splits images `[N, H, W, C]` into batches."""
    return [stack[start : start + size] for start in range(0, len(stack), size)]
