"""Training: from a config to checkpoints, one line per epoch, and curves.

The data's position is a function of the step counter as well (see `step`), so a
checkpoint needs nothing but arrays, and the same command again goes on where it was.
"""

import collections
import dataclasses
import json
import math
import os
import resource
import sys
import threading
import time
from concurrent import futures
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from flax_densenet import (
    checkpoint,
    data,
    evaluate,
    features,
    finetune,
    model,
    report,
    sharding,
    step,
    transfer,
)
from flax_densenet import weights as weights_lib
from flax_densenet.errors import UserError

_SCHEDULE_FIELDS = ('learning_rate', 'schedule', 'drop_at', 'warmup_epochs')
# The state of the optimizer depends on them; with their defaults.
_PHASE_FIELDS = {'freeze': 'none', 'head_warmup_epochs': 0}
METRICS_FILE = 'metrics.jsonl'
CONFIG_FILE = 'config.json'


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
    }


def _check_same_run(workdir, metadata):
    """Raises where the workdir holds a run of another model, other classes or seed."""
    latest = checkpoint.find_step(workdir, 'latest')
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
        if saved['model'].get(name) != value:
            raise UserError(
                f'--workdir={workdir} holds a run with model.{name}='
                f'{saved["model"].get(name)}, not {value}; {remedy}'
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
    for name, default in _PHASE_FIELDS.items():
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
class _Run:
    """What one call of `fit` works with."""

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
    features: data.Source | None = None  # in place of the images, where cached

    def new_state(self, variables):
        return step.new_state(
            variables, self.optimizer, multi_label=self.source.multi_label
        )

    @property
    def preprocessing(self):
        return {name: tuple(self.config['data'][name]) for name in ('mean', 'std')}

    @property
    def loading(self):
        fields = {name: self.config['data'][name] for name in ('threads', 'workers')}
        # Each process would get a copy of the features.
        return fields | {'workers': 0} if self.features else fields


def _prepare(config, workdir) -> _Run:
    """Checks all fields and finds the data: all that can fail before compilation."""
    config, weights = _settle(config, workdir)
    fields = config['data']
    batch_size, augment = fields['batch_size'], fields['augment']
    mesh = sharding.make_mesh()
    sharding.check_batch_size(batch_size, mesh)
    for name in ('mean', 'std'):
        if len(fields[name]) != fields['channels']:
            raise UserError(
                f'data.{name}={fields[name]} needs a number for each of '
                f'{fields["channels"]} channels'
            )
    if min(fields['std']) <= 0:
        raise UserError(f'data.std={fields["std"]} must be above 0')
    for name in ('threads', 'workers'):
        if fields[name] < (name == 'threads'):
            raise UserError(f'data.{name}={fields[name]} is too small')
    if config['train']['epochs'] < 1:
        raise UserError(f'train.epochs={config["train"]["epochs"]} must be at least 1')
    module = model.create_model(num_classes=2, **config['model'])
    plan = finetune.make_plan(
        module,
        **finetune.plan_fields(config),
        has_weights=weights is not None or checkpoint.has_checkpoint(workdir),
    )
    features.check_cache(config['train']['cache_features'])
    loading = {name: fields[name] for name in data.load_source.__kwdefaults__}
    source = data.load_source(fields['source'], **loading)
    module = model.create_model(num_classes=len(source.class_names), **config['model'])
    model.check_image_size(module, (source.train.image_size,) * 2)
    data.check_train_batches(source.train, batch_size, augment, fields['workers'])
    optimizer = dict(config['optimizer'])
    for name in ('l2_penalty', 'layer_decay', 'head_multiplier'):
        optimizer.pop(name)
    schedule = step.make_schedule(
        **{name: optimizer.pop(name) for name in _SCHEDULE_FIELDS},
        epochs=config['train']['epochs'],
        steps_per_epoch=len(source.train) / batch_size,
    )
    return _Run(
        config=config,
        workdir=workdir,
        source=source,
        module=module,
        mesh=mesh,
        schedule=schedule,
        optimizer=finetune.make_optimizer(
            lambda first: step.make_optimizer(
                lambda count: schedule(first + count), **optimizer
            ),
            plan.rates,
            head_steps=step.epoch_end(plan.head_epochs, len(source.train), batch_size),
        ),
        metadata=make_metadata(config, source)
        | {'train': {name: config['train'][name] for name in _PHASE_FIELDS}},
        weights=weights,
        plan=plan,
    )


def _settle(config, workdir):
    """The config with its open fields filled in, and the weights to start from."""
    saved, weights = None, None
    if checkpoint.has_checkpoint(workdir):
        latest = checkpoint.find_step(workdir, 'latest')
        saved = checkpoint.load_json(workdir, latest, 'metadata')
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


def fit(config, workdir: str) -> dict[str, Any]:
    """Trains, evaluates after each epoch, and keeps the latest and best checkpoint.

    The state comes from the latest checkpoint in `workdir`, else from
    `config.init_from`, else from `train.seed`, in this order.

    Args:
      config: a mapping of the fields of `configs/base.py`.
      workdir: folder of the run; made where absent.

    Returns:
      The record of the best epoch, as in `metrics.jsonl`.

    Raises:
      UserError: a field, the data or the workdir cannot be used, or the loss is no
        longer finite.
    """
    run = _prepare(config, workdir)
    if checkpoint.has_checkpoint(workdir):
        _check_same_run(workdir, run.metadata)
    with checkpoint.open_checkpoints(workdir) as manager:
        state, epochs_done = _start(run, manager)
        records = _keep_records(workdir, epochs_done)
        epochs = run.config['train']['epochs']
        if epochs_done < epochs:
            _write_run_files(run)
            _announce(run)
            run.features = _cache_features(run, state)
            batches = _train_batches(run, run.features or run.source, int(state.step))
            try:
                compiled = _compile(run, state, run.plan.frozen_in(epochs_done + 1))
                # A second of drawing, for which the first step need not wait.
                with futures.ThreadPoolExecutor(1) as beside:
                    samples = beside.submit(_save_samples, run)
                    for epoch in range(epochs_done + 1, epochs + 1):
                        if epochs_done < run.plan.head_epochs == epoch - 1:
                            compiled = _compile(run, state, run.plan.frozen)
                        args = run, compiled, state, batches, epoch
                        state, record = _train_epoch(*args)
                        samples.result()
                        record |= _test(run, state)
                        _check_finite(record)
                        _save(run, manager, state, record)
                        records.append(record)
                        print(format_epoch(record), flush=True)
            finally:
                batches.close()
        else:
            print(f'{workdir} has its {epochs} epochs already; nothing to train')
    best = max(records, key=checkpoint.rank)
    if sharding.is_writer():
        report.save_curves(workdir, records)
        print(
            f'best: epoch {best["epoch"]}, Test_acc: {best["test_accuracy"]:.1%}; '
            f'checkpoints, curves.png and samples.png are in {workdir}',
            flush=True,
        )
    return best


def format_epoch(record: dict[str, Any]) -> str:
    """The line of an epoch."""
    auroc = ''
    if 'test_mean_auroc' in record:
        area = evaluate.format_auroc(record['test_mean_auroc'])
        auroc = f'Test_auroc: {area}, '
    return (
        f'Epoch: {record["epoch"]:2d}. '
        f'Train_acc: {record["train_accuracy"] * 100:.1f}%, '
        f'Train_loss: {record["train_loss"]:.3f}, '
        f'Test_acc: {record["test_accuracy"] * 100:.1f}%, '
        f'Test_loss: {record["test_loss"]:.3f}, '
        f'{auroc}Lr: {record["learning_rate"]:.2E}'
    )


def _start(run, manager):
    """The state to start from, on the devices, and the epochs that it has seen."""
    variables = model.init_variables(
        run.module,
        seed=run.config['train']['seed'],
        channels=run.config['data']['channels'],
    )
    if checkpoint.has_checkpoint(run.workdir):
        latest = checkpoint.find_step(run.workdir, 'latest')
        abstract = run.new_state(variables)
        items = checkpoint.restore(
            manager,
            latest,
            sharding=sharding.replicated(run.mesh),
            **_checkpoint_items(abstract),
        )
        metadata = checkpoint.load_json(run.workdir, latest, 'metadata')
        print(f'going on after epoch {metadata["epoch"]} in {run.workdir}', flush=True)
        return step.TrainState(**items['model'], **items['train']), metadata['epoch']
    if run.weights is not None:
        names = run.source.class_names
        variables = transfer.first_variables(run.weights, variables, names)
    return sharding.replicate(run.new_state(variables), run.mesh), 0


def _checkpoint_items(state):
    return {
        'model': {'params': state.params, 'batch_stats': state.batch_stats},
        'train': {
            'step': state.step,
            'opt_state': state.opt_state,
            'running': state.running,
        },
    }


def _keep_records(workdir, epochs_done):
    """The records of the finished epochs; later ones, without a checkpoint, go."""
    path = os.path.join(workdir, METRICS_FILE)
    records = []
    if epochs_done and os.path.exists(path):
        with open(path) as file:
            records = [json.loads(line) for line in file if line.endswith('}\n')]
        records = [record for record in records if record['epoch'] <= epochs_done]
    if sharding.is_writer():
        with open(path, 'w') as file:
            file.writelines(json.dumps(record) + '\n' for record in records)
    return records


def _write_run_files(run):
    if not sharding.is_writer():
        return
    with open(os.path.join(run.workdir, CONFIG_FILE), 'w') as file:
        json.dump(run.config, file, indent=2)
    skipped = run.source.skipped
    path = os.path.join(run.workdir, 'skipped_images.txt')
    if skipped:
        with open(path, 'w', errors='surrogateescape') as file:
            file.writelines(f'{line}\n' for line in skipped)
        print(f'skipped {len(skipped)} bad images, listed in {path}', flush=True)


def _save_samples(run):
    if not sharding.is_writer():
        return
    if sys.platform.startswith('linux'):  # there this is about the thread alone
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    batches = _train_batches(run, run.source, 0)
    report.save_samples(
        run.workdir, next(batches), run.source.class_names, **run.preprocessing
    )
    batches.close()


def _train_batches(run, source, start):
    fields = run.config['data']
    return data.train_batches(
        source.train,
        batch_size=fields['batch_size'],
        seed=run.config['train']['seed'],
        start=start,
        augment=fields['augment'],
        **run.loading,
    )


def _announce(run):
    """Prints what is trained on what."""
    side = run.source.train.image_size
    print(
        f'{run.config["model"]["variant"]}: {len(run.source.train)} images to train '
        f'on, {len(run.source.test)} to test on, {len(run.source.class_names)} '
        f'classes, {side}x{side}; {run.mesh.size} {jax.default_backend()} device(s)',
        flush=True,
    )
    if str(run.plan):
        print(run.plan, flush=True)


def _cache_features(run, state):
    """The source with features in place of images that are always the same."""
    if not run.plan.head_only or run.config['train']['cache_features'] == 'off':
        return None
    fields = run.config['data']
    return features.cache_features(
        run.module,
        {'params': state.params, 'batch_stats': state.batch_stats},
        run.source,
        augment=fields['augment'],
        limit_gib=fields['cache_limit_gib'],
        batch_size=fields['batch_size'],
        mesh=run.mesh,
        **run.preprocessing,
        **run.loading,
    )


def _compile(run, state, frozen):
    rows, by_rows = run.config['data']['batch_size'], sharding.split_rows(run.mesh)
    example = (run.features or run.source).train[0] | {'epoch': np.int32(0)}
    batch = {
        name: jax.ShapeDtypeStruct((rows, *value.shape), value.dtype, sharding=by_rows)
        for name, value in example.items()
    }
    train_step = step.make_train_step(
        run.module,
        run.optimizer,
        seed=run.config['train']['seed'],
        l2_penalty=run.config['optimizer']['l2_penalty'],
        frozen=frozen,
        **run.preprocessing,
    )
    start = time.perf_counter()
    compiled = step.compile_train_step(train_step, state, batch, run.mesh)
    print(f'compiled in {time.perf_counter() - start:.1f} s', flush=True)
    return compiled


def _train_epoch(run, compiled, state, batches, epoch):
    """Takes the steps of an epoch; returns the state and the training figures."""
    count, rows = len(run.source.train), run.config['data']['batch_size']
    first = int(state.step)
    steps = step.epoch_end(epoch, count, rows) - first
    started, waited = time.perf_counter(), 0.0
    # A GPU gets its next step before it has finished this one; on a CPU that would
    # gain nothing and need the memory of two steps.
    ahead = 0 if jax.default_backend() == 'cpu' else 1
    losses = collections.deque()
    bar = tqdm(
        total=steps * rows,
        desc=f'epoch {epoch}/{run.config["train"]["epochs"]}',
        unit=' images',
        leave=False,
        disable=None,  # no bar where stderr is a file
    )
    with bar, jax.transfer_guard('disallow'):
        for _ in range(steps):
            asked = time.perf_counter()
            batch = sharding.to_global(next(batches), run.mesh)
            if not losses or losses[-1].is_ready():  # the devices had nothing to do
                waited += time.perf_counter() - asked
            while len(losses) > ahead:
                bar.set_postfix(loss=f'{float(jax.device_get(losses.popleft())):.3f}')
            state, loss = compiled(state, batch)
            losses.append(loss)
            bar.update(rows)
        jax.block_until_ready(state)
    seconds = time.perf_counter() - started
    running = jax.device_get(state.running)
    seen = int(running['count'][0])
    return state, {
        'epoch': epoch,
        'step': first + steps,
        'train_accuracy': float(running['correct'][0] / seen),
        'train_loss': float(running['loss'][0] / seen),
        'train_count': seen,
        'learning_rate': float(run.schedule(first + steps - 1)),
        'seconds': round(seconds, 3),
        'images_per_second': round(steps * rows / seconds, 2),
        'input_wait_share': round(waited / seconds, 4),
        'peak_memory_gib': round(_peak_memory_gib(), 3),
    }


def _peak_memory_gib():
    """Of the device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and 'peak_bytes_in_use' in stats:
        return stats['peak_bytes_in_use'] / 2**30
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _test(run, state):
    metrics = evaluate.evaluate(
        run.module,
        {'params': state.params, 'batch_stats': state.batch_stats},
        (run.features or run.source).test,
        batch_size=run.config['data']['batch_size'],
        mesh=run.mesh,
        **run.preprocessing,
        **run.loading,
    )
    found = {'test_accuracy': metrics['accuracy'], 'test_loss': metrics['loss']}
    if run.source.multi_label:
        found['test_mean_auroc'] = metrics['mean_auroc']
        names = run.source.class_names
        found['test_auroc'] = dict(zip(names, metrics['auroc'], strict=True))
    return found


def _check_finite(record):
    if not math.isfinite(record['train_loss']):
        raise UserError(
            f'optimizer.learning_rate={record["learning_rate"]:g}: the training loss '
            f'of epoch {record["epoch"]} is not finite; lower it. Checkpoints of '
            'earlier epochs are kept'
        )


def _save(run, manager, state, record):
    checkpoint.save(
        manager,
        record['step'],
        **_checkpoint_items(state),
        metadata=run.metadata | {'epoch': record['epoch']},
        metrics=record,
    )
    if sharding.is_writer():
        with open(os.path.join(run.workdir, METRICS_FILE), 'a') as file:
            file.write(json.dumps(record) + '\n')
