"""The selection images, and a model's outputs for them.

Selection images may be used to choose settings: the validation part, or else the test
part. Fitting (`fitting`) needs their logits, and maybe their pooled features; both are
computed once.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from flax_densenet.data import dataset, labeled_images
from flax_densenet.evaluation import evaluate
from flax_densenet.weights import trained as trained_lib


@dataclasses.dataclass(frozen=True)
class Rules:
    """What to fit.

    Attributes:
      calibrate: whether to calibrate probabilities if that helps.
      threshold: rule for thresholds, as `train.threshold`; empty for none.
      positive_class: the positive one of two classes; empty for the second.
      unusual: how to score unusual images, as `train.unusual`; `off` for none.
      unusual_share: share of these images that count as usual.
      unusual_images: maximum number of training images to use.
    """

    calibrate: bool = True
    threshold: str = ''
    positive_class: str = ''
    unusual: str = 'auto'
    unusual_share: float = 0.95
    unusual_images: int = 2000

    @property
    def fit_anything(self) -> bool:
        """Whether there is anything to fit; if not, no outputs are needed."""
        return self.calibrate or bool(self.threshold) or self.unusual != 'off'

    @property
    def need_features(self) -> bool:
        """Whether fitting needs pooled features."""
        return self.unusual not in ('off', 'energy')


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The selection images, and the model's outputs for them.

    Attributes:
      trained: the model, without decisions.
      class_names: C names.
      data: name of the data source.
      part: `val`, `test` or `all`: the part of the source with these images.
      examples: the images.
      train: the training images; None if they are not known.
      outputs: outputs of the model for `examples`: logits `[N, C]` and labels.
      loading: `batch_size`, `threads` and `workers`, as in `evaluate.compute_outputs`.
    """

    trained: trained_lib.Trained
    class_names: tuple[str, ...]
    data: str
    part: str
    examples: labeled_images.Examples
    train: labeled_images.Examples | None
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
    def _with_features(self):
        if self.outputs.features is not None:
            return self.outputs
        return self.outputs_of(self.examples)

    @property
    def features(self) -> np.ndarray:
        """Pooled features, float32 `[N, F]`; another pass if `select` made none."""
        found = self._with_features.features
        assert found is not None
        return found

    @property
    def own_logits(self) -> np.ndarray:
        """Logits of the images themselves, without other views of them."""
        if self.trained.tta == 'none':
            return self.logits
        found = self._with_features.own_logits
        assert found is not None
        return found

    def outputs_of(self, examples: labeled_images.Examples) -> evaluate.Outputs:
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
    """Selects the validation part of a source, or else the test part.

    Args:
      trained: the model; its existing decisions are ignored.
      source: has the classes of the model, in its order.
      features: whether to compute pooled features as well.
      **loading: `batch_size`, `threads` and `workers`, as in
        `evaluate.compute_outputs`.
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
    examples: labeled_images.Examples,
    class_names,
    *,
    data: str,
    part: str,
    train: labeled_images.Examples | None,
    features: bool = False,
    **loading,
) -> Selection:
    """Computes a model's outputs for selection images.

    Args:
      trained: the model; its existing decisions are ignored.
      examples: images with labels as the model numbers its classes.
      class_names, data, part, train: as in `Selection`.
      features, **loading: as in `select`.
    """
    trained = trained.without_decisions()
    outputs = evaluate.compute_outputs(trained, examples, features=features, **loading)
    names = tuple(class_names)
    return Selection(trained, names, data, part, examples, train, outputs, loading)
