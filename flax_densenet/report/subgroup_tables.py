"""Tables of metrics by subgroup, with a bar for the interval of the compared metric."""

from typing import Any

from flax_densenet.data import subgroup_columns
from flax_densenet.evaluation import subgroups
from flax_densenet.report import render

TITLES = {
    'accuracy': 'Accuracy',
    'auroc': 'Mean AUROC',
    'f1': 'F1',
    'recall': 'Sensitivity',
    'specificity': 'Specificity',
    'average_precision': 'Average precision',
}


def section(metrics: dict[str, Any], *, private: bool = False) -> list[dict[str, Any]]:
    """Values for the template, with a table for each column.

    Args:
      metrics: from `evaluation.results.Results`.
      private: leave out columns that are parts of paths.
    """
    return [
        _table(found, metrics)
        for found in metrics['subgroups']
        if not (private and subgroup_columns.is_of_paths(found['column']))
    ]


def _table(found, metrics):
    shown = found['metric']
    names = [shown, *(name for name in TITLES if name != shown)]
    notes = []
    if found['bins']:
        notes.append(f'numbers divided into {found["bins"]}')
    if found['left_out']:
        notes.append(
            f'{found["left_out"]} images in parts of fewer than {subgroups.LEAST} are '
            'left out'
        )
    if found['unknown']:
        notes.append(f'unknown for {found["unknown"]} images')
    whole = metrics[shown] if shown == 'accuracy' else metrics['macro'][shown]
    return {
        'column': found['column'],
        'titles': [TITLES[name] for name in names],
        'notes': '; '.join(notes),
        'sentence': subgroups.describe(found),
        'rows': [_row(row, names, found['looks']) for row in found['rows']],
        'whole': whole,
        'looks': found['looks'],
    }


def _row(row, names, looks):
    p_value = row['p_value']
    return {
        'name': row['name'],
        'count': row['count'],
        'few': row['count'] < subgroups.SMALL,
        'worst': row['worst'],
        'real': p_value is not None and p_value < 0.05 / looks,
        'cells': [_cell(name, row) for name in names],
    }


def _cell(name, row):
    """A value and its interval, both also as text."""
    value, ends = row['values'][name], row['intervals'][name]
    percent = name == 'accuracy'
    text = (render.percent if percent else render.figure)(value)
    told = ''
    if ends:
        low, high = ((100 if percent else 1) * end for end in ends)
        told = f'{low:.1f}–{high:.1f}%' if percent else f'{low:.3f}–{high:.3f}'
    return {'value': value, 'text': text, 'ends': ends, 'told': told}
