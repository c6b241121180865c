"""Training: from a config to checkpoints, one line per epoch, and curves.

The data's position is a function of the step counter as well (see `step`), so a
checkpoint needs nothing but arrays, and the same command again goes on where it was.
"""

import collections
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
from tqdm import tqdm

from flax_densenet import (
    board,
    checkpoint,
    environment,
    evaluate,
    history,
    page,
    report,
    results,
    setup,
    sharding,
    step,
    unread,
)
from flax_densenet.errors import UserError

_IN_LINE = {ord('\n'): '\\n', ord('\r'): '\\r'}  # of file names


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
    run = setup.prepare(config, workdir)
    if checkpoint.has_checkpoint(workdir):
        setup.check_same_run(workdir, run.metadata)
    with checkpoint.open_checkpoints(workdir) as manager:
        state, epochs_done = _start(run, manager)
        records = _keep_records(workdir, epochs_done)
        epochs = run.config['train']['epochs']
        if epochs_done < epochs:
            _write_run_files(run)
            setup.announce(run)
            run.features = setup.cache_features(run, state)
            with _open_board(run, int(state.step)) as shown:
                _train(run, manager, state, records, epochs_done, shown)
        else:
            print(f'{workdir} has its {epochs} epochs already; nothing to train')
        del state  # the report needs the memory for the best one
    best = max(records, key=checkpoint.rank)
    if sharding.is_writer():
        report.save_curves(workdir, records)
    written = _save_report(run, anew=epochs_done < epochs)
    if sharding.is_writer():
        print(
            f'best: epoch {best["epoch"]}, Test_acc: {best["test_accuracy"]:.1%}; '
            f'checkpoints, {written}curves.png and samples.png are in {workdir}',
            flush=True,
        )
    return best


def _save_report(run, *, anew):
    """Writes the page of the best checkpoint; a failure takes nothing from the run.

    Returns:
      Its name with a comma, or nothing.
    """
    there = os.path.exists(os.path.join(run.workdir, page.REPORT_FILE))
    if there and not anew:
        return f'{page.REPORT_FILE}, '
    if not run.config['train']['report']:
        return ''
    fields, source = run.config['data'], run.source
    try:
        trained = evaluate.load_trained(run.workdir, 'best', mesh=run.mesh)
        found = results.collect(
            trained,
            source.test,
            source.class_names,
            **{name: fields[name] for name in ('batch_size', 'threads', 'workers')},
        )
        page.save_report(run.workdir, trained, source, found)
    except UserError as error:
        print(f'no {page.REPORT_FILE}: {error}; --mode=report tries again', flush=True)
        return ''
    return f'{page.REPORT_FILE}, '


def _train(run, manager, state, records, epochs_done, shown):
    """Takes the epochs that are left, adding the record of each to `records`."""
    epochs, plan = run.config['train']['epochs'], run.plan
    shown.add_config(run.config)
    batches = setup.train_batches(run, run.features or run.source, int(state.step))
    try:
        compiled = setup.compile_step(run, state, plan.frozen_in(epochs_done + 1))
        # A second of drawing, for which the first step need not wait.
        with futures.ThreadPoolExecutor(1) as beside:
            samples = beside.submit(_save_samples, run, shown)
            for epoch in range(epochs_done + 1, epochs + 1):
                if epochs_done < plan.head_epochs == epoch - 1:
                    compiled = setup.compile_step(run, state, plan.frozen)
                args = run, compiled, state, batches, epoch, shown
                state, record = _train_epoch(*args)
                _tell_unread(run, batches, record)
                samples.result()
                record |= _test(run, state)
                _check_finite(record)
                records.append(record)
                # First, since a resumed run hides what comes after its checkpoint.
                shown.add_epoch(record, max(records, key=checkpoint.rank))
                _save(run, manager, state, record)
                print(format_epoch(record), flush=True)
        shown.add_end()
    finally:
        batches.close()


