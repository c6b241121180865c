"""What a model decides beyond probabilities: positives, sets, unusual images."""

import logging
from typing import Any

import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.inference import prediction as prediction_lib
from flax_densenet.inference.prediction import Prediction
from flax_densenet.weights import calibration as calibration_lib
from flax_densenet.weights import conformal
from flax_densenet.weights import thresholds as thresholds_lib
from flax_densenet.weights import trained as trained_lib

_LOGGER = logging.getLogger(__name__)


class Decided:
    """The part of a `Predictor` that handles what was fitted after training.

    Attributes:
      trained: the model.
    """

    trained: trained_lib.Trained

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, in the order of the outputs."""
        raise NotImplementedError

    @property
    def thresholds(self) -> tuple[float | None, ...] | None:
        """The probability above which each class is positive (`Trained.thresholds`)."""
        return self.trained.thresholds

    def positive_of(self, probabilities: np.ndarray) -> tuple[str, ...] | None:
        """`Prediction.positive` for probabilities `[num_classes]`."""
        return Prediction(
            '',
            probabilities,
            class_names=self.class_names,
            thresholds=self.thresholds,
        ).positive

    def describe_decisions(self) -> dict[str, Any]:
        """The decisions as a dict for JSON; a value is None if there is none.

        `thresholds` is `{class: threshold}`, `threshold_rule` the rule that chose them,
        `threshold_words` its description, and `calibration` a description.
        """
        decisions, values = self.trained.decisions, self.thresholds
        chosen = decisions and decisions.thresholds
        calibration = self.trained.calibration
        found = None
        if values is not None:
            pairs = zip(self.class_names, values, strict=True)
            found = {name: value for name, value in pairs if value is not None}
        return {
            'thresholds': found,
            'threshold_rule': chosen.rule if chosen else None,
            'threshold_words': chosen and thresholds_lib.describe_rule(chosen.rule),
            'calibration': calibration and calibration_lib.describe(calibration),
        }

    @property
    def scores_unusual(self) -> bool:
        """Whether predictions include a score of unusual images."""
        return bool(self.trained.decisions and self.trained.decisions.unusual)

    @property
    def sets(self) -> conformal.ConformalSets | None:
        """The data for `Prediction.classes`; None if the model has none."""
        found = self.trained.decisions
        return None if found is None else found.sets

    def check_coverage(self, coverage: float):
        """Logs a warning if there were too few validation images for a coverage.

        Raises:
          UserError: the model has no sets of classes, or the coverage is not between 0
            and 1.
        """
        if self.sets is None:
            raise UserError(f'--coverage={coverage:g}: {prediction_lib.NO_SETS}')
        if line := self.sets.warn(coverage, self.class_names):
            _LOGGER.warning(f'warning: {line}')
