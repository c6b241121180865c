"""The images that may choose, and what a model computes of them.

What is fitted of them (`fitting`) needs their logits, and maybe their pooled features;
both are computed once.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from flax_densenet.data import dataset
from flax_densenet.evaluation import evaluate
from flax_densenet.weights import trained as trained_lib


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is to be fitted.

    Attributes:
      calibrate: whether probabilities are calibrated if that helps.
      threshold: rule for thresholds, as `train.threshold`; empty for none.
      positive_class: of two classes; empty for the second.
      unusual: how to score unusual images, as `train.unusual`; `off` for not at all.
      unusual_share: of these images that count as usual.
      unusual_images: training images to look at, at most.
    """

    calibrate: bool = True
    threshold: str = ''
    positive_class: str = ''
    unusual: str = 'auto'
    unusual_share: float = 0.95
    unusual_images: int = 2000

    @property
    def fit_anything(self) -> bool:
        """Whether anything is to be fitted; if not, the images need not be computed."""
        return self.calibrate or bool(self.threshold) or self.unusual != 'off'

    @property
    def need_features(self) -> bool:
        """Whether something is fitted of pooled features."""
        return self.unusual not in ('off', 'energy')


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The images that may choose, and what the model computes of them.

    Attributes:
      trained: the model, without decisions.
      class_names: C names.
      data: name of the data source.
      part: `val`, `test` or `all`: which part of it the images are.
      examples: the images.
      train: the training images; None if they are not known.
      outputs: of the model for `examples`: logits `[N, C]` and labels.
      loading: `batch_size`, `threads` and `workers` of `evaluate.compute_outputs`.
    """

    trained: trained_lib.Trained
    class_names: tuple[str, ...]
    data: str
    part: str
    examples: dataset.Examples
    train: dataset.Examples | None
    outputs: evaluate.Outputs
    loading: dict[str, Any]

    @property
    def logits(self) -> np.ndarray:
        """float32 `[N, C]`, not calibrated."""
        return self.outputs.logits

    @property
    def labels(self) -> np.ndarray:
        """int32 `[N]`, or float32 `[N, C]` of 0, 1 and NaN (not known)."""
        return self.outputs.labels

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several labels."""
        return self.labels.ndim == 2

    @functools.cached_property
    def features(self) -> np.ndarray:
        """Pooled features, float32 `[N, F]`; another pass if `select` was without."""
        if self.outputs.features is not None:
            return self.outputs.features
        return self.features_of(self.examples)

    def features_of(self, examples: dataset.Examples) -> np.ndarray:
        """Pooled features of other images, such as some of `train`."""
        found = self.outputs_of(examples).features
        assert found is not None
        return found

    def outputs_of(self, examples: dataset.Examples) -> evaluate.Outputs:
        """Logits, labels and pooled features of other images."""
        return evaluate.compute_outputs(
            self.trained, examples, features=True, title='features', **self.loading
        )


def select(
    trained: trained_lib.Trained,
    source: dataset.Source,
    *,
    features: bool = False,
    **loading,
) -> Selection:
    """The part of a source that may choose: the validation part, else the test part.

    Args:
      trained: the model; decisions that it has are left out.
      source: with the classes of the model, in its order.
      features: whether pooled features are wanted as well.
      **loading: `batch_size`, `threads` and `workers` of `evaluate.compute_outputs`.
    """
    return compute(
        trained,
        source.selection,
        source.class_names,
        data=source.name,
        part='test' if source.val is None else 'val',
        train=source.train,
        features=features,
        **loading,
    )


def compute(
    trained: trained_lib.Trained,
    examples: dataset.Examples,
    class_names,
    *,
    data: str,
    part: str,
    train: dataset.Examples | None,
    features: bool = False,
    **loading,
) -> Selection:
    """Computes a model's outputs for images that may choose.

    Args:
      trained: the model; decisions that it has are left out.
      examples: with labels as the model numbers its classes.
      class_names, data, part, train: as of `Selection`.
      features, **loading: as of `select`.
    """
    trained = trained.without_decisions()
    outputs = evaluate.compute_outputs(trained, examples, features=features, **loading)
    names = tuple(class_names)
    return Selection(trained, names, data, part, examples, train, outputs, loading)
