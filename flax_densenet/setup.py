"""What a run works with, from its config: checked fields, data, model and optimizer.

Training and whatever else takes training steps (`lr_find`) prepare through this, so
that they mean the same by the same fields.
"""

import dataclasses
import hashlib
import json
import math
import os
import time
from typing import Any

import jax
import numpy as np
import optax

from flax_densenet import (
    averaging,
    balance,
    checkpoint,
    cluster,
    data,
    features,
    finetune,
    groups,
    mixing,
    model,
    objective,
    optimizers,
    pipeline,
    saving,
    sharding,
    sizes,
    sources,
    state_shards,
    step,
    transfer,
    views,
)
from flax_densenet import metadata as metadata_lib
from flax_densenet import weights as weights_lib
from flax_densenet.errors import UserError

_SCHEDULE_FIELDS = ('learning_rate', 'schedule', 'drop_at', 'warmup_epochs')
_LOSS_FIELDS = ('loss', 'label_smoothing', 'focal_gamma')
_OPTIMIZER_FIELDS = ('name', 'momentum', 'weight_decay', 'decay')
# Of config.data, those by which it is found; the others say how it is used.
SOURCE_FIELDS = ('source', *data.load_source.__kwdefaults__)
_CHANGE_FIELDS = ('augment', 'colour_jitter', 'policy', 'balance')
_MIXING_FIELDS = ('erase', 'mixup', 'cutmix')
ON_NONFINITE = ('stop', 'skip')
# The state depends on them; with their defaults.
PHASE_FIELDS = {'freeze': 'none', 'head_warmup_epochs': 0, 'ema': 0.0}
# What runs had before the field was there.
_MODEL_DEFAULTS = {'batch_norm_group': 0}


def make_metadata(config, source: data.Source) -> dict[str, Any]:
    """What evaluation and prediction need beside the arrays; JSON can hold it."""
    return {
        'model': dict(config['model']),
        'class_names': list(source.class_names),
        'image_size': source.train.image_size,
        'mean': list(config['data']['mean']),
        'std': list(config['data']['std']),
        'data': dict(config['data']),
        'multi_label': source.multi_label,
        'images': {'train': len(source.train), 'test': len(source.test)},
    }


def check_same_run(workdir: str, metadata):
    """Raises where the workdir holds a run of another model, other classes or seed."""
    latest = checkpoint.find_latest(workdir)
    saved = checkpoint.load_json(workdir, latest, 'metadata')
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
    for name, default in PHASE_FIELDS.items():
        before, now = saved.get('train', {}).get(name, default), metadata['train'][name]
        if before != now:
            raise UserError(
                f'--workdir={workdir} holds a run with train.{name}={before}, not '
                f'{now}; {remedy}, or start from it: --config.init_from={workdir}'
            )


def _shorten(names, most=5):
    more = ', ...' if len(names) > most else ''
    return ', '.join(names[:most]) + more


