"""Whether a model recognizes its own uncertainty, measured on labeled images.

    found = doubt.measure(results)
    print('\\n'.join(doubt.describe(found)))

It covers prediction sets (coverage against size), the errors among the images with the
highest confidence, and the score of unusual images.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from flax_densenet.evaluation import conformal, unusual
from flax_densenet.weights import decisions as decisions_lib

SHOWN = 0.9  # the coverage that is printed
_POINTS = 200  # points of the risk curve


@dataclasses.dataclass(frozen=True)
class Others:
    """Images that show none of the classes.

    Attributes:
      name: their source.
      scores: their scores of unusual images, float32 `[M]`.
    """

    name: str
    scores: np.ndarray


def measure(
    probabilities: np.ndarray,
    labels: np.ndarray,
    decisions: decisions_lib.Decisions | None = None,
    *,
    scores: np.ndarray | None = None,
    others: Others | None = None,
) -> dict[str, Any]:
    """Metrics of the model's uncertainty, for JSON; empty if there are none.

    Args:
      probabilities, labels: for N images, as in `results.Results`.
      decisions: the model's decisions, with its sets and share of usual images.
      scores: scores of unusual images, `[N]`.
      others: images of none of the classes.

    Returns:
      `sets`: a row of `conformal.measure` for each coverage; `sets_halved`, whether
      they were fitted on halves of these images because the model's own sets were
      fitted on all of them; `risk` (`conformal.risk_curve`), if images have one class;
      `unusual`: `share` (usual validation images), `flagged` (of these images),
      `accuracy_usual` and `accuracy_unusual` (None without such images); `others`:
      `unusual.measure` and the `name`.
    """
    found: dict[str, Any] = {}
    sets, score = (decisions.sets, decisions.unusual) if decisions else (None, None)
    if sets is not None:
        halved = _are_fitted_on(sets, probabilities, labels)
        if not halved or len(labels) > 1:
            given = None if halved else sets
            found['sets'] = conformal.curve(given, probabilities, labels)
            found['sets_halved'] = halved
    right = None
    if labels.ndim == 1:
        right = probabilities.argmax(-1) == labels
        found['risk'] = _thin(conformal.risk_curve(probabilities.max(-1), right))
    if scores is not None:
        beyond = scores > 1
        found['unusual'] = {
            'share': score.share if score else None,
            'flagged': float(beyond.mean()),
            'accuracy_usual': _mean(right, ~beyond),
            'accuracy_unusual': _mean(right, beyond),
        }
        if others is not None:
            measured = unusual.measure(scores, others.scores)
            found['others'] = {'name': others.name} | measured
    return found


def _are_fitted_on(sets, probabilities, labels):
    """Whether sets were fitted on these images, judged by their stored values."""
    same = conformal.fit(probabilities, labels)
    return same.counts == sets.counts and np.allclose(
        same.probabilities, sets.probabilities, atol=1e-4
    )


def _mean(values, rows):
    if values is None or not rows.any():
        return None
    return float(values[rows].mean())


def _thin(curve):
    """A curve reduced to at most `_POINTS` evenly spaced points, including the last."""
    count = len(curve['share'])
    if count <= _POINTS:
        return curve
    keep = np.unique(np.linspace(0, count - 1, _POINTS).astype(int))
    return curve | {
        name: [curve[name][place] for place in keep] for name in ('share', 'risk')
    }


def add_scores(
    rows: Iterator[list[Any]], scores: np.ndarray | None
) -> Iterator[list[Any]]:
    """The rows of a table, after its heading, with the scores as last column."""
    if scores is None:
        yield from rows
        return
    yield [*next(rows), 'unusual']
    for row, score in zip(rows, scores, strict=True):
        yield [*row, f'{score:.4g}']


def describe(found: dict[str, Any], *, several: bool = False) -> list[str]:
    """Lines for a table of metrics.

    Args:
      found: result of `measure`.
      several: whether images can have several labels.
    """
    lines = []
    rows = [row for row in found.get('sets', ()) if row['asked'] == SHOWN]
    if rows and rows[0]['coverage'] is not None:
        row, what = rows[0], 'labels that are there' if several else 'true classes'
        on_halves = ', on random halves' if found['sets_halved'] else ''
        lines.append(
            f'sets for a coverage of {SHOWN:.0%}: they contain {row["coverage"]:.1%} '
            f'of the {what}; mean size {row["size"]:.2f} of '
            f'{len(row["classes"])}{on_halves}'
        )
    if 'unusual' in found:
        row = found['unusual']
        line = f'unusual: {row["flagged"]:.1%} of these images'
        if row['share'] is not None:
            line += f' ({1 - row["share"]:.1%} of those that set the limit)'
        if row['accuracy_unusual'] is not None and row['accuracy_usual'] is not None:
            line += (
                f'; their accuracy {row["accuracy_unusual"]:.1%}, of the others '
                f'{row["accuracy_usual"]:.1%}'
            )
        lines.append(line)
    if 'others' in found:
        row = found['others']
        lines.append(
            f'{row["others"]:,} images of {row["name"]}: {row["flagged_others"]:.1%} '
            f'are unusual; AUROC {row["auroc"]:.3f}, {row["fpr95"]:.1%} pass a limit '
            'that 95% of these images pass'
        )
    return lines
