"""Reads checkpoints of a run: which exist, whether they are intact, their content.

A workdir holds `checkpoints/<step>/` for finished epochs and `checkpoints/mid-<step>/`
for states within an epoch (`writer` writes both). Each has the items `model` (params
and batch statistics), `train` (the rest of the training state), `metadata` (JSON: how
to make the model and prepare its images), `records` (of the epochs so far) and, for a
finished epoch, `metrics`. `checksums.json` has the SHA-256 of each of its files; the
folder gets its name when all of it is on disk.

Only `set_aside` writes here, so a run can be evaluated while it trains.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import numbers
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from flax_densenet.checkpoints import epoch_records
from flax_densenet.errors import UserError

_LOGGER = logging.getLogger(__name__)

FOLDER = 'checkpoints'
ENSEMBLE_FILE = 'ensemble.json'  # in a folder with several runs as one model
# Weights hardly compress, but the state of an optimizer starts with zeros.
_EXPANSION = 100
CHECKSUMS_FILE = 'checksums.json'
_MID, _BAD = 'mid-', 'bad-'


@dataclasses.dataclass(frozen=True, order=True)
class Checkpoint:
    """A checkpoint in a workdir, ordered as in training.

    Attributes:
      step: number of steps taken.
      finished: True at the end of an epoch, with metrics; False within an epoch.
    """

    step: int
    finished: bool = True

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f'{"" if self.finished else _MID}{self.step}'


def rank(metrics: dict[str, float]) -> tuple[float, float]:
    """The sort key of checkpoints and epochs: accuracy, then lower loss.

    Both are for the images that choose, see `epoch_records`. With several labels per
    image, the key is their mean area under the ROC curve, since the share of correct
    labels means little if most are absent.

    NaN comes last; unsorted, it could displace the best.
    """
    accuracy = epoch_records.get(metrics, 'mean_auroc')
    if accuracy is None:
        accuracy = epoch_records.get(metrics, 'accuracy')
    loss = epoch_records.get(metrics, 'loss')
    return (
        accuracy if accuracy is not None and _is_finite(accuracy) else -math.inf,
        -loss if loss is not None and _is_finite(loss) else -math.inf,
    )


def _is_finite(value):
    return isinstance(value, numbers.Real) and -math.inf < value < math.inf


def make_workdir(workdir: str, folder: str = ''):
    """Creates a workdir, or a folder in it, if it is missing.

    Raises:
      UserError: it cannot be written.
    """
    path = os.path.join(workdir, folder)
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(
            f'--workdir={workdir} cannot be written ({error.strerror}); choose another'
        ) from error


def folder_of(workdir: str, which: Checkpoint) -> str:
    """The path of a checkpoint."""
    return os.path.join(workdir, FOLDER, which.name)


def find_all(workdir: str) -> list[Checkpoint]:
    """All finished saves, intact or not, the oldest first."""
    try:
        names = os.listdir(os.path.join(workdir, FOLDER))
    except OSError:
        return []
    # Unfinished saves have another name until they are complete.
    found = [Checkpoint(int(name)) for name in names if name.isdecimal()]
    for name in names:
        if name.startswith(_MID) and name.removeprefix(_MID).isdecimal():
            found.append(Checkpoint(int(name.removeprefix(_MID)), finished=False))
    return sorted(found)


def has_checkpoint(workdir: str) -> bool:
    """Whether there is a checkpoint to resume from."""
    return bool(find_all(workdir))


def find_latest(workdir: str) -> Checkpoint:
    """The newest intact checkpoint, within an epoch or at its end.

    Raises:
      UserError: there is none.
    """
    for found in reversed(find_all(workdir)):
        if _is_whole(workdir, found):
            return found
    raise _none_left(workdir)


def find_step(workdir: str, which: str) -> int:
    """The step of the `latest` or the `best` intact checkpoint of a finished epoch.

    Raises:
      UserError: there is none.
    """
    finished = [found for found in find_all(workdir) if found.finished]
    if which == 'best':
        finished.sort(key=lambda found: rank_of(workdir, found))
    for found in reversed(finished):
        if _is_whole(workdir, found):
            return found.step
    raise _none_left(workdir)


def _none_left(workdir):
    if not os.path.exists(workdir):
        return UserError(
            f'--workdir={workdir} holds no checkpoint: there is no such file or '
            'folder; train there first, or name a run, a file of weights, or published '
            'weights (the command weights lists them)'
        )
    found = find_all(workdir)
    if os.path.isfile(os.path.join(workdir, ENSEMBLE_FILE)):
        return UserError(
            f'--workdir={workdir} holds several models, and one is needed here; name '
            f'one of them, such as {os.path.join(workdir, "fold-1")}'
        )
    if not found:
        return UserError(
            f'--workdir={workdir} holds no checkpoint; train there first, or name the '
            'folder of a run'
        )
    if not any(one.finished for one in found):
        return UserError(
            f'--workdir={workdir} holds no finished epoch yet, only step '
            f'{found[-1].step} within an epoch; run the training command again to '
            'resume'
        )
    return UserError(
        f'--workdir={workdir}: none of its checkpoints is intact; restore one from a '
        f'backup, or remove {os.path.join(workdir, FOLDER)} to start over'
    )


def rank_of(workdir: str, found: Checkpoint):
    """`rank` of a finished epoch's checkpoint; last if it cannot be read."""
    try:
        return rank(load_json(workdir, found, 'metrics')), found.step
    except (UserError, KeyError, TypeError):
        return (-math.inf, -math.inf), found.step


