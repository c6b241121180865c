"""The outputs of a model for labeled images: metrics, a table, two files.

`evaluate.evaluate` sums a loss during training; this module keeps every logit, from
which `eval.json`, `predictions.csv` and the report are made.
"""

import csv
import dataclasses
import functools
import json
import os
from typing import Any

import numpy as np

from flax_densenet import settings as settings_lib
from flax_densenet.data import dataset, labeled_images
from flax_densenet.distributed import mesh
from flax_densenet.errors import UserError
from flax_densenet.evaluation import (
    decision_metrics,
    decision_text,
    evaluate,
    interval_text,
    intervals,
    measured_data,
    measured_model,
    prediction_rows,
    result_files,
    subgroups,
)
from flax_densenet.evaluation import doubt as doubt_lib
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.evaluation import unusual as unusual_lib
from flax_densenet.system import atomic
from flax_densenet.weights import calibration as calibration_lib
from flax_densenet.weights import decisions as decisions_lib
from flax_densenet.weights import heads
from flax_densenet.weights import thresholds as thresholds_lib
from flax_densenet.weights import trained as trained_lib

EVAL_FILE, PREDICTIONS_FILE = result_files.EVAL_FILE, result_files.PREDICTIONS_FILE
EVAL_VERSION = 2  # version of eval.json; files of version 1 do not have this field
ROWS = 40  # classes listed in the table; more would scroll the totals away

# What metrics of decisions are called in the table of classes.
_SAME = {'sensitivity': 'recall', 'specificity': 'specificity', 'ppv': 'precision'}

Measured = measured_model.Measured
load = result_files.load