@dataclasses.dataclass
class Run:
    """What one call of `train.fit` works with.

    Attributes:
      config: with its open fields filled in.
      schedule: learning rate by step.
      weights: to start from, of `init_from`; None where a checkpoint or the seed gives
        them.
      features: in place of the images, where `cache_features` kept some.
    """

    config: dict[str, Any]
    workdir: str
    source: data.Source
    module: model.DenseNet
    mesh: Any
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    metadata: dict[str, Any]
    weights: weights_lib.Weights | None
    plan: finetune.Plan
    features: data.Source | None = None

    def new_state(self, variables):
        """The state before the first step, on the host."""
        average = None
        if self.config['train']['ema']:
            live = [name for name, rate in self.plan.rates.items() if rate]
            average = averaging.start(variables, live)
        return step.new_state(
            variables,
            self.optimizer,
            multi_label=self.source.multi_label,
            average=average,
        )

    @property
    def loss(self):
        """What the gradient is of."""
        return objective.make_loss(
            **{name: self.config['train'][name] for name in _LOSS_FIELDS}
        )

    @property
    def accumulate_steps(self):
        """Micro-batches of a step."""
        return self.config['train']['accumulate_steps']

    @property
    def mixing(self) -> mixing.Mixing:
        """What is done to the images of a micro-batch on the device."""
        fields = {name: self.config['data'][name] for name in _MIXING_FIELDS}
        return mixing.from_fields(**fields, rows=self.part_size)

    def size_in(self, epoch: int) -> int:
        """Pixels a side of the training images in an epoch, counted from 1."""
        return sizes.size_in(
            sizes.parse(self.config['data']['size_schedule']),
            epoch,
            epochs=self.config['train']['epochs'],
            last=self.source.train.image_size,
        )

    def size_at(self, start: int) -> int:
        """The same for the step behind the first `start` ones."""
        count, rows = len(self.source.train), self.config['data']['batch_size']
        # The first epoch with steps behind them (`step.epoch_end`).
        return self.size_in(start * rows // count + 1)

    @property
    def part_size(self):
        """Rows that are computed at a time, over all devices; in evaluation too."""
        return self.config['data']['batch_size'] // self.accumulate_steps

    def place_state(self, state):
        """A state on the host, the same on all hosts, to the devices."""
        return sharding.replicate(state.replace(opt_state=()), self.mesh).replace(
            opt_state=state_shards.place(state.opt_state, self.mesh)
        )

    def place_batch(self, batch):
        """This host's rows of a training batch to the devices."""
        return sharding.to_global(batch, self.mesh, self.accumulate_steps)

    @property
    def preprocessing(self):
        """How the model normalises images."""
        return {name: tuple(self.config['data'][name]) for name in ('mean', 'std')}

    @property
    def loading(self):
        """How batches are read."""
        fields = {name: self.config['data'][name] for name in ('threads', 'workers')}
        # Each process would get a copy of the features.
        return fields | {'workers': 0} if self.features else fields


def prepare(
    config, workdir: str, *, resume: bool = True, source: data.Source | None = None
) -> Run:
    """Checks all fields and finds the data: all that can fail before compilation.

    Args:
      config: a mapping of the fields of `configs/base.py`.
      workdir: folder of the run; a checkpoint there comes before `init_from`.
      resume: False where such a checkpoint plays no part.
      source: of `load_source` for these fields, where it was looked through already.

    Raises:
      UserError: a field, the data or the weights cannot be used.
    """
    resume = resume and checkpoint.has_checkpoint(workdir)
    config, weights = _settle(config, workdir if resume else None)
    _check_fields(config)
    fields = config['data']
    batch_size = fields['batch_size']
    mesh = sharding.make_mesh()
    sharding.check_batch_size(batch_size, mesh, config['train']['accumulate_steps'])
    module = model.create_model(num_classes=2, **config['model'])
    plan = finetune.make_plan(
        module,
        **finetune.plan_fields(config),
        has_weights=weights is not None or resume,
    )
    source = source or load_source(config)
    module = _make_module(config, len(source.class_names), mesh)
    model.check_image_size(module, (source.train.image_size,) * 2)
    sizes.check(fields['size_schedule'], module)
    pipeline.check_train_batches(
        source.train,
        batch_size,
        workers=fields['workers'],
        **{name: fields[name] for name in _CHANGE_FIELDS},
    )
    schedule = optimizers.make_schedule(
        **{name: config['optimizer'][name] for name in _SCHEDULE_FIELDS},
        epochs=config['train']['epochs'],
        steps_per_epoch=len(source.train) / batch_size,
    )
    return Run(
        config=config,
        workdir=workdir,
        source=source,
        module=module,
        mesh=mesh,
        schedule=schedule,
        optimizer=make_optimizer(
            config,
            plan,
            schedule,
            mesh,
            head_steps=step.epoch_end(plan.head_epochs, len(source.train), batch_size),
        ),
        metadata=make_metadata(config, source)
        | {'train': {name: config['train'][name] for name in PHASE_FIELDS}},
        weights=weights,
        plan=plan,
    )


def load_source(config) -> data.Source:
    """The data of a config whose open fields are filled in."""
    return data.load_source(**{name: config['data'][name] for name in SOURCE_FIELDS})


def _make_module(config, num_classes, mesh):
    """The model, its `batch_norm_group` as a number of rows."""
    module = model.create_model(num_classes=num_classes, **config['model'])
    if not isinstance(module, model.DenseNet):  # without batch norm
        return module
    group = groups.resolve(
        module.batch_norm_group,
        rows=config['data']['batch_size'],
        devices=mesh.size,
        accumulate_steps=config['train']['accumulate_steps'],
    )
    return module.clone(batch_norm_group=group)


def check_same_everywhere(run: Run):
    """Raises where processes have other settings, data or checkpoints than the first.

    Their steps would not fit together: they would wait for each other, or train on
    other images than they tell.
    """
    if cluster.count() == 1:
        return
    fields = {
        f'{section}.{name}': value
        for section, values in run.config.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
    latest = None
    if checkpoint.has_checkpoint(run.workdir):
        latest = checkpoint.find_all(run.workdir)[-1].name
    cluster.check_same(
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
    reader = source.train.reader
    if isinstance(reader, sources.ArrayReader | sources.TfdsReader):
        return ''
    total = hashlib.sha256()
    for examples in (source.train, source.test):
        total.update(b'\0'.join(reader.keys(examples.indices)))
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


def _check_fields(config):
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
        **{name: fields[name] for name in _MIXING_FIELDS},
        rows=fields['batch_size'] // config['train']['accumulate_steps'],
    )
    features.check_cache(config['train']['cache_features'])
    objective.make_loss(**{name: config['train'][name] for name in _LOSS_FIELDS})
    averaging.check_decay(config['train']['ema'])
    views.check(fields['tta'])
    saving.parse_every(config['train']['checkpoint_every'])
    if (choice := config['train']['on_nonfinite']) not in ON_NONFINITE:
        raise UserError(
            f'train.on_nonfinite={choice} is not known; use {", ".join(ON_NONFINITE)}'
        )
    if not 0 <= (clip := config['optimizer']['gradient_clip']) < math.inf:
        raise UserError(
            f'optimizer.gradient_clip={clip:g} must be a length above 0, or 0 for any'
        )


def make_optimizer(config, plan: finetune.Plan, schedule, mesh, *, head_steps: int):
    """The optimizer of the config's fields, at the plan's shares of `schedule`.

    Args:
      schedule: learning rate by step of training.
      mesh: over which `optimizer.shard_state` spreads its state.
      head_steps: for so many steps, from the first, the head trains alone.
    """
    fields = {name: config['optimizer'][name] for name in _OPTIMIZER_FIELDS}
    # One device has all of it anyhow.
    shard = config['optimizer']['shard_state'] and mesh.size > 1
    fields['shard_over'] = mesh if shard else None
    return finetune.make_optimizer(
        lambda first: optimizers.make_optimizer(
            lambda count: schedule(first + count), **fields
        ),
        plan.rates,
        head_steps=head_steps,
    )


def _settle(config, workdir):
    """The config with its open fields filled in, and the weights to start from.

    Args:
      workdir: of the checkpoint that the run goes on from, or None.
    """
    saved, weights = None, None
    if workdir:
        latest = checkpoint.find_latest(workdir)
        saved = metadata_lib.load(workdir, latest)
    elif config['init_from']:
        try:
            weights = weights_lib.load(config['init_from'])
        except UserError as error:
            raise UserError(f'init_from={error}') from error
    config = {n: dict(v) if isinstance(v, dict) else v for n, v in config.items()}
    for name, settle in (
        ('model', transfer.settle_model),
        ('data', transfer.settle_data),
    ):
        if saved:  # a run that goes on needs its weights' file no more
            config[name] = transfer.fill(config[name], saved[name])
        else:
            config[name] = settle(config[name], weights)
    return config, weights


def first_variables(run: Run):
    """`{'params', 'batch_stats'}` on the host, of `init_from` or of the seed."""
    variables = model.init_variables(
        run.module,
        seed=run.config['train']['seed'],
        channels=run.config['data']['channels'],
    )
    if run.weights is None:
        return variables
    names = run.source.class_names
    return transfer.first_variables(run.weights, variables, names)


def examples_at(run: Run, source: data.Source, start: int):
    """The training part of a source at its images' size behind `start` steps."""
    size = run.size_at(start)
    return source.train if run.features else source.train.at_size(size)


def train_batches(run: Run, source: data.Source, start: int, **loading):
    """The batches of the training part from a step on; see `pipeline.train_batches`.

    All have the size of the first one (`Run.size_at`).

    Args:
      **loading: in place of the run's own way to read.
    """
    fields = run.config['data']
    return pipeline.train_batches(
        examples_at(run, source, start),
        batch_size=fields['batch_size'],
        seed=run.config['train']['seed'],
        start=start,
        **{name: fields[name] for name in _CHANGE_FIELDS},
        bad_images=fields['bad_images'],
        parts=run.accumulate_steps,
        **run.loading | loading,
    )


def announce(run: Run):
    """Prints what is trained on what."""
    side = run.source.train.image_size
    print(
        f'{run.config["model"]["variant"]}: {len(run.source.train)} images to train '
        f'on, {len(run.source.test)} to test on, {len(run.source.class_names)} '
        f'classes, {side}x{side}; {run.mesh.size} {jax.default_backend()} device(s)',
        flush=True,
    )
    growing = sizes.describe(
        sizes.parse(run.config['data']['size_schedule']),
        epochs=run.config['train']['epochs'],
        last=side,
    )
    if growing:
        print(f'images to train on: {growing}', flush=True)
    if str(run.plan):
        print(run.plan, flush=True)
    _say_balance(run)


def _say_balance(run):
    said, train = run.config['data']['balance'], run.source.train
    # TFDS has to read each image for its label.
    at_hand = isinstance(train.reader.labels, np.ndarray)
    if run.source.multi_label or (said == 'none' and not at_hand):
        return
    line = balance.describe(train.labels, run.source.class_names, said)
    if line:
        print(line, flush=True)
    if not run.plan.head_only and model.has_batch_norm(run.module):
        _warn_of_few_values(run)


def _warn_of_few_values(run):
    """Batch norm learns little from one image, and nothing from one value."""
    rows, said, remedy = _rows_of_statistics(run)
    side = model.last_map_side(run.module, run.size_in(1))
    if rows == side == 1:
        print(
            f'warning: {said}: the last batch norms see one value of each '
            'feature, which leaves only their biases: nothing can be learned; '
            f'{remedy}',
            flush=True,
        )
    elif rows == 1:
        print(
            f'warning: {said}: batch norm sees one image at a time, by '
            f'which its running statistics say little; {remedy}',
            flush=True,
        )


def _rows_of_statistics(run):
    """How many images batch norm sees at a time, the fields for it, a remedy."""
    rows, parts = run.config['data']['batch_size'], run.accumulate_steps
    said = [f'data.batch_size={rows}']
    if parts > 1:
        said.append(f'train.accumulate_steps={parts}')
    if run.module.batch_norm_group:
        rows = parts * run.module.batch_norm_group
        said.append(f'model.batch_norm_group={run.config["model"]["batch_norm_group"]}')
    remedy = 'use larger ' + ('groups' if run.module.batch_norm_group else 'batches')
    return rows // parts, ', '.join(said), remedy


def cache_features(run: Run, state: step.TrainState) -> data.Source | None:
    """The source with features in place of images that are always the same."""
    if not run.plan.head_only or run.config['train']['cache_features'] == 'off':
        return None
    fields = run.config['data']
    return features.cache_features(
        run.module,
        {'params': state.params, 'batch_stats': state.batch_stats},
        run.source,
        changes=features.list_changes(fields),
        limit_gib=fields['cache_limit_gib'],
        batch_size=run.part_size,
        mesh=run.mesh,
        **run.preprocessing,
        **run.loading,
    )


def compile_step(run: Run, state: step.TrainState, frozen: int, start: int = 0):
    """Compiles `(state, batch) -> (state, loss)`, which donates the state.

    Args:
      frozen: how many of `model.stages` stay as they are.
      start: steps that were taken; the images' size may depend on them.
    """
    rows, parts = (run.config['data']['batch_size'],), run.accumulate_steps
    by_rows = sharding.split_rows(run.mesh)
    if parts > 1:
        rows, by_rows = (parts, rows[0] // parts), sharding.split_parts(run.mesh)
    example = examples_at(run, run.features or run.source, start)[0]
    example |= {'epoch': np.int32(0)}
    batch = {
        name: jax.ShapeDtypeStruct((*rows, *value.shape), value.dtype, sharding=by_rows)
        for name, value in example.items()
    }
    train_step = step.make_train_step(
        run.module,
        run.optimizer,
        seed=run.config['train']['seed'],
        l2_penalty=run.config['optimizer']['l2_penalty'],
        gradient_clip=run.config['optimizer']['gradient_clip'],
        frozen=frozen,
        class_weights=class_weights(run),
        mix=run.mixing,
        accumulate_steps=parts,
        loss=run.loss,
        ema=run.config['train']['ema'],
        **run.preprocessing,
    )
    start = time.perf_counter()
    compiled = step.compile_train_step(train_step, state, batch, run.mesh)
    print(f'compiled in {time.perf_counter() - start:.1f} s', flush=True)
    return compiled


def class_weights(run):
    """Of `data.balance=loss`, else None."""
    if run.config['data']['balance'] != 'loss':
        return None
    return balance.class_weights(run.source.train.labels, len(run.source.class_names))
