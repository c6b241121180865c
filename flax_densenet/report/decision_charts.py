"""Charts of probabilities and decisions: reliability, precision, net benefit."""

from collections.abc import Sequence
from typing import Any

from flax_densenet.report import render, svg
from flax_densenet.report.charts import SHARES, legend
from flax_densenet.report.svg import Axis, Plot

_ANSWERS = {
    False: ('Confidence (probability of the predicted class)', 'Accuracy', 'images'),
    True: ('Probability of a label', 'Share with the label', 'labels'),
}


def reliability(calibration: dict[str, Any], *, scaled: bool, several: bool) -> str:
    """A reliability diagram over a histogram of the images.

    Args:
      calibration: from `results.Results.metrics`.
      scaled: whether to draw the curve with another temperature, too.
      several: whether an image can have several labels.
    """
    unit, share, what = _ANSWERS[several]
    x = Axis(unit, 0, 1, SHARES)
    shown = calibration['after' if calibration['applied'] else 'before']['bins']
    counts = _count_axis(shown, what)
    plot = Plot(
        x,
        Axis(share, 0, 1, SHARES),
        label='Reliability diagram',
        height=300,
        left=svg.margin(counts),
    )
    plot.line([0, 1], [0, 1], 'soft', dashed=True, title='Perfect calibration')
    rows = [('soft dashed', 'Perfect calibration')]
    for key, style, name in _kinds(calibration, scaled):
        bins = [row for row in calibration[key]['bins'] if row['count']]
        total = sum(row['count'] for row in bins)
        xs, ys = ([row[name] for row in bins] for name in ('confidence', 'accuracy'))
        plot.line(xs, ys, style)
        plot.points(
            xs,
            ys,
            style,
            sizes=[round(2.5 + 6 * (row['count'] / total) ** 0.5, 1) for row in bins],
            titles=[
                f'{row["count"]:,} {what}: {_WORDS[several][0]} '
                f'{render.percent(row["confidence"])}, {_WORDS[several][1]} '
                f'{render.percent(row["accuracy"])}'
                for row in bins
            ],
        )
        rows.append((style, name))
    below = _histogram(shown, counts, what, word=_WORDS[several][0], left=plot.left)
    return f'{plot}{below}{legend(rows)}'


_WORDS = {False: ('confidence', 'accuracy'), True: ('probability', 'share')}


def _kinds(calibration, scaled):
    """The key, style and name of each curve."""
    if calibration['applied']:
        return [
            ('before', 's1', 'Before calibration'),
            ('after', 's0', 'This model, calibrated'),
        ]
    kinds = [('before', 's1', 'This model')]
    if scaled:
        name = f'With temperature {calibration["temperature"]:.2f}'
        kinds.append(('after', 's0', name))
    return kinds


def _count_axis(bins, what):
    most = max(row['count'] for row in bins)
    return Axis(what.capitalize(), 0, most, ((0, '0'), (most, f'{most:,}')))


def _histogram(bins, axis, what, *, word, left):
    """The number of images per bin, below the diagram."""
    counts = [row['count'] for row in bins]
    edges = [n / len(bins) for n in range(len(bins) + 1)]
    plot = Plot(
        Axis('', 0, 1, SHARES),
        axis,
        label=f'Test {what} by {word}',
        height=120,
        left=left,
    )
    texts = [
        f'{count:,} {what} with a {word} of {low:.0%} to {high:.0%}'
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    plot.bars(edges, counts, 'soft', titles=texts)
    return plot


def precision_recall(rows: Sequence[dict[str, Any]], *, colored: int = 10) -> str:
    """Precision-recall curves with a legend below.

    Args:
      rows: `name`, `average_precision` and the points of
        `decision_metrics.precision_recall`, the worst first.
      colored: if there are more curves than this, all but the first three are gray.
    """
    plot = Plot(
        Axis('Recall (sensitivity)', 0, 1, SHARES),
        Axis('Precision (PPV)', 0, 1, SHARES),
        label='Precision-recall curves',
        height=424,
    )
    shown = len(rows) if len(rows) <= colored else 3
    styles = [f's{place}' if place < shown else 'faint' for place in range(len(rows))]
    named = [
        f'{row["name"]} ({render.figure(row["average_precision"])})' for row in rows
    ]
    for row, style, name in reversed(list(zip(rows, styles, named, strict=True))):
        plot.line(row['recall'], row['precision'], style, title=name, group=name)
    below = legend(list(zip(styles, named, strict=True))[:shown])
    return f'{plot}{below}'


def decision_curve(curve: dict[str, Any], name: str, threshold: float | None) -> str:
    """Net benefit of acting on a class, by threshold probability.

    Args:
      curve: from `decision_metrics.decision_curve`.
      threshold: a threshold to mark, or None.
    """
    top = max(0.01, *curve['benefit'], curve['all'][0]) * 1.08
    low = -0.25 * top
    plot = Plot(
        Axis('Threshold probability', 0, 1, SHARES),
        Axis('Net benefit per image', low, top),
        label=f'Decision curve of {name}',
        height=240,
    )
    x = curve['probability']

    def inside(values):
        return [value if value >= low else None for value in values]

    plot.line([0, 1], [0, 0], 'soft', title='Act on none')
    plot.line(x, inside(curve['all']), 'soft', dashed=True, title='Act on all')
    plot.line(x, inside(curve['benefit']), 's0', title='Act on the predictions')
    if threshold is not None:
        plot.mark(threshold, f'threshold {threshold:.3f}')
    rows = [
        ('s0', 'Act on the predictions'),
        ('soft dashed', 'Act on all images'),
        ('soft', 'Act on none'),
    ]
    return f'{plot}{legend(rows)}'
