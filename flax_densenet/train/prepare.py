"""Prepares a run from its settings: data, model, schedule and optimizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax_densenet import settings as settings_lib
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import dataset, identity, images, pipeline
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.errors import UserError
from flax_densenet.evaluation import choosing
from flax_densenet.models import factory, ghost_batch_norm
from flax_densenet.settings import sizes
from flax_densenet.train import (
    by_count,
    checks,
    finetune,
    optimizers,
    progressive_resizing,
    step,
    training_run,
)
from flax_densenet.weights import (
    choices,
    metadata,
    published,
    transfer,
    weight_file,
)


def make_metadata(
    settings: settings_lib.Settings, source: dataset.Source
) -> dict[str, Any]:
    """What evaluation and prediction need besides the arrays, as JSON values."""
    config, train = settings_lib.to_config(settings), settings.train
    return {
        'model': config['model'],
        'class_names': list(source.class_names),
        'image_size': source.train.image_size,
        'mean': list(settings.preparation.normalization['mean']),
        'std': list(settings.preparation.normalization['std']),
        'data': config['data'],
        'multi_label': source.multi_label,
        'images': identity.count(source),
        'identity': identity.describe(source),
        # The fields of `train` that the state depends on.
        'train': {
            'freeze': train.freeze,
            'head_warmup_epochs': train.head_warmup_epochs,
            'ema': train.ema,
        },
    }


def prepare(
    settings: settings_lib.Settings | Mapping[str, Any],
    workdir: str,
    *,
    resume: bool = True,
    source: dataset.Source | None = None,
    class_names: tuple[str, ...] | None = None,
) -> training_run.TrainingRun:
    """Checks all settings and finds the data: all that can fail before compilation.

    Args:
      settings: from `settings.from_config`, or a config that it accepts.
      workdir: folder of the run; a checkpoint there takes precedence over `init_from`.
      resume: False to ignore such a checkpoint.
      source: the source of these settings, if it was loaded before.
      class_names: names of the outputs of `init_from`, if it does not name them.

    Raises:
      UserError: a field, the data or the weights cannot be used.
    """
    resume = resume and checkpoint_reader.has_checkpoint(workdir)
    settings = settings_lib.from_config(settings)
    if class_names and not (resume or settings.init_from):
        raise UserError('--class_names needs weights: --config.init_from=FILE')
    if not resume:  # runs that were started with such values must not be lost
        choices.check_scale(settings.preparation.normalization)
    settings, weights = resolve(settings, workdir if resume else None, class_names)
    if by_count.find_open(settings):
        settings, source = _choose(settings, workdir if resume else None, source)
    checks.check_settings(settings)
    batch_size, mesh = settings.loader.batch_size, mesh_lib.make_mesh()
    mesh_lib.check_batch_size(batch_size, mesh, settings.train.accumulate_steps)
    plan = finetune.plan_of(
        factory.from_settings(settings.model, num_classes=2),
        settings,
        has_weights=weights is not None or resume,
    )
    source = source or dataset.from_settings(settings.data, settings.preparation)
    settings = _with_range(settings, source.train.preparation)
    module = _make_module(settings, len(source.class_names), mesh)
    _check_images(settings, source, module)
    _check_labels(settings, source)
    schedule = optimizers.make_schedule(
        **vars(settings.schedule),
        epochs=settings.train.epochs,
        steps_per_epoch=len(source.train) / batch_size,
    )
    return training_run.TrainingRun(
        settings=settings,
        workdir=workdir,
        source=source,
        module=module,
        mesh=mesh,
        schedule=schedule,
        optimizer=make_optimizer(
            settings,
            plan,
            schedule,
            mesh,
            head_steps=step.last_step_of_epoch(
                plan.head_epochs, len(source.train), batch_size
            ),
        ),
        metadata=make_metadata(settings, source),
        weights=weights,
        plan=plan,
    )


def _with_range(
    settings: settings_lib.Settings, found: images.Preparation
) -> settings_lib.Settings:
    """The range of values as it was found, so that the model always sees it."""
    preparation = dataclasses.replace(
        settings.preparation, window=found.window or (), bit_depth=found.bit_depth
    )
    return dataclasses.replace(settings, preparation=preparation)


def _check_images(settings, source, module):
    """Raises for settings that do not fit the images, before long work."""
    size, augmentation = source.train.image_size, settings.augmentation
    module.check_image_size(sizes.pair(size))
    progressive_resizing.check(augmentation.size_schedule, module, size)
    pipeline.check_train_batches(
        source.train,
        settings.loader.batch_size,
        augmentation.augment,
        settings.loader.workers,
        settings.loader.balance,
        augmentation.color_jitter,
        augmentation.policy,
    )


def _check_labels(settings, source):
    """Raises for settings that do not fit the classes, before long work."""
    training_run.make_loss(settings, source)
    choosing.places_of(
        source.class_names, settings.decisions.positive_class, source.multi_label
    )


def _choose(
    settings: settings_lib.Settings,
    workdir: str | None,
    source: dataset.Source | None,
) -> tuple[settings_lib.Settings, dataset.Source | None]:
    """Fills in the open settings by the number of images; returns the data too.

    Args:
      workdir: folder of the checkpoint to resume from, which gives the number of
        images; or None.
    """
    if workdir:
        saved = metadata.load(workdir, checkpoint_reader.find_latest(workdir))
        count = saved.get('images', {}).get('train')
    else:
        source = source or dataset.from_settings(settings.data, settings.preparation)
        count = len(source.train)
    blocks = len(factory.from_settings(settings.model, num_classes=1).block_sizes)
    return by_count.choose(settings, count or 0, blocks=blocks), source


def _make_module(settings, num_classes, mesh):
    """The model, with `batch_norm_group` as a number of rows."""
    module = factory.from_settings(settings.model, num_classes=num_classes)
    if not module.has_batch_norm:
        return module
    group = ghost_batch_norm.resolve(
        module.batch_norm_group,
        rows=settings.loader.batch_size,
        devices=mesh.size,
        accumulate_steps=settings.train.accumulate_steps,
    )
    return module.clone(batch_norm_group=group)


def make_optimizer(
    settings: settings_lib.Settings,
    plan: finetune.Plan,
    schedule,
    mesh,
    *,
    head_steps: int,
):
    """The optimizer of the settings, at the plan's shares of `schedule`.

    Args:
      schedule: learning rate by step of training.
      mesh: the devices over which `optimizer.shard_state` shards its state.
      head_steps: number of steps at the start in which the head trains alone.
    """
    optimizer = settings.optimizer
    # One device has all of it anyway.
    shard = optimizer.shard_state and mesh.size > 1
    return finetune.make_optimizer(
        lambda first: optimizers.make_optimizer(
            lambda count: schedule(first + count),
            name=optimizer.name,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            decay=optimizer.decay,
            shard_over=mesh if shard else None,
        ),
        plan.rates,
        head_steps=head_steps,
    )


def with_bits(saved: settings_lib.Settings) -> settings_lib.Settings:
    """Settings of an old run, with the window and bit depth that it implied."""
    preparation = saved.preparation
    preparation = dataclasses.replace(
        preparation,
        window=preparation.window or (),
        bit_depth=preparation.bit_depth or 8,
    )
    return dataclasses.replace(saved, preparation=preparation)


def resolve(
    settings: settings_lib.Settings,
    workdir: str | None,
    class_names: tuple[str, ...] | None = None,
) -> tuple[settings_lib.Settings, weight_file.Weights | None]:
    """The settings with their open fields filled in, and the weights to start from.

    Args:
      workdir: folder of the checkpoint that the run resumes from, or None.
    """
    if workdir:  # a resumed run no longer needs its file of weights
        latest = checkpoint_reader.find_latest(workdir)
        saved = settings_lib.from_saved(metadata.load(workdir, latest))
        saved = with_bits(saved)
        return transfer.resolve_from_checkpoint(settings, saved), None
    weights = None
    if settings.init_from:
        try:
            weights = weight_file.load(settings.init_from)
        except UserError as error:
            text, start = str(error), settings.init_from
            field = '' if text.startswith('init_from=') else 'init_from='
            if field and published.is_name(start) and not text.startswith(start):
                field = f'init_from={start}: '
            raise UserError(f'{field}{text}') from error
        weights = transfer.settle(weights, vars(settings.preparation), class_names)
    return transfer.resolve(settings, weights), weights
