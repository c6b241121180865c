"""Saves checkpoints in the background, atomically, with retries.

A checkpoint is written into a folder with a temporary name, with the checksum of each
of its files, and gets its name by one rename; then `metrics.jsonl` is written. If the
program is killed at any time, all folders with a checkpoint's name are complete.

>>> parse_every('500 steps'), parse_every('10 minutes')
(Every(steps=500, seconds=0.0), Every(steps=0, seconds=600.0))
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import numbers
import os
import re
import shutil
import sys
import time
from concurrent import futures
from typing import Any

import jax
import orbax.checkpoint as ocp

from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import run_folder, tensorstore_leak
from flax_densenet.checkpoints.reader import Checkpoint
from flax_densenet.distributed import mesh, processes
from flax_densenet.errors import UserError
from flax_densenet.system import atomic

_LOGGER = logging.getLogger(__name__)

# Pauses in which a full disk may be cleared or a network disk return; then the run
# ends.
PAUSES_SECONDS = (1.0, 5.0, 20.0)
_PART = 'tmp-'
# tensorstore reports disk errors as ValueError or RuntimeError.
_FAILURES = (OSError, ValueError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Every:
    """How often to save within epochs, by steps or by time; both 0: never."""

    steps: int = 0
    seconds: float = 0.0

    def due_at(self, step: int) -> bool:
        """Whether to save after a step."""
        return bool(self.steps and step % self.steps == 0)

    def due(self, seconds: float) -> bool:
        """Whether to save, this many seconds after the last save."""
        return bool(self.seconds and seconds >= self.seconds)


def parse_every(text: str) -> Every:
    """Parses `train.checkpoint_every`.

    Raises:
      UserError: it has none of the known forms.
    """
    if not text.strip():
        return Every()
    form = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*(steps?|minutes?)\s*', text)
    number, unit = (float(form[1]), form[2]) if form else (0.0, '')
    if not number or (unit.startswith('step') and not number.is_integer()):
        raise UserError(
            f"train.checkpoint_every={text} is not known; use '500 steps', '10 "
            "minutes', or leave it empty to save only after epochs"
        )
    if unit.startswith('step'):
        return Every(steps=int(number))
    return Every(seconds=60 * number)


class Saver:
    """Writes the checkpoints of a run and its `metrics.jsonl`, one after another.

    With several hosts, all call it and the first one writes; sharded arrays are
    gathered first.
    """

    def __init__(self, workdir: str):
        self._workdir = workdir
        self._pool = futures.ThreadPoolExecutor(1, 'saver')
        self._pending: futures.Future | None = None

    def save(
        self,
        which: Checkpoint,
        *,
        model: Any,
        train: Any,
        metadata: dict[str, Any],
        records: list[dict[str, Any]],
        metrics: dict[str, float] | None = None,
    ):
        """Saves in the background; the arrays may be donated once this returns.

        Args:
          Args: model: `{'params', 'batch_stats'}`.
          train: the rest of the state that a resumed run needs, a tree of arrays.
          metadata: JSON values.
          records: the records of all epochs so far; the lines of `metrics.jsonl`.
          metrics: metrics of a finished epoch, at least accuracy and loss on the images
            that choose (`epoch_records`); only numbers are kept.

        Raises:
          UserError: the previous save failed for good.
        """
        self.wait()
        arrays = mesh.to_host({'model': model, 'train': train})
        if not mesh.is_writer():
            return
        texts = {'metadata': json.dumps(metadata), 'records': json.dumps(records)}
        if which.finished:
            numeric = {
                name: float(value)
                for name, value in (metrics or {}).items()
                if isinstance(value, numbers.Real)
            }
            texts['metrics'] = json.dumps(numeric)
        lines = ''.join(json.dumps(record) + '\n' for record in records)
        self._pending = self._pool.submit(
            _save_or_retry, self._workdir, which, arrays, texts, lines
        )

    def check(self):
        """Raises as `wait` does if the last save has failed by now; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self):
        """Waits until the last save is complete.

        Raises:
          UserError: it failed for good; earlier checkpoints are unchanged.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self):
        """Waits for the last save."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