@dataclasses.dataclass(frozen=True)
class Results:
    """Logits for labeled images.

    Attributes:
      examples: the images, in the order of the rows.
      class_names: C names.
      logits: float32 `[N, C]`.
      labels: int32 `[N]`; float32 `[N, C]` of 0, 1 and NaN (not known) if an image can
        have several.
      outputs: function from logits to probabilities, `softmax` or `sigmoid`; by default
        it follows from the labels.
      raw_logits: logits before calibration; None if `logits` are not calibrated.
      decisions: the calibration, thresholds and so on of the model; None if it has
        none.
      unusual: scores of how unlike the training images each image is, float32 `[N]`;
        None if the model has no score.
      others: images that show none of the classes, with their scores.
      folds: int `[N]`, the fold in which each image was held out, from 1, set by
        `out_of_fold`.
    """

    examples: labeled_images.Examples
    class_names: tuple[str, ...]
    logits: np.ndarray
    labels: np.ndarray
    outputs: str | None = None
    raw_logits: np.ndarray | None = None
    decisions: decisions_lib.Decisions | None = None
    unusual: np.ndarray | None = None
    others: doubt_lib.Others | None = None
    folds: np.ndarray | None = None

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several labels."""
        return self.labels.ndim == 2

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """float64 `[N, C]`: softmax, or the sigmoid of each label."""
        usual = 'sigmoid' if self.multi_label else 'softmax'
        return metrics_lib.activate(self.logits, self.outputs or usual)

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """int64 `[N]`: the most likely class of each image."""
        return self.probabilities.argmax(-1)

    @functools.cached_property
    def confidence(self) -> np.ndarray:
        """float64 `[N]`: its probability."""
        return self.probabilities.max(-1)

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """See `metrics.measure`, `metrics.measure_labels` and `intervals.extend`.

        Also has `calibration`, where `applied` means that it is the model's own (see
        `decision_metrics`); `thresholds`: None, or `rule` and `classes`, rows of
        `decision_metrics.at_thresholds`; and `subgroups`, see `subgroups.measure`.
        """
        names, raw = self.class_names, self.raw_logits
        if self.multi_label:
            metrics = metrics_lib.measure_labels(
                self.logits,
                self.labels,
                names,
                thresholds=self.thresholds,
                calibration=decision_metrics.of_labels(
                    self.logits, raw, self.labels, names
                ),
            )
        else:
            logits = self.logits
            if self.outputs == 'sigmoid':  # as shares of their sum
                logits = metrics_lib.log_sigmoid(logits)
            scale = self.calibration.scale[0] if self.calibration else None
            found = decision_metrics.of_classes(logits, raw, self.labels, scale)
            metrics = metrics_lib.measure(logits, self.labels, names, calibration=found)
        arrays = self.labels, self.probabilities
        predicted = self.positive if self.multi_label else None
        extended = intervals.extend(metrics, *arrays, self.groups, predicted=predicted)
        columns = getattr(self.examples, 'subgroups', {})
        extended['subgroups'] = subgroups.measure(
            columns, *arrays, predicted=predicted, groups=self.groups
        )
        return extended | {'thresholds': self._at_thresholds(extended)}

    def _at_thresholds(self, metrics):
        """`thresholds` of `metrics`; of labels with the intervals of their classes."""
        if self.thresholds is None:
            return None
        chosen = self.decisions and self.decisions.thresholds
        rows = decision_metrics.at_thresholds(
            *(self.labels, self.probabilities, self.thresholds, self.class_names),
            self.groups,
        )
        if self.multi_label and self.groups is not None and metrics['intervals']:
            every = metrics['intervals']['classes']
            there = [n for n, v in enumerate(self.thresholds) if v is not None]
            for row, place in zip(rows, there, strict=True):
                for name, same in _SAME.items():
                    row[f'{name}_interval'] = every[place].get(same)
        return {'rule': chosen.rule if chosen else None, 'classes': rows}

    @functools.cached_property
    def doubt(self) -> dict[str, Any]:
        """See `doubt.measure`."""
        return doubt_lib.measure(
            self.probabilities,
            self.labels,
            self.decisions,
            scores=self.unusual,
            others=self.others,
        )

    @property
    def groups(self) -> np.ndarray | None:
        """int64 `[N]`: the group of each image, such as a patient; None if unknown."""
        return getattr(self.examples, 'groups', None)

    @property
    def calibration(self) -> calibration_lib.Calibration | None:
        """The calibration that was applied to the logits; None if there is none."""
        if self.raw_logits is None or self.decisions is None:
            return None
        return self.decisions.calibration

    @functools.cached_property
    def thresholds(self) -> tuple[float | None, ...] | None:
        """The thresholds of the classes; None for a class without one.

        With several labels the default is 0.5. None if there is no threshold at all.
        """
        if self.decisions and self.decisions.thresholds:
            return self.decisions.thresholds.values
        return (0.5,) * len(self.class_names) if self.multi_label else None

    @functools.cached_property
    def positive(self) -> np.ndarray:
        """Whether each class is above its threshold, bool `[N, C]`."""
        values = self.thresholds or (None,) * len(self.class_names)
        return thresholds_lib.is_positive(self.probabilities, values)

    def name(self, row: int) -> str:
        """The file of an image, or its position in its data set."""
        return self.examples.name(row)


def describe(
    trained: trained_lib.Trained,
    data: str,
    *,
    weights: str | None = None,
    own: bool = True,
) -> Measured:
    """Describes a model that is measured on `data`.

    Args:
      weights: path that it was loaded from; kept if it is not a checkpoint.
      own: as in `Measured`.
    """
    tta, precision = trained.tta, trained.precision
    members = trained.module.members
    if members > 1:
        return Measured(data, None, None, tta, weights, precision, members, own=own)
    if trained.step is None:
        return Measured(data, None, None, tta, weights, precision, own=own)
    epoch = trained.epoch
    return Measured(data, epoch, trained.step, tta, precision=precision, own=own)


def collect(
    trained: trained_lib.Trained,
    examples: labeled_images.Examples,
    class_names,
    **loading,
) -> Results:
    """Computes all logits.

    Args:
      **loading: `batch_size`, `threads` and `workers`, as in `evaluate.compute_logits`.
    """
    features = unusual_lib.needs_own_outputs(trained)
    computed = evaluate.compute_outputs(trained, examples, features=features, **loading)
    return from_outputs(trained, examples, class_names, computed)


def from_outputs(
    trained: trained_lib.Trained,
    examples: labeled_images.Examples,
    class_names,
    computed: evaluate.Outputs,
) -> Results:
    """The results from a network's outputs for images, with its decisions."""
    outputs = None
    if trained.is_imported and computed.labels.ndim == 1:
        # Sigmoids that were assumed along with names that the data lacks do not apply.
        assumed = trained.known and not trained.known.spelled_as(class_names)
        outputs = None if assumed else trained.outputs
    return Results(
        examples,
        tuple(class_names),
        evaluate.finish_logits(trained, computed.logits),
        computed.labels,
        outputs,
        raw_logits=computed.logits if trained.calibration else None,
        decisions=trained.decisions,
        unusual=unusual_lib.of_outputs(trained, computed),
    )


def of_data(
    trained: trained_lib.Trained, path: str, settings: settings_lib.Settings
) -> tuple[dataset.Source, Results, bool]:
    """`measured_data.find_examples` and `collect` in one.

    Returns:
      The source, the results for its images, and whether the model was trained on it.
    """
    if trained.outputs == heads.NONE:
        raise UserError(
            f'--outputs=none: the outputs of {path} are not probabilities, so there is '
            'nothing to measure; use softmax or sigmoid'
        )
    source, examples, names, trained_on = measured_data.find_examples(
        trained, path, settings
    )
    loader = settings.loader
    found = collect(
        trained,
        examples,
        names,
        batch_size=loader.batch_size,
        threads=loader.threads,
        workers=loader.workers,
    )
    return source, found, trained_on