def _open_board(run, start):
    return board.open_board(
        run.workdir,
        enabled=run.config['train']['tensorboard'] and sharding.is_writer(),
        start=start,
        steps_per_epoch=len(run.source.train) / run.config['data']['batch_size'],
    )


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
    state = run.new_state(setup.first_variables(run))
    if not checkpoint.has_checkpoint(run.workdir):
        return sharding.replicate(state, run.mesh), 0
    latest = checkpoint.find_step(run.workdir, 'latest')
    items = checkpoint.restore(
        manager,
        latest,
        sharding=sharding.replicated(run.mesh),
        **_checkpoint_items(state),
    )
    metadata = checkpoint.load_json(run.workdir, latest, 'metadata')
    print(f'going on after epoch {metadata["epoch"]} in {run.workdir}', flush=True)
    return step.TrainState(**items['model'], **items['train']), metadata['epoch']


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
    path = os.path.join(workdir, history.METRICS_FILE)
    records = history.load_run(workdir).records
    records = [record for record in records if record['epoch'] <= epochs_done]
    if sharding.is_writer():
        with open(path, 'w') as file:
            file.writelines(json.dumps(record) + '\n' for record in records)
    return records


def _write_run_files(run):
    if not sharding.is_writer():
        return
    with open(os.path.join(run.workdir, history.CONFIG_FILE), 'w') as file:
        json.dump(run.config, file, indent=2)
    with open(os.path.join(run.workdir, history.ENVIRONMENT_FILE), 'w') as file:
        json.dump(environment.describe(), file, indent=2)
    skipped = run.source.skipped
    path = os.path.join(run.workdir, 'skipped_images.txt')
    if skipped:
        _write_lines(path, skipped)
        print(f'skipped {len(skipped)} bad images, listed in {path}', flush=True)
    copies = run.source.duplicates
    path = os.path.join(run.workdir, 'duplicates.txt')
    if copies:
        _write_lines(path, copies)
        print(f'{len(copies)} images have copies, listed in {path}', flush=True)


def _write_lines(path, lines):
    """One line each; bytes of names that are not UTF-8 go out as they are."""
    with open(path, 'w', encoding='utf-8', errors='surrogateescape') as file:
        file.writelines(line.translate(_IN_LINE) + '\n' for line in lines)


def _save_samples(run, shown):
    if not sharding.is_writer():
        return
    if sys.platform.startswith('linux'):  # there this is about the thread alone
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    batches = setup.train_batches(run, run.source, 0)
    report.save_samples(
        run.workdir, next(batches), run.source.class_names, **run.preprocessing
    )
    batches.close()
    shown.add_picture('samples', os.path.join(run.workdir, 'samples.png'))


def _train_epoch(run, compiled, state, batches, epoch, shown):
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
        for number in range(first + 1, first + steps + 1):
            asked = time.perf_counter()
            batch = sharding.to_global(next(batches), run.mesh)
            if not losses or losses[-1][1].is_ready():  # the devices had nothing to do
                waited += time.perf_counter() - asked
            while len(losses) > ahead:
                _tell_loss(*losses.popleft(), bar, shown)
            state, loss = compiled(state, batch)
            losses.append((number, loss))
            bar.update(rows)
        jax.block_until_ready(state)
        for last in losses:
            _tell_loss(*last, bar, shown)
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


def _tell_unread(run, batches, record):
    """Counts the images that could not be read in this epoch, and says so."""
    if isinstance(batches, unread.Batches) and batches.unread:
        what = 'the next ones stand in for them'
        print(unread.describe(batches.unread, run.source.train, what), flush=True)
        record['train_unread'] = len(batches.unread)
        batches.unread.clear()


def _tell_loss(number, loss, bar, shown):
    loss = float(jax.device_get(loss))
    bar.set_postfix(loss=f'{loss:.3f}')
    shown.add_loss(number, loss)


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
        bad_images=run.config['data']['bad_images'],
        **run.preprocessing,
        **run.loading,
    )
    found = {'test_accuracy': metrics['accuracy'], 'test_loss': metrics['loss']}
    if 'unread' in metrics:
        found['test_unread'] = len(metrics['unread'])
        line = 'left out of the test'
        line = unread.describe(metrics['unread'], run.source.test, line)
        print(line, flush=True)
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
        with open(os.path.join(run.workdir, history.METRICS_FILE), 'a') as file:
            file.write(json.dumps(record) + '\n')