@contextlib.contextmanager
def open_saver(workdir: str):
    """A context with a `Saver` for a folder that no other process trains in.

    Unfinished saves of a killed run are deleted; corrupt checkpoints are set aside.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = os.path.join(workdir, checkpoint_reader.FOLDER)
    if mesh.is_writer():
        try:
            os.makedirs(folder, exist_ok=True)
            _remove_parts(folder)
            checkpoint_reader.set_aside(workdir)
        except OSError as error:
            raise UserError(
                f'--workdir={workdir} cannot be written ({error.strerror}); choose '
                'another'
            ) from error
    processes.barrier('opened')  # no corrupt checkpoints remain visible
    saver = Saver(workdir)
    _no_tracebacks()
    tensorstore_leak.patch_to_json()
    try:
        yield saver
    finally:
        saver.close()


@functools.cache
def _no_tracebacks():
    """Suppresses the output of libraries when a disk fills up during a save.

    orbax and asyncio log a traceback for each array that could not be written, and
    tensorstore's threads report each one that ends after orbax has given up. The
    saver's own line has the reason. This lasts for the lifetime of the process, since
    those threads may end late.
    """
    logging.getLogger('absl').addFilter(
        lambda record: '/orbax/' not in record.pathname or not record.exc_info
    )
    logging.getLogger('asyncio').addFilter(
        lambda record: 'exception was never retrieved' not in record.getMessage()
    )
    before = sys.unraisablehook

    def report(unraisable):
        if str(unraisable.exc_value) != 'Event loop is closed':
            before(unraisable)

    sys.unraisablehook = report


def _remove_parts(folder):
    for name in os.listdir(folder):
        # The second pattern is that of earlier versions.
        if name.startswith(_PART) or '.orbax-checkpoint-tmp' in name:
            shutil.rmtree(os.path.join(folder, name))


def write_records(workdir: str, lines: str):
    """Replaces `metrics.jsonl`."""
    with atomic.replacing(os.path.join(workdir, run_folder.METRICS_FILE)) as file:
        file.write(lines)


def _save_or_retry(workdir, which, arrays, texts, lines):
    for pause in (*PAUSES_SECONDS, None):
        try:
            _save(workdir, which, arrays, texts)
            write_records(workdir, lines)
            _remove_old(workdir)
            return
        except _FAILURES as error:
            reason = _shorten(error)
            with contextlib.suppress(OSError):
                _remove_parts(os.path.join(workdir, checkpoint_reader.FOLDER))
            if pause is None:
                raise UserError(
                    f'--workdir={workdir}: the checkpoint of step {which.step} cannot '
                    f'be saved ({reason}); fix that, then run the same command to '
                    'resume from the last checkpoint'
                ) from error
            _LOGGER.warning(
                f'warning: saving step {which.step} failed ({reason}); trying '
                f'again in {pause:g} s'
            )
            time.sleep(pause)


def _shorten(error):
    """The disk's error if it can be found, else the message, shortened."""
    if isinstance(error, OSError) and error.strerror:
        return (
            f'{error.filename}: {error.strerror}' if error.filename else error.strerror
        )
    text = ' '.join(str(error).split())
    if found := re.search(r'([^:"]+) \[os_error_code', text):  # tensorstore's
        return found[1].strip()
    return text if len(text) < 200 else f'{text[:90]} ... {text[-100:]}'


def _save(workdir, which, arrays, texts):
    """Writes one checkpoint: complete under its name, or not at all."""
    folder = os.path.abspath(os.path.join(workdir, checkpoint_reader.FOLDER))
    if not os.path.isdir(folder):
        _LOGGER.warning(f'warning: {folder} was missing and has been recreated')
        os.makedirs(folder)
    part = os.path.join(folder, _PART + which.name)
    final = os.path.abspath(checkpoint_reader.folder_of(workdir, which))
    shutil.rmtree(part, ignore_errors=True)
    # tensorstore would print pages about it, from its own threads.
    if shutil.disk_usage(folder).free < sum(x.nbytes for x in jax.tree.leaves(arrays)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
    os.mkdir(part)
    with ocp.StandardCheckpointer(**_alone()) as checkpointer:
        for item, tree in arrays.items():
            checkpointer.save(os.path.join(part, item), tree)
            checkpointer.wait_until_finished()
    for item, text in texts.items():
        os.mkdir(os.path.join(part, item))
        _write(os.path.join(part, item, item), text.encode())
    sums = {
        os.path.relpath(os.path.join(at, name), part): checkpoint_reader.checksum(
            os.path.join(at, name)
        )
        for at, _, names in os.walk(part)
        for name in names
    }
    _write(
        os.path.join(part, checkpoint_reader.CHECKSUMS_FILE),
        checkpoint_reader.format_sums(sums),
    )
    for at, _, _ in os.walk(part):
        atomic.sync_folder(at)
    if os.path.isdir(final):  # a run that resumed from an older checkpoint
        shutil.rmtree(final)
    os.rename(part, final)
    atomic.sync_folder(folder)


def _alone():
    """Options of orbax for a single writer among several processes."""
    if jax.process_count() == 1:
        return {}
    return {
        'multiprocessing_options': ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix='writer'
        )
    }


def _write(path, content):
    with open(path, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _remove_old(workdir):
    """Keeps the two latest, the two latest of finished epochs, and the best."""
    found = checkpoint_reader.find_all(workdir)
    finished = [one for one in found if one.finished]
    keep = {*found[-2:], *finished[-2:]}
    if finished:
        keep.add(max(finished, key=lambda one: checkpoint_reader.rank_of(workdir, one)))
    for one in found:
        if one not in keep:
            folder = checkpoint_reader.folder_of(workdir, one)
            # Renamed first: a partly deleted checkpoint must not look like a valid one.
            away = os.path.join(workdir, checkpoint_reader.FOLDER, _PART + one.name)
            os.rename(folder, away)
            shutil.rmtree(away)
