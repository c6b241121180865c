"""The lines that a run prints before it starts."""

import logging
import math

import jax

from flax_densenet import errors, settings
from flax_densenet.data import class_balance, dataset
from flax_densenet.models import naming
from flax_densenet.settings import sizes
from flax_densenet.system import environment
from flax_densenet.train import progressive_resizing, training_run

_LOGGER = logging.getLogger(__name__)


def announce(run: training_run.TrainingRun):
    """Prints the model, the data and the devices of the run."""
    size = run.source.train.image_size
    channels = run.source.train.preparation.channels
    variant = run.settings.model.variant
    _LOGGER.info(naming.describe(run.module, variant, channels=channels))
    what = 'labels' if run.source.multi_label else 'classes'
    _LOGGER.info(
        f'{describe_parts(run.source)}, {len(run.source.class_names)} {what}, '
        f'{describe_size(size)} pixels'
    )
    count = run.mesh.size
    _LOGGER.info(
        f'{count} {jax.default_backend().upper()} device{"" if count == 1 else "s"} '
        f'({environment.device_name(jax.devices()[0])})'
    )
    _LOGGER.info(f'output folder: {run.workdir}')
    growing = progressive_resizing.describe(
        progressive_resizing.parse(run.settings.augmentation.size_schedule),
        epochs=run.settings.train.epochs,
        last=size,
    )
    if growing:
        _LOGGER.info(f'images to train on: {growing}')
    if str(run.plan):
        _LOGGER.info(run.plan)
    if missing := describe_missing(run.settings.train):
        _LOGGER.info(missing)
    _print_balance(run)


def describe_parts(source: dataset.Source) -> str:
    """`900 training, 100 validation and 200 test images`."""
    words = {'train': 'training', 'val': 'validation', 'test': 'test'}
    pieces = [f'{len(part):,} {words[name]}' for name, part in source.parts.items()]
    return f'{", ".join(pieces[:-1])} and {pieces[-1]} images'


def describe_size(size: sizes.Size) -> str:
    """`32x32`, or `32x16 (height x width)`."""
    text = sizes.describe(size)
    return text if isinstance(size, int) else f'{text} (height x width)'


def describe_missing(train: settings.TrainingSettings) -> str:
    """The files that are not written because their extras are not installed, or ''."""
    files: dict[str, list[str]] = {'report': [], 'tensorboard': []}
    if not errors.is_installed('matplotlib'):
        files['report'] += ['curves.png', 'samples.png']
    if train.report and not errors.is_installed('jinja2'):
        files['report'].append('report.html')
    if train.tensorboard and not errors.is_installed('tensorboardX'):
        files['tensorboard'].append('TensorBoard events')
    extras = ','.join(extra for extra, missing in files.items() if missing)
    if not extras:
        return ''
    names = ', '.join(file for missing in files.values() for file in missing)
    return f"not written: {names}; they need pip install 'flax_densenet[{extras}]'"


def _print_balance(run):
    balance, train = run.settings.loader.balance, run.source.train
    # TFDS has to read each image to get its label.
    at_hand = train.reader.labels_in_memory
    if run.source.multi_label:
        _print_label_balance(run)
        return
    if balance == 'none' and not at_hand:
        return
    line = class_balance.describe(train.labels, run.source.class_names, balance)
    if line:
        _LOGGER.info(line)
    if not run.plan.head_only and run.module.has_batch_norm:
        _warn_of_few_values(run)


def _print_label_balance(run):
    source, text = run.source, run.settings.loss.pos_weight
    if run.settings.loader.balance == 'sampler':
        _LOGGER.info(
            class_balance.describe_label_draws(source.train.labels, source.class_names)
        )
    weights = class_balance.positive_weights(
        text, source.train.labels, source.class_names
    )
    if weights:
        _LOGGER.info(
            class_balance.describe_positive_weights(weights, source.class_names, text)
        )


def _warn_of_few_values(run):
    """Batch norm learns little from one image, and nothing from one value."""
    rows, fields, remedy = _rows_of_statistics(run)
    sides = map(run.module.last_map_side, sizes.pair(run.size_in(1)))
    if rows * math.prod(sides) == 1:
        _LOGGER.warning(
            f'warning: {fields}: the last batch norms see one value of each '
            'feature, which leaves only their biases, so nothing can be learned; '
            f'{remedy}'
        )
    elif rows == 1:
        _LOGGER.warning(
            f'warning: {fields}: batch norm sees one image at a time, '
            f'so its running statistics are unreliable; {remedy}'
        )


def _rows_of_statistics(run):
    """Images that batch norm sees at a time, the fields that set this, and a remedy."""
    rows, parts = run.batch_size, run.accumulate_steps
    fields = [f'data.batch_size={rows}']
    if parts > 1:
        fields.append(f'train.accumulate_steps={parts}')
    if run.module.batch_norm_group:
        rows = parts * run.module.batch_norm_group
        fields.append(f'model.batch_norm_group={run.settings.model.batch_norm_group}')
    remedy = 'use larger ' + ('groups' if run.module.batch_norm_group else 'batches')
    return rows // parts, ', '.join(fields), remedy
