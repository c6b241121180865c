"""Chooses the thresholds of a model's classes by a rule (`threshold_rules`)."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from flax_densenet.errors import UserError, list_first
from flax_densenet.evaluation import evaluate, threshold_rules
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.evaluation import selection as selection_lib
from flax_densenet.weights import decisions as decisions_lib
from flax_densenet.weights import heads
from flax_densenet.weights import thresholds as thresholds_lib
from flax_densenet.weights import trained as trained_lib

_LOGGER = logging.getLogger(__name__)
FEWEST = 10  # images with a class, and the same number without


def fit(
    selection: selection_lib.Selection,
    rules: selection_lib.Rules,
    found: decisions_lib.Decisions,
) -> thresholds_lib.Thresholds | None:
    """One of `fitting.FITTERS`, for calibrated probabilities; logs what it did.

    Raises:
      UserError: there is no such rule, or no class of that name.
    """
    if not rules.threshold:
        return _keep_points(selection, found)
    rule = threshold_rules.parse(rules.threshold)
    outputs = selection.trained.outputs
    if outputs == heads.NONE:
        raise UserError(
            f'train.threshold={rules.threshold}: the outputs of the model are not '
            'probabilities'
        )
    trained = dataclasses.replace(selection.trained, decisions=found)
    logits = evaluate.finish_logits(trained, selection.logits)
    probabilities = metrics_lib.activate(logits, outputs)
    names = selection.class_names
    places = places_of(names, rules.positive_class, selection.multi_label)
    values: list[float | None] = [None] * len(names)
    usual = _usual(selection, found)
    few = []
    for place in places:
        true, probability = of_class(selection.labels, probabilities, place)
        if min(true.sum(), (~true).sum()) < FEWEST:
            few.append(f'{names[place]} ({true.sum()} of {len(true)})')
            # As without thresholds; with many classes the most likely one is predicted.
            if selection.multi_label or len(names) == 2:
                values[place] = usual[place]
            continue
        values[place] = threshold_rules.choose(rule, true, probability)
    notes = _describe(selection, rules, places, values, few)
    for note in notes:
        _LOGGER.info(f'threshold={rules.threshold} on {found.where}: {note}')
    return thresholds_lib.Thresholds(rules.threshold, tuple(values), tuple(notes))


def _usual(selection, found):
    """The thresholds without a rule: 0.5, or calibrated operating points."""
    points = trained_lib.points_of(selection.trained.metadata)
    if points is None or found.calibration is None or not found.calibration.changes:
        return [0.5] * len(selection.class_names)
    given = np.array([0.5 if point is None else point for point in points])
    moved = metrics_lib.sigmoid(
        found.calibration.apply((np.log(given) - np.log1p(-given))[None])[0]
    )
    pairs = zip(points, moved, strict=True)
    return [None if point is None else float(value) for point, value in pairs]


def _keep_points(selection, found):
    """Operating points of the weights, converted to calibrated probabilities."""
    values = _usual(selection, found)
    if all(value == 0.5 for value in values):
        return None
    note = 'the operating points of the weights, as calibrated probabilities'
    return thresholds_lib.Thresholds('operating points', tuple(values), (note,))


def places_of(names: Sequence[str], positive_class: str, several: bool) -> list[int]:
    """The classes that get a threshold.

    Args:
      names: names of all classes.
      positive_class: as `train.positive_class`.
      several: whether an image can have several of them.

    Raises:
      UserError: there is no such class, or there are more than two.
    """
    if positive_class:
        if several or len(names) != 2:
            raise UserError(
                f'train.positive_class={positive_class} is for two classes, with one '
                f'per image; the model has {len(names)} '
                f'{"labels" if several else "classes"}'
            )
        if positive_class not in names:
            raise UserError(
                f'train.positive_class={positive_class} is not a class of the model; '
                f'use {" or ".join(names)}'
            )
        return [names.index(positive_class)]
    return [1] if not several and len(names) == 2 else list(range(len(names)))


def of_class(
    labels: np.ndarray, probabilities: np.ndarray, place: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whether images have a class, bool `[n]`, and its probability, if known.

    Args:
      labels: int `[N]`, or `[N, C]` of 0, 1 and NaN.
      probabilities: `[N, C]`.
    """
    if labels.ndim == 1:
        return labels == place, probabilities[:, place]
    known = ~np.isnan(labels[:, place])
    return labels[known, place] > 0.5, probabilities[known, place]


def _describe(selection, rules, places, values, few):
    names, notes = selection.class_names, []
    chosen = [f'{names[c]} {values[c]:.3f}' for c in places if values[c] is not None]
    if chosen:
        note = list_first(chosen)
        if not selection.multi_label and len(names) == 2:
            if not rules.positive_class:
                note += (
                    ' (the second class counts as the positive one; '
                    'train.positive_class changes that)'
                )
        elif not selection.multi_label:
            note += ', each class against the others; the prediction stays the most '
            note += 'likely class'
        notes.append(note)
    if few:
        rest = 'the usual threshold'
        if not selection.multi_label and len(names) > 2:
            rest = 'no threshold'
        notes.append(
            f'{len(few)} of {len(places)} get {rest}, as fewer than {FEWEST} images '
            f'have the class or lack it: {list_first(few)}'
        )
    return notes
