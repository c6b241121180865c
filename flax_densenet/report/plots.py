"""Pictures and tables of a run."""

import contextlib
import functools
import logging
import os
import textwrap
import warnings

import numpy as np

from flax_densenet import errors
from flax_densenet.checkpoints import epoch_records
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import bands
from flax_densenet.system import atomic, fonts
from flax_densenet.weights import trained

_LOGGER = logging.getLogger(__name__)
RATES_FILE = 'lr_find.png'
_RATES = 'Learning-rate range test'
TRAIN, TEST, _BEST = '#1f77b4', '#d95f02', '#555555'


def new_figure(width: float, height: float):
    """An empty matplotlib figure with automatic layout; the size is in inches."""
    with errors.extra('report', 'a plot'):  # takes 0.5 s; only if one is made
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def plot_curves(records, *, size: tuple[float, float] = (11, 4.2)):
    """Accuracy and loss by epoch, training and held out, with the best epoch marked.

    Args:
      records: the lines of `metrics.jsonl`, in order.
      size: size of the figure in inches.

    Returns:
      A matplotlib figure with two panels side by side.
    """
    figure = new_figure(*size)
    best = max(records, key=checkpoint_reader.rank)
    held = epoch_records.WORDS[epoch_records.part_of(records[-1])]
    epochs = [record['epoch'] for record in records]
    panels = zip(figure.subplots(1, 2), ('accuracy', 'loss'), (100, 1), strict=True)
    for axes, name, scale in panels:
        trained = [record[f'train_{name}'] for record in records]
        tested = [epoch_records.get(record, name) for record in records]
        for part, color, values in (('training', TRAIN, trained), (held, TEST, tested)):
            shown = [value * scale for value in values]
            axes.plot(epochs, shown, color=color, marker='o', markersize=3, label=part)
        value = epoch_records.get(best, name) * scale
        text = f'{value:.1f}%' if name == 'accuracy' else f'{value:.3f}'
        axes.axvline(best['epoch'], color=_BEST, linestyle=':', linewidth=1)
        axes.plot(
            [best['epoch']],
            [value],
            marker='*',
            markersize=14,
            color=TEST,
            linestyle='none',
            label=f'best epoch ({best["epoch"]}): {held} {text}',
        )
        axes.set_title(name.capitalize())
        axes.set_xlabel('Epoch')
        axes.set_ylabel('Accuracy, %' if name == 'accuracy' else 'Cross-entropy, nats')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def save_curves(workdir: str, records):
    """Writes `curves.png`."""
    with atomic.replacing(os.path.join(workdir, 'curves.png'), 'wb') as file:
        plot_curves(records).savefig(file, format='png', dpi=110)


def save_rates(workdir: str, result) -> str:
    """Writes `lr_find.png` from the result of `lr_finder.find`; returns its name."""
    rates, losses, means = (result[name] for name in ('learning_rate', 'loss', 'mean'))
    heading = f'{_RATES}: {clip(result["data"], 60)}\n{result["network"]}'
    with fonts_for([heading]):
        figure = plot_rates(rates, losses, means, result['suggestion'], heading=heading)
        figure.savefig(os.path.join(workdir, RATES_FILE), dpi=110)
    return RATES_FILE


