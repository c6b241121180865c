"""Figures for papers: curves, confusion matrix, ROC and reliability as SVG and PDF.

They are one column wide, with fonts that have the letters of the class names.
"""

import os

import numpy as np

from flax_densenet.checkpoints import run_folder
from flax_densenet.errors import UserError
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.report import plots, render
from flax_densenet.system import atomic, result_folders

ENDINGS = ('svg', 'pdf')
CONFUSION_FILE = 'confusion.png'
_COLUMN = 3.5  # inches, for one of two columns
_NAMED = 30  # classes; a larger matrix has no room for names
_CURVES = 8  # colored ROC curves; with more classes only the mean


def save(folder: str, workdir: str, found) -> list[str]:
    """Writes all figures of a run.

    Args:
      folder: folder to write; created if missing.
      workdir: folder of the run, for its curves; they are left out if it has none.
      found: an `evaluation.results.Results`.

    Returns:
      Names of the files.

    Raises:
      UserError: the folder cannot be written.
      MissingExtraError: matplotlib is not installed.
    """
    records = run_folder.load_run(workdir).records
    # Text stays editable and searchable; the PDF embeds complete fonts.
    options = {
        'font.size': 8,
        'svg.fonttype': 'none',
        'pdf.fonttype': 42,
        'axes.spines.top': False,
        'axes.spines.right': False,
    }
    names = []
    new = not os.path.isdir(folder) or not os.listdir(folder)
    with plots.fonts_for(found.class_names, options=options):
        made = {'curves': plots.plot_curves(records, size=(7, 2.8))} if records else {}
        if not found.multi_label:
            made['confusion'] = plot_confusion(found)
        made['roc'] = plot_roc(found)
        if found.metrics['calibration']:
            made['reliability'] = plot_reliability(
                found.metrics['calibration'], several=found.multi_label
            )
        for name, figure in made.items():
            for ending in ENDINGS:
                _save(figure, os.path.join(folder, f'{name}.{ending}'))
                names.append(f'{name}.{ending}')
    if new:
        result_folders.mark(folder)  # no names for classes of a later training
    return names


def save_confusion(folder: str, found):
    """Writes the confusion matrix as `confusion.png`, if images have one class."""
    if found.multi_label:
        return
    with (
        plots.fonts_for(found.class_names, options={'font.size': 8}),
        atomic.replacing(os.path.join(folder, CONFUSION_FILE), 'wb') as file,
    ):
        plot_confusion(found).savefig(file, format='png', dpi=160)


def _save(figure, path):
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with atomic.replacing(path, 'wb') as file:
            # No date, so that the same run gives the same bytes.
            key = 'Date' if path.endswith('svg') else 'CreationDate'
            figure.savefig(file, format=path[-3:], metadata={key: None})
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror})') from error


def plot_confusion(found):
    """The confusion matrix as shares of each row, with counts if they fit."""
    names = found.class_names
    count = len(names)
    matrix = metrics_lib.confusion(found.labels, found.predicted, count).toarray()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    short = [plots.clip(name, 24) for name in names]
    # Room for each name, so that nothing overlaps.
    side = max(_COLUMN, 0.2 * count + 0.075 * max(map(len, short)) + 1.1)
    figure = plots.new_figure(*((side, side) if count <= _NAMED else (5, 5)))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, label='Share of the actual class')
    bar.outline.set_visible(False)
    axes.set_xlabel('Predicted class')
    axes.set_ylabel('Actual class')
    if count <= _NAMED:
        flat = max(map(len, short)) * count <= 24
        axes.set_xticks(
            range(count), short, rotation=0 if flat else 90, parse_math=False, size=8
        )
        axes.set_yticks(range(count), short, parse_math=False, size=8)
        size = 8 if count <= 10 else 5
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = 'white' if shares[row, column] > 0.55 else 'black'
            text = str(matrix[row, column])
            axes.text(
                *(column, row, text), ha='center', va='center', color=color, size=size
            )
    return figure


def plot_roc(found):
    """ROC curves of the classes; for many classes, only their mean."""
    figure = plots.new_figure(_COLUMN, _COLUMN)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color='gray', linestyle=':', linewidth=1)
    curves = [row for row in map(_curve, *_columns(found)) if row]
    grid = np.linspace(0, 1, 400)
    for name, false, true, area in curves:
        if len(curves) <= _CURVES:
            axes.plot(false, true, label=f'{plots.clip(name, 24)} ({area:.3f})')
        else:
            axes.plot(false, true, color='lightgray', linewidth=0.5)
    if len(curves) > _CURVES:
        mean = np.mean(
            [np.interp(grid, false, true) for _, false, true, _ in curves], 0
        )
        area = np.mean([area for *_, area in curves])
        label = f'mean of {len(curves)} classes ({area:.3f})'
        axes.plot([0, *grid], [0, *mean], color=plots.TEST, label=label)
    axes.set_xlabel('False positive rate')
    axes.set_ylabel('True positive rate')
    axes.set_aspect('equal')
    if curves:
        legend = figure.legend(
            loc='outside lower center', ncols=2, frameon=False, fontsize=7
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _columns(found):
    names, count = found.class_names, len(found.class_names)
    if found.multi_label:
        labels = list(found.labels.T)
    else:
        labels = [np.where(found.labels == c, 1.0, 0.0) for c in range(count)]
    return names, labels, list(found.probabilities.T)


def _curve(name, labels, probabilities):
    known = ~np.isnan(labels)
    true = labels[known] > 0.5
    curve = metrics_lib.roc(true, probabilities[known])
    if curve is None:
        return None
    area = metrics_lib.area(true, probabilities[known])
    return name, curve['false_positive_rate'], curve['true_positive_rate'], area


def plot_reliability(calibration, *, several=False):
    """Accuracy by confidence, with the number of images per bin below."""
    figure = plots.new_figure(_COLUMN, 3.9)
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color='gray', linestyle=':', linewidth=1)
    shown = calibration['after' if calibration['applied'] else 'before']
    bins = [row for row in shown['bins'] if row['count']]
    error = render.percent(shown['error'])
    axes.plot(
        [row['confidence'] for row in bins],
        [row['accuracy'] for row in bins],
        marker='o',
        markersize=3,
        color=plots.TEST,
        label=f'calibration error {error}',
    )
    axes.set_ylabel('Share of positives' if several else 'Accuracy')
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    number = len(shown['bins'])
    edges = np.linspace(0, 1, number + 1)
    heights = [row['count'] for row in shown['bins']]
    counts.bar(edges[:-1], heights, width=1 / number, align='edge', color='darkgray')
    counts.set_xlabel('Probability' if several else 'Confidence')
    counts.set_ylabel('Labels' if several else 'Images')
    return figure
