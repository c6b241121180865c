"""The charts of the pages, as SVG with HTML legends."""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_densenet.checkpoints import epoch_records
from flax_densenet.report import render
from flax_densenet.report.svg import Axis, Plot, format_number

SHARES = tuple((n / 5, f'{n * 20}%') for n in range(6))
_MOST_DOTS, _MOST_TIPS = 60, 300


def legend(rows, *, button: bool = False) -> str:
    """The legend of a chart, with colors and names.

    Args:
      rows: `(style, name)`; a style with `dashed` gets a dashed stroke.
      button: whether a click hides the lines of that group.
    """
    items = []
    for style, name in rows:
        inside = f'<i class="swatch {style}"></i>{html.escape(name)}'
        if button:
            group = html.escape(name, quote=True)
            inside = (
                f'<button type="button" aria-pressed="true" data-group="{group}">'
                f'{inside}</button>'
            )
        items.append(f'<li>{inside}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure(title: str, plot: Plot | str, below: str = '', *, id: str = '') -> str:
    """A chart with its title and the content below it."""
    name = f' id="{id}"' if id else ''
    return (
        f'<figure class="chart"{name}><figcaption>{html.escape(title)}</figcaption>'
        f'{plot}{below}</figure>'
    )


def by_epoch(
    lines: Sequence[dict[str, Any]],
    *,
    title: str,
    unit: str,
    percent: bool = False,
    low: float | None = None,
    high: float | None = None,
    best: int | None = None,
    width: int = 440,
    height: int = 290,
) -> Plot:
    """Lines over the epochs.

    Args:
      Args: lines: each with `name`, `style`, `x` (epochs), `y`, and optionally `group`,
        `dashed` and `muted` (not shown in tooltips).
      percent: whether the values are shares.
      low, high: ends of the axis; by default those of the values.
      best: an epoch to mark.
    """
    finite = [y for line in lines for y in line['y'] if _is_finite(y)] or [0, 1]
    low = min(finite) if low is None else low
    high = max(finite) if high is None else high
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1
    last = max((x for line in lines for x in line['x']), default=1)
    ends = (max(low - room, 0) if low >= 0 else low - room), high + room
    ticks: tuple[tuple[float, str], ...] = ()
    if percent:
        scaled = Axis('', ends[0] * 100, ends[1] * 100).marks()
        ticks = tuple((value / 100, f'{text}%') for value, text in scaled)
    plot = Plot(
        Axis('Epoch', min(1, last), max(last, 2), whole=True),
        Axis(unit, *ends, ticks=ticks),
        label=f'{title} by epoch',
        width=width,
        height=height,
    )
    for line in lines:
        inside = [
            y if _is_finite(y) and ends[0] <= y <= ends[1] else None for y in line['y']
        ]
        plot.line(
            line['x'],
            inside,
            line['style'],
            group=line.get('group', ''),
            dashed=line.get('dashed', False),
            dots=len(line['x']) <= _MOST_DOTS and not line.get('muted'),
        )
    if best is not None:
        plot.mark(best, f'best: epoch {best}')
    told = [line for line in lines if not line.get('muted')]
    if told:
        plot.tips(*_tips(told, percent))
    return plot


def _is_finite(value):
    return value is not None and math.isfinite(value)


def _tips(lines, percent):
    epochs = sorted({x for line in lines for x in line['x']})
    epochs = epochs[:: max(1, -(-len(epochs) // _MOST_TIPS))]
    values = [dict(zip(line['x'], line['y'], strict=True)) for line in lines]
    texts = []
    for epoch in epochs:
        rows = [f'Epoch {epoch}']
        for line, row in zip(lines, values, strict=True):
            value = row.get(epoch)
            if value is not None:
                text = render.percent(value) if percent else format_number(value)
                rows.append(f'{line["name"]}: {text}')
        texts.append('\n'.join(rows))
    return epochs, texts


def training(curves: dict[str, Any]) -> list[str]:
    """The charts of a run: accuracy, loss, mean AUROC if there is one, learning rate.

    Args: curves: from `run_folder.curves`.
    """
    epochs, best = curves['epoch'], curves['best']
    held = epoch_records.WORDS[curves['part']]
    # Prefix of a column, name in legends, style.
    parts = ('train', 'Training', 's0'), ('held', held.capitalize(), 's1')

    def pair(name):
        return [
            {'name': part, 'style': style, 'x': epochs, 'y': curves[f'{key}_{name}']}
            for key, part, style in parts
            if f'{key}_{name}' in curves
        ]

    both = legend([(style, name) for _, name, style in parts])
    made = [
        figure(
            'Accuracy',
            by_epoch(
                pair('accuracy'),
                title=f'Training and {held} accuracy',
                unit='Accuracy',
                percent=True,
                best=best,
            ),
            both,
            id='accuracy',
        ),
        figure(
            'Loss',
            by_epoch(
                pair('loss'),
                title=f'Training and {held} loss',
                unit='Cross-entropy, nats',
                best=best,
            ),
            both,
            id='loss',
        ),
    ]
    if 'held_mean_auroc' in curves:
        title = f'Mean {held} AUROC'
        chart = by_epoch(pair('mean_auroc'), title=title, unit='Mean AUROC', best=best)
        made.append(figure('Mean AUROC', chart, id='auroc'))
    rates = curves['learning_rate']
    line = {'name': 'Learning rate', 'style': 's0', 'x': epochs, 'y': rates}
    chart = by_epoch(
        [line], title='Learning rate', unit='Learning rate', low=0, height=190
    )
    made.append(figure('Learning rate', chart, id='rate'))
    return made


def roc(rows: Sequence[dict[str, Any]], *, colored: int = 10) -> str:
    """ROC curves with a legend below.

    Args:
      rows: `name`, `auroc` and the points of `metrics.roc`, the worst first.
      colored: if there are more curves than this, all but the first three are gray.
    """
    plot = Plot(
        Axis('False positive rate', 0, 1, SHARES),
        Axis('True positive rate', 0, 1, SHARES),
        label='ROC curves',
        height=424,
    )
    plot.line([0, 1], [0, 1], 'soft', dashed=True, title='Chance')
    shown = len(rows) if len(rows) <= colored else 3
    styles = [f's{place}' if place < shown else 'faint' for place in range(len(rows))]
    named = [f'{row["name"]} ({render.figure(row["auroc"])})' for row in rows]
    for row, style, name in reversed(list(zip(rows, styles, named, strict=True))):
        points = row['false_positive_rate'], row['true_positive_rate']
        plot.line(*points, style, title=name, group=name)
    below = legend(list(zip(styles, named, strict=True))[:shown])
    return f'{plot}{below}'


def faithfulness(measured: dict[str, Any]) -> list[str]:
    """The deletion and the insertion curve, each with that of random maps.

    Args:
      measured: from `faithfulness.measure`.
    """
    made = []
    for kind, what in (('deletion', 'hidden'), ('insertion', 'shown')):
        plot = Plot(
            Axis(f'Pixels {what}, the brightest of the map first', 0, 1, SHARES),
            Axis('Probability', 0, 1, SHARES),
            label=f'{kind.title()} curve',
        )
        rows = [('s1', 'The maps'), ('soft dashed', 'Random maps')]
        for (style, name), key in zip(rows, ('map', 'random'), strict=True):
            plot.line(
                measured['shares'],
                measured[kind][key],
                style.split()[0],
                dashed='dashed' in style,
                dots=key == 'map',
                title=f'{name}: area {render.figure(measured[kind][f"{key}_area"])}',
            )
        areas = (render.figure(measured[kind][f'{k}_area']) for k in ('map', 'random'))
        named = [
            (style, f'{name} (area {area})')
            for (style, name), area in zip(rows, areas, strict=True)
        ]
        made.append(figure(kind.title(), plot, legend(named), id=kind))
    return made


def scatter(field: dict[str, Any], *, unit: str, percent: bool) -> Plot:
    """The results of a sweep's combinations over one field.

    Args:
      field: `name`, `values`, `figures`, `spreads`, `names`, `done` and `log`.
    """
    values, figures = field['values'], np.asarray(field['figures'], float)
    spreads = np.asarray(field['spreads'], float)
    scale = 100 if percent else 1
    low, high = (figures - spreads).min(), (figures + spreads).max()
    room = 0.08 * (high - low) or 0.02
    if isinstance(values[0], str):
        kinds = list(dict.fromkeys(values))
        xs = [kinds.index(value) for value in values]
        ticks = tuple((n, _clip(kind)) for n, kind in enumerate(kinds))
        x = Axis(field['name'], -0.5, len(kinds) - 0.5, ticks)
    else:
        xs, ends = values, (min(values), max(values))
        factor = (ends[1] / ends[0]) ** 0.06 if field['log'] else 1
        pad = 0 if field['log'] else 0.06 * (ends[1] - ends[0]) or 1
        x = Axis(
            field['name'],
            ends[0] / factor - pad,
            ends[1] * factor + pad,
            log=field['log'],
        )
    y = Axis(unit, (low - room) * scale, (high + room) * scale)
    if percent:
        percents = tuple((tick, f'{text}%') for tick, text in y.marks())
        y = dataclasses.replace(y, ticks=percents)
    plot = Plot(x, y, label=f'{unit} by {field["name"]}')
    for done, style in ((True, 's0'), (False, 'soft hollow')):
        at = [n for n, there in enumerate(field['done']) if there == done]
        plot.points(
            [xs[n] for n in at],
            [figures[n] * scale for n in at],
            style,
            errors=[spreads[n] * scale if done else 0 for n in at],
            titles=[
                f'Trial {field["names"][n]}: {values[n]}\n{figures[n] * scale:.4g}'
                + '%' * percent
                for n in at
            ],
        )
    return plot


def _clip(text, most=14):
    return text if len(text) <= most else text[: most - 1] + '…'


def compared(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy, loss and learning rate of several runs.

    Args:
      runs: `name` and `curves` (`run_folder.curves`) of each.
    """
    names = [(f's{n % 10}', run['name']) for n, run in enumerate(runs)]
    below = legend(names, button=True)

    def lines(column, *, dashed=False):
        return [
            {
                'name': run['name'] + (', training' if dashed else ''),
                'group': run['name'],
                'style': style,
                'x': run['curves']['epoch'],
                'y': run['curves'][column],
                'dashed': dashed,
            }
            for (style, _), run in zip(names, runs, strict=True)
            if column in run['curves']
        ]

    made = []
    for title, column, options in (
        ('Accuracy', 'accuracy', {'unit': 'Accuracy', 'percent': True}),
        ('Loss', 'loss', {'unit': 'Cross-entropy, nats'}),
    ):
        both = lines(f'held_{column}') + lines(f'train_{column}', dashed=True)
        high = _high_of(both) if column == 'loss' else None
        chart = by_epoch(both, title=title, low=None, high=high, **options)
        made.append(figure(title, chart, below, id=column))
    chart = by_epoch(
        lines('learning_rate'),
        title='Learning rate',
        unit='Learning rate',
        low=0,
        height=190,
    )
    made.append(figure('Learning rate', chart, below, id='rate'))
    return made


def _high_of(lines):
    """The top of a loss axis: a diverged run must not flatten the others."""
    tops = sorted(
        max(filter(_is_finite, line['y']), default=0) for line in lines if line['y']
    )
    middle = tops[len(tops) // 2] if tops else 1
    return min(tops[-1], 4 * middle) if tops else None