def _is_whole(workdir, found):
    """Whether to use a checkpoint; warns once about a bad one."""
    folder = os.path.abspath(folder_of(workdir, found))
    try:
        inode = os.stat(folder).st_ino
    except OSError:  # training has removed it in the meantime
        return False
    return not _look_at(folder, inode)


@functools.lru_cache(maxsize=64)
def _look_at(folder, inode):
    """What is wrong with a checkpoint, or ''; checked once per process."""
    reason = check(folder)
    if reason:
        _LOGGER.warning(f'warning: bad checkpoint {folder}: {reason}; not used')
    return reason


def check(folder: str) -> str:
    """What is wrong with a checkpoint's folder; empty if it is as it was saved.

    Every file is read. Runs of older versions have no checksums, so only missing files
    are found.
    """
    try:
        with open(os.path.join(folder, CHECKSUMS_FILE), 'rb') as file:
            text = file.read()
    except FileNotFoundError:
        missing = [
            item
            for item in ('model', 'train', 'metadata')
            if not os.path.isdir(os.path.join(folder, item))
        ]
        return f'it has no {missing[0]}' if missing else ''
    except OSError as error:
        return f'{CHECKSUMS_FILE} cannot be read ({error.strerror})'
    try:
        sums = json.loads(text)
        if format_sums(sums) != text:
            return f'{CHECKSUMS_FILE} was changed'
        for name, expected in sums.items():
            if checksum(os.path.join(folder, name)) != expected:
                return f'{name} does not match its checksum'
    except (ValueError, AttributeError, TypeError):
        return f'{CHECKSUMS_FILE} was changed'
    except OSError as error:
        return f'{error.filename} cannot be read ({error.strerror})'
    return ''


def checksum(path: str) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def format_sums(sums: dict[str, str]) -> bytes:
    """The canonical text of `checksums.json`, so that any change of it is found."""
    return json.dumps(sums, indent=0, sort_keys=True).encode()


def set_aside(workdir: str):
    """Renames corrupt checkpoints to `bad-<name>`; only training may do so.

    Their steps will be saved again.
    """
    for found in find_all(workdir):
        if not _is_whole(workdir, found):
            old = folder_of(workdir, found)
            new, number = os.path.join(workdir, FOLDER, _BAD + found.name), 1
            while os.path.exists(new):
                number += 1
                new = os.path.join(workdir, FOLDER, f'{_BAD}{found.name}-{number}')
            os.rename(old, new)
            _LOGGER.info(f'moved to {new}; it can be deleted')


