"""Checks of settings, and of a run against its checkpoints and other processes."""

import hashlib
import json
import math
import os

from flax_densenet import losses
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import writer as checkpoint_writer
from flax_densenet.data.augment import mixing
from flax_densenet.distributed import processes
from flax_densenet.errors import UserError
from flax_densenet.models import tta
from flax_densenet.train import ema, feature_cache, training_run

ON_NONFINITE = ('stop', 'skip')
# What runs had before the field was there.
_MODEL_DEFAULTS = {'batch_norm_group': 0}


def check_same_run(workdir: str, metadata):
    """Raises where the workdir holds a run of another model, other classes or seed."""
    latest = checkpoint_reader.find_latest(workdir)
    saved = checkpoint_reader.load_json(workdir, latest, 'metadata')
    remedy = 'use another --workdir, or the same settings'
    saved_names, names = saved['class_names'], metadata['class_names']
    if saved_names != names:
        raise UserError(
            f'--workdir={workdir} holds a run on {len(saved_names)} classes '
            f'({_shorten(saved_names)}), data.source has {len(names)} '
            f'({_shorten(names)}); {remedy}'
        )
    # Through JSON, since a tuple comes back from it as a list.
    model_fields = json.loads(json.dumps(metadata['model']))
    for name, value in model_fields.items():
        if name in ('fast', 'kernel', 'remat'):  # how, not what is computed
            continue
        before = saved['model'].get(name, _MODEL_DEFAULTS.get(name))
        if before != value:
            raise UserError(
                f'--workdir={workdir} holds a run with model.{name}='
                f'{before}, not {value}; {remedy}'
            )
    data_fields = json.loads(json.dumps(metadata['data']))
    for name in (
        *('batch_size', 'source', 'labels', 'split_seed', 'test_fraction'),
        *('image_size', 'resize', 'crop_fraction', 'interpolation', 'channels'),
        *('mean', 'std'),
    ):
        before = saved['data'].get(name)
        if before != data_fields[name]:
            raise UserError(
                f'--workdir={workdir} holds a run with data.{name}={before}, not '
                f'{data_fields[name]}; {remedy}'
            )
    for name, default in training_run.PHASE_FIELDS.items():
        before, now = saved.get('train', {}).get(name, default), metadata['train'][name]
        if before != now:
            raise UserError(
                f'--workdir={workdir} holds a run with train.{name}={before}, not '
                f'{now}; {remedy}, or start from it: --config.init_from={workdir}'
            )


def _shorten(names, most=5):
    more = ', ...' if len(names) > most else ''
    return ', '.join(names[:most]) + more


def check_same_everywhere(run: training_run.TrainingRun):
    """Raises where processes have other settings, data or checkpoints than the first.

    Their steps would not fit together: they would wait for each other, or train on
    other images than they tell.
    """
    if processes.count() == 1:
        return
    fields = {
        f'{section}.{name}': value
        for section, values in run.config.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
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
            'the number of images to test on': len(run.source.test),
            'the checksum of their names': _checksum(run.source),
        },
    )


def _checksum(source):
    """Of the files and their order; empty where there are none."""
    total = hashlib.sha256()
    for examples in (source.train, source.test):
        keys = examples.reader.keys(examples.indices)
        if keys is None:
            return ''
        total.update(b'\0'.join(keys))
    return total.hexdigest()[:12]


# What is above is a slip of the keyboard, and would take all memory or never end.
_RANGES = (
    ('data', 'threads', 1, 1024),
    ('data', 'workers', 0, 1024),
    ('train', 'epochs', 1, 10**6),
    ('train', 'seed', 0, 2**63 - 1),
    ('train', 'accumulate_steps', 1, 10**6),
    ('train', 'patience', 0, 10**6),
)


def check_fields(config):
    """Raises for values that are wrong whatever the data is."""
    fields = config['data']
    for name in ('mean', 'std'):
        if len(fields[name]) != fields['channels']:
            raise UserError(
                f'data.{name}={fields[name]} needs a number for each of '
                f'{fields["channels"]} channels'
            )
    if min(fields['std']) <= 0:
        raise UserError(f'data.std={fields["std"]} must be above 0')
    for section, name, least, most in _RANGES:
        if not least <= (value := config[section][name]) <= most:
            raise UserError(f'{section}.{name}={value} must be from {least} to {most}')
    mixing.from_fields(
        **{name: fields[name] for name in training_run.MIXING_FIELDS},
        rows=fields['batch_size'] // config['train']['accumulate_steps'],
    )
    feature_cache.check_cache(config['train']['cache_features'])
    losses.make_loss(
        **{name: config['train'][name] for name in training_run.LOSS_FIELDS}
    )
    ema.check_decay(config['train']['ema'])
    tta.check(fields['tta'])
    checkpoint_writer.parse_every(config['train']['checkpoint_every'])
    if (choice := config['train']['on_nonfinite']) not in ON_NONFINITE:
        raise UserError(
            f'train.on_nonfinite={choice} is not known; use {", ".join(ON_NONFINITE)}'
        )
    if not 0 <= (clip := config['optimizer']['gradient_clip']) < math.inf:
        raise UserError(
            f'optimizer.gradient_clip={clip:g} must be a length above 0, or 0 for any'
        )
