"""The section of the report about uncertainty: what the model does not know.

Charts of the sets of classes, of the errors among the images that are answered, and of
the scores of unusual images.
"""

from typing import Any

import numpy as np

from flax_densenet.report import charts, render
from flax_densenet.report.svg import Axis, Plot
from flax_densenet.weights import unusual

_BINS = 30
_FROM = 0.5  # lowest coverage on the axis
_SHARES = tuple((n / 10, f'{n * 10}%') for n in range(5, 11))


def section(found) -> dict[str, Any] | None:
    """Values for the template; None if there is nothing to show.

    Args:
      found: an `evaluation.results.Results`.
    """
    doubt = found.doubt
    if 'sets' not in doubt and 'unusual' not in doubt:
        return None
    score = found.decisions.unusual if found.decisions else None
    usual = {'shown': [], 'sets_halved': False, 'unusual': None, 'others': None}
    made: dict[str, Any] = {'charts': [], **usual, **doubt}
    if 'sets' in doubt:
        whats = 'Labels' if found.multi_label else 'Classes'
        made['charts'] += _sets(doubt['sets'], whats)
        made['shown'] = [
            row | {'lowest': _lowest(row['classes'], found.class_names)}
            for row in doubt['sets']
            if row['asked'] >= 0.8
        ]
    if 'risk' in doubt:
        made['charts'].append(_risk(doubt['risk']))
    if 'unusual' in doubt:
        made['method'] = unusual.TITLES[score.method] if score else ''
        made['charts'].append(_scores(found.unusual, found.others))
    return made


def _lowest(coverages, names):
    """The class with the lowest coverage, and its coverage."""
    known = [(value, name) for value, name in zip(coverages, names, strict=True)]
    known = [pair for pair in known if pair[0] is not None]
    if not known:
        return ''
    value, name = min(known)
    return f'{name} ({render.percent(value)})'


def _sets(rows, whats):
    asked = [row['asked'] for row in rows]
    x = Axis('Target coverage', _FROM, 1, _SHARES)
    covered = Plot(x, Axis('Coverage', _FROM, 1, _SHARES), label='Coverage of the sets')
    covered.line([_FROM, 1], [_FROM, 1], 'soft', dashed=True, title='Target')
    measured = [row['coverage'] for row in rows]
    shown = [None if y is None else max(y, _FROM) for y in measured]
    covered.line(asked, shown, 's0', dots=True)
    texts = [_tip(row, whats.lower()) for row in rows]
    covered.tips(asked, texts)
    most = max(1.0, *(row['size'] for row in rows))
    sizes = Plot(x, Axis(f'{whats} in a set', 0, 1.06 * most), label='Size of the sets')
    sizes.line(asked, [row['size'] for row in rows], 's0', dots=True)
    sizes.tips(asked, texts)
    below = charts.legend([('soft dashed', 'Target'), ('s0', 'Measured')])
    return [
        charts.figure('Coverage of the sets', covered, below, id='coverage'),
        charts.figure(f'{whats} in a set, on average', sizes, id='set-size'),
    ]


def _tip(row, whats):
    covered = '-' if row['coverage'] is None else render.percent(row['coverage'])
    return (
        f'Target {row["asked"]:.0%}: {covered} covered\n{row["size"]:.2f} {whats} '
        f'on average\n{row["single"]:.0%} of the sets have one'
    )


def _risk(curve):
    shares, risks = curve['share'], curve['risk']
    most = max(max(risks), 0.01)
    y = Axis('Error rate', 0, 1.06 * most * 100)
    marks = tuple((value / 100, f'{text}%') for value, text in y.marks())
    plot = Plot(
        Axis('Images answered, most confident first', 0, 1, charts.SHARES),
        Axis('Error rate', 0, 1.06 * most, marks),
        label='Errors by the share of images that are answered',
    )
    plot.line(shares, risks, 's0')
    step = max(1, len(shares) // 60)
    texts = [
        f'The most confident {share:.0%}: {render.percent(risk)} errors'
        for share, risk in zip(shares, risks, strict=True)
    ]
    plot.tips(shares[::step], texts[::step])
    return charts.figure(
        'Errors if the least confident images are left out', plot, id='risk'
    )


def _scores(scores, others):
    """Shares of images by score; very large scores are in the last bin."""
    given = scores if others is None else np.concatenate([scores, others.scores])
    low = float(np.floor(2 * np.quantile(given, 0.005)) / 2)
    high = float(max(np.ceil(2 * np.quantile(given, 0.98)) / 2, 2))
    edges = np.linspace(low, high, _BINS + 1)
    kinds = [('Test images', 's0', scores)]
    if others is not None:
        kinds.append((f'Images of {others.name}', 's1', others.scores))
    shares = []
    for _, _, values in kinds:
        counts, _ = np.histogram(np.clip(values, low, high), edges)
        shares.append(counts / len(values))
    most = 1.06 * max(part.max() for part in shares)
    y = Axis('', 0, most * 100)
    marks = tuple((value / 100, f'{text}%') for value, text in y.marks())
    plot = Plot(
        Axis('Score of unusual images', low, high),
        Axis('Images', 0, most, marks),
        label='Images by the score of unusual images',
    )
    middles = (edges[1:] + edges[:-1]) / 2
    for (name, style, _), part in zip(kinds, shares, strict=True):
        plot.line(middles, part, style, title=name)
    plot.mark(1, 'limit')
    below = charts.legend([(style, name) for name, style, _ in kinds])
    return charts.figure('Scores of unusual images', plot, below, id='unusual-scores')