def load_json(workdir: str, which: Checkpoint | int, item: str) -> Any:
    """The `metadata`, `metrics` or `records` of a checkpoint.

    Args:
      which: a step means the end of a finished epoch.
    """
    which = which if isinstance(which, Checkpoint) else Checkpoint(which)
    folder = folder_of(workdir, which)
    try:
        with open(os.path.join(folder, item, item)) as file:
            found = json.load(file)
        if not isinstance(found, list if item == 'records' else dict):
            raise _OtherArrays(f'{item} is not in the expected form')
    except (OSError, ValueError, RecursionError) as error:
        raise _not_whole(folder, error) from error
    return found


class _OtherArrays(ValueError):
    """A checkpoint does not hold what is requested; with a message of this package."""


def _not_whole(folder, error):
    """The error of a checkpoint; messages of libraries are only for developers."""
    if isinstance(error, _OtherArrays):
        reason = str(error)
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
        if error.filename:
            reason = f'{os.path.basename(os.fsdecode(error.filename))}: {reason}'
    elif isinstance(error, (json.JSONDecodeError, RecursionError, UnicodeDecodeError)):
        reason = 'its JSON cannot be read'
    else:
        reason = 'its arrays do not fit this model and optimizer'
    return UserError(
        f'the checkpoint {folder} is not intact ({reason}); remove that folder to use '
        'an earlier one'
    )


def restore(
    workdir: str, which: Checkpoint | int, *, sharding, **items: Any
) -> dict[str, Any]:
    """Restores `model`, `train`, or both.

    Args:
      which: a step means the end of a finished epoch.
      sharding: sharding of every restored array; None for numpy arrays, which takes
        half the time.
      **items: for each item a tree of arrays or ShapeDtypeStructs with its shapes.

    Returns:
      `{item: tree of arrays}`, on the devices or, without sharding, in numpy.

    Raises:
      UserError: the checkpoint is corrupt, or holds other arrays.
    """

    def target(leaf):
        leaf = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)
        if sharding is None:
            return np.empty(leaf.shape, leaf.dtype)
        # Always given, otherwise orbax uses the devices of the run that saved it.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    which = which if isinstance(which, Checkpoint) else Checkpoint(which)
    folder = os.path.abspath(folder_of(workdir, which))
    _check_stored(folder, items)
    try:
        _check_shapes(folder, items)
        with ocp.StandardCheckpointer() as checkpointer:
            return {
                name: checkpointer.restore(
                    os.path.join(folder, name), jax.tree.map(target, tree)
                )
                for name, tree in items.items()
            }
    # Errors of orbax and tensorstore if the files do not belong to these arrays.
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _not_whole(folder, error) from error


def _check_shapes(folder, items):
    """Raises if the arrays are not the requested ones.

    orbax would notice it too, in the middle of reading.
    """
    handler = ocp.StandardCheckpointHandler()
    # The rest of the state has tuples, which are stored in another form.
    for name in items.keys() & {'model'}:
        tree = items[name]
        stored = handler.metadata(pathlib.Path(folder, name)).tree
        stored, wanted = map(traverse_util.flatten_dict, (stored, tree))
        for path in stored.keys() | wanted.keys():
            sides = [tuple(np.shape(side.get(path))) for side in (stored, wanted)]
            if path not in stored or path not in wanted or sides[0] != sides[1]:
                raise _OtherArrays(
                    f'{"/".join(path)} is {sides[0]} there, and {sides[1]} in the '
                    'model that the metadata describes'
                )


def _check_stored(folder, items):
    """Raises if the files are far too small to hold the arrays.

    An array without stored data is read as zeros, whatever size it claims, so a few
    bytes in an untrusted file could use all memory.
    """
    stored = sum(
        os.path.getsize(os.path.join(place, name))
        for place, _, names in os.walk(folder)
        for name in names
    )
    wanted = sum(
        math.prod(np.shape(leaf)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(items)
    )
    if wanted > max(2**24, _EXPANSION * stored):
        reason = _OtherArrays(f'its files of {stored} bytes cannot hold {wanted}')
        raise _not_whole(folder, reason)
