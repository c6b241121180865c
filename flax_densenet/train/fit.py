"""Training: from settings to checkpoints, one line per epoch, and curves.

The position in the data is a function of the step counter too (see `step`), so a
checkpoint needs only arrays, and running the same command again resumes exactly.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import jax
from tqdm import tqdm

from flax_densenet import errors
from flax_densenet import settings as settings_lib
from flax_densenet.checkpoints import epoch_records, run_folder
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import writer as checkpoint_writer
from flax_densenet.data import notes, unreadable
from flax_densenet.distributed import agreement, mesh, processes, zero
from flax_densenet.errors import UserError
from flax_densenet.evaluation import evaluate, selection
from flax_densenet.system import atomic, environment, lock, signals
from flax_densenet.train import (
    announce,
    checks,
    early_stopping,
    ema,
    epoch_lines,
    loop,
    phases,
    prepare,
    resume,
    sample_grid,
    tensorboard,
    trackers,
    training_run,
)

_LOGGER = logging.getLogger(__name__)

_IN_LINE = {ord('\n'): '\\n', ord('\r'): '\\r'}  # of file names


@dataclasses.dataclass(frozen=True)
class FitResult:
    """A finished run.

    Attributes:
      best: the record of the best epoch, as in `metrics.jsonl`.
      records: the records of all epochs.
      run: its settings, data, model and devices.
      trained: False if all epochs had been trained before.
    """

    best: dict[str, Any]
    records: list[dict[str, Any]]
    run: training_run.TrainingRun
    trained: bool

    def report_options(self) -> dict[str, Any]:
        """Arguments of `report.finished.write` that follow the folder."""
        run = self.run
        return {
            'records': self.records,
            'source': run.source,
            'report': run.settings.train.report,
            'renew': self.trained,
            'mesh': run.mesh,
            'batch_size': run.part_size,
            'threads': run.settings.loader.threads,
            'workers': run.settings.loader.workers,
            'rules': selection.Rules(**vars(run.settings.decisions)),
        }

    def send_files(self):
        """Sends the results to TensorBoard and `train.trackers`, if enabled."""
        if self.trained:
            with _open_board(self.run, self.records[-1]['step']) as shown:
                shown.add_results(self.run.workdir)
            trackers.send_files(self.run.workdir, *_tracking(self.run))


def fit(
    settings: settings_lib.Settings | Mapping[str, Any],
    workdir: str,
    *,
    class_names: tuple[str, ...] | None = None,
    stop: signals.Stop | None = None,
    ends_after: Callable[[dict[str, Any]], bool] = lambda record: False,
    save_samples: Callable[..., None] | None = None,
) -> FitResult:
    """Trains, evaluates after each epoch, and keeps the latest and best checkpoints.

    The state comes from the latest intact checkpoint in `workdir`, else from
    `init_from`, else from `train.seed`.

    Args:
      settings: from `settings.from_config`, or a config that it accepts.
      workdir: folder of the run; created if missing, and locked during training.
      class_names: names of the outputs of `init_from`, if it does not name them.
      stop: from `signals.stop_gently`; signals then end the run after a saved step.
        Without it, a KeyboardInterrupt propagates and the checkpoints stay as they are.
      ends_after: called with the record of each epoch; if it returns True, the run ends
        there as after its last epoch. The same call would continue it.
      save_samples: draws the training images of the first step, as
        `report.plots.save_samples` does; called in a separate thread when training
        starts.

    Returns:
      The finished run with its records.

    Raises:
      UserError: a field, the data or the workdir cannot be used, saving failed for
        good, or the loss is no longer finite.
      signals.Stopped: a signal came; training so far is saved.
    """
    if mesh.is_writer():
        lock.check(workdir)  # before the data is searched
    run = prepare.prepare(settings, workdir, class_names=class_names)
    changes: list[str] = []
    if checkpoint_reader.has_checkpoint(workdir):
        checks.check_same_run(workdir, run)
        changes = resume.check(workdir, run.source, run.settings)
    checks.check_same_everywhere(run)
    with _lock(workdir), checkpoint_writer.open_saver(workdir) as saver:
        state, metadata = _start(run)
        if mesh.is_writer():
            for line in changes:
                notes.say(line)
        records = _keep_records(run, metadata['epoch'])
        ending = _describe_ending(run, records, metadata['epoch'])
        if ending:
            _LOGGER.info(f'{workdir} has {ending}; nothing to train')
        else:
            _train(
                *(run, saver, state, metadata, records),
                stop=stop or signals.Stop(),
                ends_after=ends_after,
                save_samples=save_samples,
            )
        saver.wait()
        processes.barrier('trained')  # all are to find the same best checkpoint
        best = max(records, key=checkpoint_reader.rank)
        return FitResult(best, records, run, trained=not ending)


def _describe_ending(run, records, epochs_done):
    """Why there is nothing to train, or the empty text."""
    if epochs_done >= run.settings.train.epochs:
        return f'its {run.settings.train.epochs} epochs'
    if _should_stop(run, records):
        return f'stopped {_describe_early_stop(run, records)}'
    return ''


def _train(run, saver, state, metadata, records, *, stop, ends_after, save_samples):
    """Takes the epochs that are left, and shows them in TensorBoard and trackers."""
    _write_run_files(run)
    announce.announce(run)
    run.features = training_run.cache_features(run, state)
    with (
        _open_board(run, int(state.step)) as shown,
        trackers.open_trackers(run.workdir, *_tracking(run)) as tracked,
    ):
        work = loop.Loop(
            *(run, saver, stop, shown),
            checkpoint_writer.parse_every(run.settings.train.checkpoint_every),
            records,
            agreement.Agreement(run.mesh),
            skipped=metadata.get('skipped_steps', 0),
        )
        epochs_done = metadata['epoch']
        _take_epochs(work, state, epochs_done, ends_after, save_samples, tracked)


def _should_stop(run, records):
    return early_stopping.should_stop(
        records, run.settings.train.patience, head_epochs=run.plan.head_epochs
    )


def _describe_early_stop(run, records):
    return early_stopping.describe(records, run.settings.train.patience)


def _lock(workdir):
    return lock.hold(workdir) if mesh.is_writer() else contextlib.nullcontext()


def _take_epochs(
    work: loop.Loop, state, epochs_done, ends_after, save_samples, tracked
):
    """Trains the remaining epochs and appends the record of each."""
    run, shown, records = work.run, work.shown, work.records
    epochs = run.settings.train.epochs
    shown.add_config(settings_lib.to_config(run.settings))
    # Drawing takes about a second; the first step need not wait for it.
    with phases.open_phase(run) as phase, futures.ThreadPoolExecutor(1) as beside:
        phase.enter(state, epochs_done + 1)
        lines = epoch_lines.EpochLines(epochs, epochs_done)  # their clock starts
        drawn = beside.submit(_save_samples, run, shown, save_samples)
        with work.stop.busy():
            for epoch in range(epochs_done + 1, epochs + 1):
                phase.enter(state, epoch)
                state, record = loop.take_epoch(
                    work, phase.compiled, state, phase.batches, epoch
                )
                _report_unread(run, phase.batches, record)
                drawn.result()
                record |= _measure(work, state, record)
                records.append(record)
                # First, since a resumed run hides the events after its checkpoint.
                shown.add_epoch(record, max(records, key=checkpoint_reader.rank))
                tracked.call('log', record['step'], trackers.metrics_of(record))
                work.save_epoch(state)
                _LOGGER.info(lines.line(records))
                if work.agree(record['step'])[0]:
                    work.wait_for_saved()
                    raise work.stop.stopped(f'epoch {epoch} is saved')
                ended = ends_after(record)
                if _should_stop(run, records):
                    _LOGGER.info(f'stopped {_describe_early_stop(run, records)}')
                    ended = True
                if ended:
                    break
        shown.add_end()


def _tracking(run):
    """Names of the trackers, and the settings that they log."""
    names = trackers.parse(run.settings.train.trackers) if mesh.is_writer() else []
    return names, tensorboard.flatten(settings_lib.to_config(run.settings))


def _open_board(run, start):
    wanted = run.settings.train.tensorboard and mesh.is_writer()
    return tensorboard.open_writer(
        run.workdir,
        enabled=wanted and errors.is_installed('tensorboardX'),
        start=start,
        steps_per_epoch=len(run.source.train) / run.batch_size,
    )


def _start(run):
    """The initial state, on the devices, and the metadata that was saved with it."""
    state = run.new_state(training_run.first_variables(run))
    if not checkpoint_reader.has_checkpoint(run.workdir):
        return run.place_state(state), {'epoch': 0}
    latest = checkpoint_reader.Checkpoint(
        *processes.broadcast(
            'latest',
            lambda: dataclasses.astuple(checkpoint_reader.find_latest(run.workdir)),
        )
    )
    metadata = checkpoint_reader.load_json(run.workdir, latest, 'metadata')
    try:
        items = checkpoint_reader.restore(
            run.workdir,
            latest,
            sharding=mesh.replicated(run.mesh),
            **loop.checkpoint_items(state),
        )
    except ValueError as error:
        changes = resume.find_changes(run.workdir, run.settings)
        raise resume.explain_other_state(run.workdir, latest.step, changes) from error
    place = f'after epoch {metadata["epoch"]}'
    if not latest.finished:
        place = f'in epoch {metadata["epoch"] + 1}, after step {latest.step},'
    _LOGGER.info(f'resuming {place} in {run.workdir}')
    restored = loop.from_items(**items)
    return _spread(run, restored, state), metadata


def _spread(run, restored, state):
    """Moves the parts of the optimizer's state to the devices that keep them.

    Args:
      restored: the restored state, complete on every device.
      state: an initial state of this run.
    """
    if not zero.is_sharded(state.opt_state):
        return restored
    opt_state = jax.device_get(restored.opt_state)
    opt_state = zero.from_replicated(opt_state, state.opt_state)
    return restored.replace(opt_state=zero.place(opt_state, run.mesh))


def _keep_records(run, epochs_done):
    """The records of the finished epochs; later ones have no checkpoint and go."""
    records = []
    if epochs_done:
        latest = checkpoint_reader.find_latest(run.workdir)
        try:
            records = checkpoint_reader.load_json(run.workdir, latest, 'records')
        except UserError:  # of a version that kept them only in metrics.jsonl
            records = run_folder.load_run(run.workdir).records
            records = [record for record in records if record['epoch'] <= epochs_done]
    if mesh.is_writer():
        lines = ''.join(json.dumps(record) + '\n' for record in records)
        checkpoint_writer.write_records(run.workdir, lines)
    return records


def _write_run_files(run):
    if not mesh.is_writer():
        return
    with atomic.replacing(os.path.join(run.workdir, run_folder.CONFIG_FILE)) as file:
        json.dump(settings_lib.to_config(run.settings), file, indent=2)
    path = os.path.join(run.workdir, run_folder.ENVIRONMENT_FILE)
    with atomic.replacing(path) as file:
        json.dump(environment.describe(), file, indent=2)
    skipped = run.source.skipped
    path = os.path.join(run.workdir, 'skipped_images.txt')
    if skipped:
        _write_lines(path, skipped)
        _LOGGER.info(f'skipped {len(skipped)} bad images, listed in {path}')
    copies = run.source.duplicates
    path = os.path.join(run.workdir, 'duplicates.txt')
    if copies:
        _write_lines(path, copies)
        _LOGGER.info(f'{len(copies)} images have copies, listed in {path}')


def _write_lines(path, lines):
    """Writes one line each; bytes of names that are not UTF-8 are kept as they are."""
    options = {'encoding': 'utf-8', 'errors': 'surrogateescape'}
    with atomic.replacing(path, **options) as file:
        file.writelines(line.translate(_IN_LINE) + '\n' for line in lines)


def _save_samples(run, shown, save):
    if save is None or not mesh.is_writer() or not errors.is_installed('matplotlib'):
        return
    if sys.platform.startswith('linux'):  # there, this applies only to the thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    images = sample_grid.save(run, save)
    shown.add_picture('samples', os.path.join(run.workdir, 'samples.png'))
    shown.add_images('training_images', images)


def _report_unread(run, batches, record):
    """Counts and reports the images that could not be read in this epoch."""
    if not isinstance(batches, unreadable.CountedBatches):
        return
    found = _of_all('unread', batches.unread)
    if found:
        what = 'the next images replace them'
        _LOGGER.info(unreadable.describe(found, run.source.train, what))
        record['train_unread'] = len(found)
    batches.unread.clear()


def _of_all(name, positions):
    """The positions that any of the processes found, sorted."""
    parts = processes.gather(name, sorted(positions))
    return sorted({position for part in parts for position in part})


def _measure(work, state, record):
    """The metrics of the images that choose the best epoch: `val_*`, or `test_*`.

    If a signal comes meanwhile, the state is saved and the run ends.
    """
    run = work.run
    examples = (run.features or run.source).selection
    part = epoch_records.TEST if run.source.val is None else epoch_records.VAL
    bar = tqdm(
        total=len(examples), desc=part, unit=' images', leave=False, disable=None
    )

    def between():
        bar.update(min(run.part_size, len(examples) - bar.n))
        work.stop_if_asked(
            state, record['step'], record['epoch'], record['skipped_steps']
        )

    with bar:
        metrics = evaluate.evaluate(
            run.module,
            ema.evaluated(state),
            examples,
            batch_size=run.part_size,
            mesh=run.mesh,
            bad_images=run.settings.data.bad_images,
            between=between,
            **run.preprocessing,
            **run.loading,
        )
    found = {f'{part}_accuracy': metrics['accuracy'], f'{part}_loss': metrics['loss']}
    left_out = metrics.get('unread', [])
    if run.settings.data.bad_images == 'skip':
        left_out = _of_all('left out', left_out)
    if left_out:
        found[f'{part}_unread'] = len(left_out)
        line = f'left out of the {epoch_records.WORDS[part]}'
        _LOGGER.info(unreadable.describe(left_out, run.source.selection, line))
    if run.source.multi_label:
        found[f'{part}_mean_auroc'] = metrics['mean_auroc']
        names = run.source.class_names
        found[f'{part}_auroc'] = dict(zip(names, metrics['auroc'], strict=True))
    return found
