"""The sections of the report on calibration and thresholds."""

from typing import Any

from flax_densenet.evaluation import (
    choosing,
    decision_metrics,
    decision_text,
)
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.report import decision_charts, render, threshold_choices
from flax_densenet.weights import thresholds as thresholds_lib

_CURVES = 100  # precision-recall curves at most
_FEW_POINTS = 60  # points of each if there are many
_LABELS = 40  # rows of calibration by label
_DECISION_CURVES = 6


def describe(
    found, source_name: str, *, own: bool, positive: str | None = None
) -> dict[str, Any]:
    """Values for the sections of the page.

    Args:
      found: a `results.Results`.
      source_name: name of the measured data.
      own: whether the model was trained on this data.
      positive: the positive one of two classes; None for the second.
    """
    metrics = found.metrics
    calibration = metrics['calibration']
    scaled = bool(calibration) and metrics_lib.temperature_helps(calibration)
    values = thresholds_or_half(found, positive)
    return {
        'scaled': scaled,
        'reliability': calibration
        and decision_charts.reliability(
            calibration, scaled=scaled, several=found.multi_label
        ),
        'calibration_rows': _calibration_rows(calibration),
        'label_calibration': _label_rows(calibration),
        'fitted': decision_text.describe_fit(found.decisions, source_name, own=own),
        'thresholds': _threshold_rows(found, values),
        'choices': threshold_choices.tabulate(found, values),
        'likeliest': _likeliest(metrics),
        'threshold_rule': _rule(metrics),
        'precision_recall': _precision_recall(found),
        'decision_curves': _decision_curves(found),
    }


def thresholds_or_half(found, positive: str | None) -> tuple[float | None, ...]:
    """The thresholds of the classes, C; without any, 0.5 for the positive one of two.

    Args:
      found: a `results.Results`.
      positive: name of that class; None for the second.
    """
    names = list(found.class_names)
    values = found.thresholds or (None,) * len(names)
    if any(value is not None for value in values) or len(names) != 2:
        return values
    place = names.index(positive) if positive in names else 1
    return tuple(0.5 if c == place else None for c in range(2))


def _rule(metrics):
    """What the thresholds were chosen for; None without a rule."""
    rule = (metrics['thresholds'] or {}).get('rule')
    return thresholds_lib.describe_rule(rule) if rule else None


def _calibration_rows(calibration):
    """Error, Brier score and loss, before and after calibration, as text."""
    if not calibration:
        return []
    rows = [('Calibrated' if calibration['applied'] else 'This model', 'after')]
    if calibration['applied']:
        rows.insert(0, ('Before calibration', 'before'))
    else:
        rows = [('This model', 'before')]
    return [
        (
            title,
            render.percent(calibration[key]['error']),
            f'{calibration[key]["brier"]:.4f}',
            f'{calibration[key]["loss"]:.4f}',
        )
        for title, key in rows
    ]


def _label_rows(calibration):
    """The same for each label: name, error, Brier score and loss, before and after."""
    if not calibration or 'labels' not in calibration['before']:
        return []
    before = calibration['before']['labels']
    after = (calibration['after'] or {}).get('labels', before)
    return [
        (row['name'], [(row[key], now[key]) for key in ('error', 'brier', 'loss')])
        for row, now in list(zip(before, after, strict=True))[:_LABELS]
        if row['loss'] is not None
    ]


def _threshold_rows(found, values):
    """A row for each class with a threshold, with its metrics and intervals as text."""
    if found.metrics['thresholds']:
        rows = found.metrics['thresholds']['classes']
    else:
        rows = decision_metrics.at_thresholds(
            *(found.labels, found.probabilities, values, found.class_names),
            found.groups,
        )
    names = ('sensitivity', 'specificity', 'ppv', 'npv', 'accuracy')
    return [
        {
            'name': row['name'],
            'threshold': row['threshold'],
            'positives': row['positives'],
            'negatives': row['negatives'],
            'shares': [
                (row[name], _interval(row[f'{name}_interval'])) for name in names
            ],
        }
        for row in rows
    ]


def _likeliest(metrics):
    """What is not of the thresholds, in words; '' if all of it is."""
    if not metrics['thresholds'] or metrics['confused'] is None:
        return ''
    return decision_text.describe_likeliest(metrics)


def _interval(ends):
    if ends is None:
        return ''
    low, high = map(render.percent, ends)
    return f'{low} to {high}'


def _precision_recall(found):
    """Curves of one class against the rest, the worst first, and their names."""
    rows = []
    for place, name in enumerate(found.class_names):
        true, probability = choosing.of_class(found.labels, found.probabilities, place)
        area = decision_metrics.average_precision(true, probability)
        if area is not None:
            rows.append((area, place, str(name)))
    rows = sorted(rows)[:_CURVES]
    points = metrics_lib.CURVE_POINTS if len(rows) <= 10 else _FEW_POINTS
    made = []
    for area, place, name in rows:
        true, probability = choosing.of_class(found.labels, found.probabilities, place)
        curve = decision_metrics.precision_recall(true, probability, points=points)
        shown = {'name': render.isolate(name), 'average_precision': area}
        made.append(shown | (curve or {}))
    return {
        'chart': decision_charts.precision_recall(made) if made else '',
        'mean': metrics_lib.mean([area for area, _, _ in rows]),
    }


def _decision_curves(found):
    """Charts of the classes with thresholds; those with most positives come first."""
    if found.thresholds is None:
        return []
    rows = []
    for place, value in enumerate(found.thresholds):
        if value is None:
            continue
        true, probability = choosing.of_class(found.labels, found.probabilities, place)
        if true.any() and not true.all():
            rows.append((-int(true.sum()), place, value, true, probability))
    made = []
    for _, place, value, true, probability in sorted(rows, key=lambda row: row[:2]):
        name = str(found.class_names[place])
        curve = decision_metrics.decision_curve(true, probability)
        made.append((name, decision_charts.decision_curve(curve, name, value)))
    return made[:_DECISION_CURVES]