def plot_rates(rates, losses, means, suggestion, *, heading: str = _RATES):
    """The loss of a learning-rate range test by rate, with the suggestion marked.

    Args:
      rates, losses, means: `[steps]` each; the loss of a step and its running mean.
      suggestion: a learning rate, or None.
      heading: title of the figure.
    """
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    axes.plot(rates, losses, color=TRAIN, alpha=0.35, linewidth=1, label='loss')
    axes.plot(rates, means, color=TRAIN, label='mean')
    if suggestion is not None:
        axes.axvline(
            suggestion,
            color=TEST,
            linestyle='--',
            label=f'suggested: {suggestion:.2g}',
        )
    axes.set_xscale('log')
    # A diverging loss would flatten the relevant part.
    low, start = float(np.min(losses)), float(np.median(losses[: len(losses) // 2]))
    axes.set_ylim(low - 0.1 * (start - low), start + 1.5 * (start - low) + 0.1)
    axes.set_title(heading, fontsize=11, parse_math=False)
    axes.set_xlabel('learning rate')
    axes.set_ylabel('training loss of a step')
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_samples(images, titles, *, columns: int = 8, heading: str = ''):
    """A grid of images uint8 `[N, H, W, 3]` with titles."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(1.5 * columns, 1.75 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis('off')
    for axes, image, title in zip(grid, images, titles, strict=False):
        axes.imshow(image, interpolation='nearest')
        lines = '\n'.join(map(clip, title.split('\n')))
        axes.set_title(lines, fontsize=9, parse_math=False)
    if heading:
        figure.suptitle(heading, fontsize=10, parse_math=False)
    return figure


def title(label, class_names) -> str:
    """The name of a class, or the names of an image's labels."""
    if np.ndim(label) == 0:
        return class_names[label]
    present = [class_names[i] for i in np.flatnonzero(label == 1)]
    return ', '.join(present) or '(none)'


def mixed_title(label, partner, weight, class_names) -> str:
    """`ants 0.7 + bees 0.3`, on two lines if it is too long for one."""
    names = title(label, class_names), title(partner, class_names)
    if names[0] == names[1] or weight == 1:
        return names[0]
    shares = f' {weight:.2f}', f' {1 - weight:.2f}'
    # Names are shortened to fit the numbers.
    text = f'{names[0]}{shares[0]} + {names[1]}{shares[1]}'
    if len(text) <= _TITLE:
        return text
    first = clip(names[0], _TITLE - len(shares[0])) + shares[0]
    return f'{first}\n+ {clip(names[1], _TITLE - 2 - len(shares[1]))}{shares[1]}'


_TITLE = 18  # characters that fit over an image


def clip(title: str, most: int = _TITLE) -> str:
    """A name, shortened to a number of characters."""
    return title if len(title) <= most else title[: most - 1] + '…'


def save_samples(
    workdir: str, batch, class_names, *, mean, std, changes=(), most: int = 24
):
    """Writes `samples.png`: training images as the model sees them.

    Args:
      batch: from `pipeline.train_batches`; normalized as in training and converted
        back. For mixed images it also has `partner_label` and `weight`, the share of
        `label`.
      changes: settings that change the images, for the heading.
    """
    seen = trained.normalize(batch['image'][:most], mean=mean, std=std)
    seen = np.asarray(seen) * np.asarray(std) + np.asarray(mean)
    images = np.clip(np.round(seen * 255), 0, 255).astype(np.uint8)
    images = bands.to_visible(images)
    titles = _titles(batch, class_names)[:most]
    heading = ', '.join(change.removeprefix('data.') for change in changes)
    if heading:
        heading = f'training images of the first step as the model sees them: {heading}'
        heading = textwrap.fill(heading, 90)
    with fonts_for([*titles, heading]):
        figure = plot_samples(images, titles, heading=heading)
        with atomic.replacing(os.path.join(workdir, 'samples.png'), 'wb') as file:
            figure.savefig(file, format='png', dpi=110)


@contextlib.contextmanager
def fonts_for(texts, *, options=None):
    """A context in which matplotlib has fonts for all letters, if any font has them.

    Args:
      texts: all that is to be drawn.
      options: more of matplotlib's.
    """
    with errors.extra('report', 'a plot'):
        import matplotlib as mpl

    texts = list(texts)
    options = {'font.family': fonts.families(texts), **(options or {})}
    missing = fonts.missing(texts)
    if missing:
        _tell_missing(''.join(missing))
    with mpl.rc_context(options), warnings.catch_warnings():
        for letter in missing:  # told above; a warning for each drawing helps nobody
            text = f'Glyph {ord(letter)} '
            warnings.filterwarnings('ignore', message=text, category=UserWarning)
        yield


@functools.cache  # once
def _tell_missing(letters):
    _LOGGER.info(
        f'pictures show a box for {errors.list_first(list(letters))}: no installed '
        'font has it; Noto (fonts-noto) has most, Noto Emoji has emoji'
    )


def _titles(batch, class_names):
    if 'weight' not in batch:
        return [title(label, class_names) for label in batch['label']]
    rows = zip(batch['label'], batch['partner_label'], batch['weight'], strict=True)
    return [mixed_title(*row, class_names) for row in rows]
