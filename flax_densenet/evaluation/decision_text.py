"""Lines of text about calibration and thresholds."""

import textwrap
from typing import Any

from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.weights import decisions as decisions_lib
from flax_densenet.weights import thresholds as thresholds_lib

_ROWS = 40  # classes listed in a table
_LONGEST = 21  # characters of their names


def calibration_line(metrics: dict[str, Any]) -> str:
    """The calibration error, before and after.

    Args:
      metrics: of `results.Results`.
    """
    calibration = metrics['calibration']
    before, after = calibration['before'], calibration['after']
    if calibration['applied']:
        return (
            f'calibration error: {after["error"]:.1%}, Brier score '
            f'{after["brier"]:.4f}; before calibration {before["error"]:.1%}, '
            f'{before["brier"]:.4f}, loss {before["loss"]:.3f}'
        )
    line = f'calibration error: {before["error"]:.1%}'
    if metrics_lib.temperature_helps(calibration):
        line += (
            f'; {after["error"]:.1%} with a temperature of '
            f'{calibration["temperature"]:.2f}'
        )
    return line


def threshold_lines(metrics: dict[str, Any]) -> list[str]:
    """A table of metrics at thresholds that a rule chose; nothing without a rule."""
    found = metrics['thresholds']
    if not found or not found['rule'] or not found['classes']:
        return []
    rows = found['classes']
    width = max(min(max(len(row['name']) for row in rows), _LONGEST), len('class'))
    titles = ('sensitivity', 'specificity', 'PPV', 'NPV')
    lines = [
        'at thresholds chosen for '
        f'{thresholds_lib.describe_rule(found["rule"])}, with 95% intervals:',
        _line('class', width, 'above', titles),
    ]
    for row in rows[:_ROWS]:
        name = row['name']
        name = name if len(name) <= width else f'{name[: width - 1]}…'
        shares = [(row[key], row[f'{key}_interval']) for key in map(str.lower, titles)]
        values = ['-' if value is None else f'{value:.3f}' for value, _ in shares]
        ends = ['-'.join(f'{end:.3f}' for end in pair or ()) for _, pair in shares]
        lines.append(_line(name, width, f'{row["threshold"]:.3f}', values))
        if any(ends):
            lines.append(_line('', width, '', ends))
    if len(rows) > _ROWS:
        lines.append(f'({len(rows) - _ROWS} more classes: see eval.json)')
    if metrics['confused'] is not None:  # images have one class each
        line = describe_likeliest(metrics)
        lines += textwrap.wrap(line, 80, subsequent_indent='  ')
    return lines


def describe_likeliest(metrics: dict[str, Any]) -> str:
    """Which numbers are not of the thresholds, if images have one class each.

    With two classes also what the decisions at the threshold are worth together.
    """
    rows = metrics['thresholds']['classes']
    line = (
        'The accuracy, precision, recall, F1 and the confusion matrix are of the most '
        'likely class, whatever the threshold.'
    )
    if len(metrics['classes']) > 2 or len(rows) != 1:
        return line.replace('the threshold', 'the thresholds')
    row = rows[0]
    low, high = row['accuracy_interval'] or (None, None)
    ends = '' if low is None else f' ({low:.1%} to {high:.1%})'
    return (
        f'{line} At the threshold of {row["name"]}, {row["found"]:,} of its '
        f'{row["positives"]:,} images are found, with {row["false_alarms"]:,} false '
        f'alarms on the {row["negatives"]:,} others: {row["accuracy"]:.1%}{ends} of '
        'the decisions are right.'
    )


def _line(name, width, threshold, cells):
    """A row of at most 80 columns."""
    text = ''.join(f'  {cell:>11}' for cell in cells)
    return f'{name:<{width}}  {threshold:>5}{text}'.rstrip()


def describe_fit(
    decisions: decisions_lib.Decisions | None, data: str, *, own: bool
) -> str:
    """On which images decisions were fitted, and whether they are measured here.

    Args:
      data: name of the data that is measured.
      own: whether the model was trained on this data.
    """
    if decisions is None:
        return ''
    fitted = [
        what
        for what, there in (
            ('calibration', decisions.calibration and decisions.calibration.changes),
            ('thresholds', decisions.thresholds),
        )
        if there
    ]
    if not fitted:
        return ''
    verb = 'was' if fitted == ['calibration'] else 'were'
    line = f'{" and ".join(fitted)} {verb} fitted on {decisions.where}'
    if decisions.part != 'val' and (own or data == decisions.data):
        line += (
            ', the same images as here, so the metrics are slightly optimistic; a '
            'validation part (data.val_fraction) avoids that'
        )
    return line