def save(
    folder: str,
    results: Results,
    measured: Measured,
    more: dict[str, Any] | None = None,
):
    """Writes `eval.json` (metrics) and `predictions.csv` (a row for each image).

    If other images than the run's own were measured, its own results are kept in the
    subfolder `result_files.OWN`, until they are measured again.

    Args:
      more: further fields of `eval.json`.

    Raises:
      UserError: the folder cannot be written.
    """
    if not mesh.is_writer():
        return
    path = os.path.join(folder, EVAL_FILE)
    try:
        os.makedirs(folder, exist_ok=True)
        result_files.keep_own(folder, measured)
        with atomic.replacing(path) as file:
            about = {'version': EVAL_VERSION} | measured.to_file()
            more = (more or {}) | ({'doubt': results.doubt} if results.doubt else {})
            json.dump(about | results.metrics | more, file, indent=1)
            file.write('\n')
        path = os.path.join(folder, PREDICTIONS_FILE)
        # Names that are not UTF-8 are written as their original bytes.
        options = {'encoding': 'utf-8', 'errors': 'surrogateescape', 'newline': ''}
        with atomic.replacing(path, **options) as file:
            rows = prediction_rows.make(results)
            rows = doubt_lib.add_scores(rows, results.unusual)
            if results.folds is not None:
                folds = ['fold', *results.folds.tolist()]
                rows = ([*row, n] for row, n in zip(rows, folds, strict=True))
            rows = interval_text.add_groups(rows, results.groups)
            csv.writer(file).writerows(rows)
        result_files.clear_kept(folder, measured)
    except OSError as error:
        raise UserError(
            f'{path} cannot be written ({error.strerror}); use another --workdir'
        ) from error


def format_metrics_table(results: Results, where: str) -> str:
    """The metrics as lines: totals, then a table of classes.

    With more than `ROWS` classes, only those with the lowest F1.

    Args:
      where: `360 test images of digits, best checkpoint: epoch 6, step 270`.
    """
    metrics = results.metrics
    total = {name: metrics[name] for name in ('accuracy', 'loss')}
    if results.multi_label:
        total['mean_auroc'] = metrics['macro']['auroc']
    lines = [f'{evaluate.format_metrics("Test", total)} ({where})']
    if metrics['accuracy_interval']:
        low, high = metrics['accuracy_interval']
        lines.append(f'accuracy: 95% interval {low * 100:.1f}% to {high * 100:.1f}%')
        if results.multi_label:
            rule = metrics['thresholds']['rule']
            lines[-1] += f', of all labels at {"their thresholds" if rule else "50%"}'
    if metrics['top5'] is not None:
        lines[-1] += f'; top-5 accuracy {metrics["top5"] * 100:.1f}%'
    if baseline := metrics_lib.majority(metrics):
        lines.append(
            f'baselines: always {baseline[0]} {baseline[1] * 100:.1f}%, chance '
            f'{100 / len(results.class_names):.1f}%'
        )
    lines.append(decision_text.calibration_line(metrics))
    lines += interval_text.format_means(metrics)
    lines += interval_text.format_subgroups(metrics)
    lines += doubt_lib.describe(results.doubt, several=results.multi_label)
    thresholds = decision_text.threshold_lines(metrics)
    return '\n'.join(lines + _format_classes(metrics) + thresholds)


def _format_classes(metrics):
    rows, hidden = metrics['classes'], 0
    if len(rows) > ROWS:
        hidden = len(rows) - ROWS
        rows = sorted(rows, key=lambda row: row['f1'] or 0)[:ROWS]
    width = min(max(len(row['name']) for row in rows), 40)
    width = max(width, len('mean of classes'))
    columns = ('precision', 'recall', 'f1', 'auroc')
    head = f'{"class":<{width}}  precision  recall      F1   AUROC  images'
    lines = [head]
    total = metrics['macro'] | {'name': 'mean of classes', 'support': metrics['count']}
    for row in [*rows, total]:
        name = row['name'] if len(row['name']) <= 40 else row['name'][:39] + '…'
        cells = zip((9, 6, 6, 6), (row[c] for c in columns), strict=True)
        text = '  '.join(f'{evaluate.format_auroc(v):>{w}}' for w, v in cells)
        lines.append(f'{name:<{width}}  {text}  {row["support"]:>6}')
    if hidden:
        lines.insert(-1, f'({hidden} classes with a higher F1: see {EVAL_FILE})')
    return lines
