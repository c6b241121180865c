"""Checks of the settings, and of a run against its checkpoints and other processes."""

import hashlib
import math
import os

from flax_densenet import losses
from flax_densenet import settings as settings_lib
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import writer as checkpoint_writer
from flax_densenet.data.augment import mixing
from flax_densenet.distributed import processes
from flax_densenet.errors import UserError
from flax_densenet.evaluation import threshold_rules, unusual
from flax_densenet.models import tta
from flax_densenet.train import ema, feature_cache, trackers, training_run

ON_NONFINITE = ('stop', 'skip')
_HOW = ('fast', 'kernel', 'remat')  # how a model is computed, not what it computes


def check_same_run(workdir: str, run: training_run.TrainingRun):
    """Raises if the workdir holds a run with another model, classes or data."""
    latest = checkpoint_reader.find_latest(workdir)
    saved = checkpoint_reader.load_json(workdir, latest, 'metadata')
    remedy = 'use another --workdir, or the same settings'
    new_run = f', or start from its weights: --config.init_from={workdir}'
    saved_names, names = saved['class_names'], list(run.source.class_names)
    if saved_names != names:
        raise UserError(
            f'--workdir={workdir} holds a run on {len(saved_names)} classes '
            f'({_shorten(saved_names)}), data.source has {len(names)} '
            f'({_shorten(names)}); {remedy}'
        )
    before, now = (
        settings_lib.flatten(one)
        for one in (settings_lib.from_saved(saved), run.settings)
    )
    # Runs of versions without windows and bit depths had no window and 8 bits.
    before['data.window'] = before['data.window'] or ()
    before['data.bit_depth'] = before['data.bit_depth'] or 8
    for name in _decisive(run.settings):
        if before[name] != now[name]:
            # The weights of another network would not fit.
            end = '' if name.startswith('model.') else new_run
            raise UserError(
                f'--workdir={workdir} holds a run with {name}={_listed(before[name])}, '
                f'not {_listed(now[name])}; {remedy}{end}'
            )


def _decisive(settings):
    """Names of the settings that must stay as they are when a run resumes."""
    yield from (f'model.{name}' for name in vars(settings.model) if name not in _HOW)
    data = ['batch_size', 'split_seed', 'folds', 'fold']
    data += ['test_fraction', 'val_fraction']
    if settings.data.labels:  # otherwise they change nothing
        data += ['label_kind', 'label_columns', 'blank_labels', 'uncertain_labels']
        data += ['soft_labels']
    yield from (f'data.{name}' for name in (*data, *vars(settings.preparation)))
    # The saved state depends on these.
    yield from ('train.freeze', 'train.head_warmup_epochs', 'train.ema')


def _listed(value):
    """A value as JSON stores it: a list for a tuple."""
    return list(value) if isinstance(value, tuple) else value


def _shorten(names, most=5):
    more = ', ...' if len(names) > most else ''
    return ', '.join(names[:most]) + more


def check_same_everywhere(run: training_run.TrainingRun):
    """Raises if a process has other settings, data or checkpoints than the first one.

    Their steps would not match: they would wait for each other, or train on other
    images than they report.
    """
    if processes.count() == 1:
        return
    fields = settings_lib.flatten(run.settings)
    del fields['init_from']  # irrelevant once there is a checkpoint
    latest = None
    if checkpoint_reader.has_checkpoint(run.workdir):
        latest = checkpoint_reader.find_all(run.workdir)[-1].name
    processes.check_same(
        'run',
        fields
        | {
            '--workdir': os.path.abspath(run.workdir),
            'the newest checkpoint': latest,
            'the list of classes': list(run.source.class_names),
            'the number of images to train on': len(run.source.train),
            'the number of images to choose by': len(run.source.selection),
            'the number of images to test on': len(run.source.test),
            'the checksum of their names': _checksum(run.source),
        },
    )


def _checksum(source):
    """A checksum of the files and their order; empty if there are none."""
    total = hashlib.sha256()
    for examples in source.parts.values():
        keys = examples.reader.keys(examples.indices)
        if keys is None:
            return ''
        total.update(b'\0'.join(keys))
    return total.hexdigest()[:12]


def _check_ranges(settings):
    """Higher values are typing errors: they would use all memory or never finish."""
    loader, train = settings.loader, settings.train
    for name, value, least, most in (
        ('data.threads', loader.threads, 1, 1024),
        ('data.workers', loader.workers, 0, 1024),
        ('train.epochs', train.epochs, 1, 10**6),
        ('train.seed', train.seed, 0, 2**63 - 1),
        ('train.accumulate_steps', train.accumulate_steps, 1, 10**6),
        ('train.patience', train.patience, 0, 10**6),
    ):
        if not least <= value <= most:
            raise UserError(f'{name}={value} must be from {least} to {most}')


def check_settings(settings: settings_lib.Settings):
    """Raises for values that are wrong for any data. All open fields are filled in."""
    preparation, train = settings.preparation, settings.train
    decisions = settings.decisions
    for name, values in preparation.normalization.items():
        if len(values) != preparation.channels:
            raise UserError(
                f'data.{name}={values} needs a number for each of '
                f'{preparation.channels} channels'
            )
    if min(preparation.normalization['std']) <= 0:
        raise UserError(f'data.std={preparation.std} must be above 0')
    _check_ranges(settings)
    if settings.data.folds and not settings.data.fold:
        raise UserError(
            f'data.folds={settings.data.folds} needs the fold to test on, as '
            'data.fold=1; the command crossval trains all of them'
        )
    trackers.parse(train.trackers)
    mixing.from_settings(
        settings.augmentation,
        rows=settings.loader.batch_size // train.accumulate_steps,
    )
    feature_cache.check_cache(train.cache_features)
    losses.make_loss(**vars(settings.loss) | {'pos_weight': ()})
    if settings.decisions.threshold:
        threshold_rules.parse(settings.decisions.threshold)
    ema.check_decay(train.ema)
    tta.check(settings.evaluation.tta)
    unusual.check_settings(
        decisions.unusual,
        share=decisions.unusual_share,
        images=decisions.unusual_images,
    )
    checkpoint_writer.parse_every(train.checkpoint_every)
    if train.on_nonfinite not in ON_NONFINITE:
        raise UserError(
            f'train.on_nonfinite={train.on_nonfinite} is not known; use '
            + ', '.join(ON_NONFINITE)
        )
    clip = settings.optimizer.gradient_clip
    if not 0 <= clip < math.inf:
        raise UserError(
            f'optimizer.gradient_clip={clip:g} must be above 0, or 0 for no limit'
        )
