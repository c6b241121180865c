"""What a run works with, from its config: data, model, schedule and optimizer."""

from typing import Any

from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import dataset, identity, pipeline
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.errors import UserError
from flax_densenet.models import factory, ghost_batch_norm
from flax_densenet.train import (
    checks,
    finetune,
    optimizers,
    progressive_resizing,
    step,
    training_run,
)
from flax_densenet.weights import metadata, transfer, weight_file

_SCHEDULE_FIELDS = ('learning_rate', 'schedule', 'drop_at', 'warmup_epochs')
_OPTIMIZER_FIELDS = ('name', 'momentum', 'weight_decay', 'decay')
# Of config.data, those by which it is found; the others say how it is used.
SOURCE_FIELDS = ('source', *dataset.load_source.__kwdefaults__)


def make_metadata(config, source: dataset.Source) -> dict[str, Any]:
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
        'identity': identity.describe(source.train, source.test),
    }


def prepare(
    config, workdir: str, *, resume: bool = True, source: dataset.Source | None = None
) -> training_run.TrainingRun:
    """Checks all fields and finds the data: all that can fail before compilation.

    Args:
      config: a mapping of the fields of `configs/base.py`.
      workdir: folder of the run; a checkpoint there comes before `init_from`.
      resume: False where such a checkpoint plays no part.
      source: of `load_source` for these fields, where it was looked through already.

    Raises:
      UserError: a field, the data or the weights cannot be used.
    """
    resume = resume and checkpoint_reader.has_checkpoint(workdir)
    config, weights = resolve_config(config, workdir if resume else None)
    checks.check_fields(config)
    fields = config['data']
    batch_size = fields['batch_size']
    mesh = mesh_lib.make_mesh()
    mesh_lib.check_batch_size(batch_size, mesh, config['train']['accumulate_steps'])
    module = factory.create_model(num_classes=2, **config['model'])
    plan = finetune.make_plan(
        module,
        **finetune.plan_fields(config),
        has_weights=weights is not None or resume,
    )
    source = source or load_source(config)
    module = _make_module(config, len(source.class_names), mesh)
    module.check_image_size((source.train.image_size,) * 2)
    progressive_resizing.check(fields['size_schedule'], module)
    pipeline.check_train_batches(
        source.train,
        batch_size,
        workers=fields['workers'],
        **{name: fields[name] for name in training_run.CHANGE_FIELDS},
    )
    schedule = optimizers.make_schedule(
        **{name: config['optimizer'][name] for name in _SCHEDULE_FIELDS},
        epochs=config['train']['epochs'],
        steps_per_epoch=len(source.train) / batch_size,
    )
    return training_run.TrainingRun(
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
            head_steps=step.last_step_of_epoch(
                plan.head_epochs, len(source.train), batch_size
            ),
        ),
        metadata=make_metadata(config, source)
        | {
            'train': {name: config['train'][name] for name in training_run.PHASE_FIELDS}
        },
        weights=weights,
        plan=plan,
    )


def load_source(config) -> dataset.Source:
    """The data of a config whose open fields are filled in."""
    return dataset.load_source(**{name: config['data'][name] for name in SOURCE_FIELDS})


def _make_module(config, num_classes, mesh):
    """The model, its `batch_norm_group` as a number of rows."""
    module = factory.create_model(num_classes=num_classes, **config['model'])
    if not module.has_batch_norm:
        return module
    group = ghost_batch_norm.resolve(
        module.batch_norm_group,
        rows=config['data']['batch_size'],
        devices=mesh.size,
        accumulate_steps=config['train']['accumulate_steps'],
    )
    return module.clone(batch_norm_group=group)


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


def resolve_config(config, workdir):
    """The config with its open fields filled in, and the weights to start from.

    Args:
      workdir: of the checkpoint that the run goes on from, or None.
    """
    saved, weights = None, None
    if workdir:
        latest = checkpoint_reader.find_latest(workdir)
        saved = metadata.load(workdir, latest)
    elif config['init_from']:
        try:
            weights = weight_file.load(config['init_from'])
        except UserError as error:
            raise UserError(f'init_from={error}') from error
    config = {n: dict(v) if isinstance(v, dict) else v for n, v in config.items()}
    for name, settle in (
        ('model', transfer.resolve_model),
        ('data', transfer.resolve_data),
    ):
        if saved:  # a run that goes on needs its weights' file no more
            config[name] = transfer.resolve_from_checkpoint(config[name], saved[name])
        else:
            config[name] = settle(config[name], weights)
    return config, weights
