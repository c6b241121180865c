"""Ensembles of runs: `ensemble.json` in a folder that holds the folders of its members.

`crossval` writes it when all folds are trained. The folder can then be used like the
folder of a run: the probabilities of its members are averaged.
"""

import dataclasses
import json
import os
import shlex
from typing import Any

import jax

from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.errors import UserError
from flax_densenet.models import ensemble
from flax_densenet.system import atomic

FILE = checkpoint_reader.ENSEMBLE_FILE
UNFINISHED = 'crossval.json'  # exists before all members are trained
MISSING_SCORE = 'unusual'  # key of a note
VERSION = 1
_LARGEST = 2**26  # bytes
# The metadata that members must have in common to be averaged.
_ALIKE = ('class_names', 'image_size', 'mean', 'std', 'multi_label', 'outputs')
_ALIKE_DATA = ('resize', 'crop_fraction', 'interpolation', 'window', 'bit_depth', 'tta')


@dataclasses.dataclass(frozen=True)
class Record:
    """The content of `ensemble.json`.

    Attributes:
      members: names of the run folders, in the folder of the file.
      images: the number of images by part, as in the metadata of a checkpoint.
      identity: identity of these images, see `data.identity`.
    """

    members: tuple[str, ...]
    images: dict[str, int]
    identity: dict[str, Any]


def is_ensemble(path: str) -> bool:
    """Whether a folder holds an ensemble, finished or not."""
    return any(os.path.isfile(os.path.join(path, n)) for n in (FILE, UNFINISHED))


def save(folder: str, record: Record):
    """Writes `ensemble.json`.

    Raises:
      UserError: the folder cannot be written.
    """
    path = os.path.join(folder, FILE)
    try:
        with atomic.replacing(path) as file:
            json.dump({'version': VERSION} | dataclasses.asdict(record), file, indent=1)
            file.write('\n')
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror})') from error


def read(folder: str) -> Record:
    """Reads what `save` wrote.

    Raises:
      UserError: the ensemble is not finished, or the file cannot be read or was not
        written by `save`.
    """
    path = os.path.join(folder, FILE)
    try:
        if os.path.getsize(path) > _LARGEST:
            raise ValueError('it is too large')
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
        record = Record(
            tuple(found['members']), dict(found['images']), dict(found['identity'])
        )
        names = record.members
        if (
            found['version'] != VERSION
            or len(names) < 2
            or len(set(names)) < len(names)
        ):
            raise ValueError('two or more members expected')
        for name in names:
            # Only names inside the folder, since the file may come from a stranger.
            if (
                not isinstance(name, str)
                or name != os.path.basename(name)
                or (name in ('', '.', '..'))
            ):
                raise ValueError(f'a member is called {name!r:.60}')
    except FileNotFoundError as error:
        raise UserError(
            f'{folder} holds a cross-validation that is not finished; run the same '
            'crossval command again, or use one fold, as '
            f'{os.path.join(folder, "fold-1")}'
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(
            f'{path} cannot be read ({reason}); run crossval again'
        ) from error
    return record


def load(folder: str, load_member):
    """The ensemble of a folder as a `trained.Trained`.

    Args:
      load_member: a function that loads the folder of a run as a `trained.Trained`.

    Raises:
      UserError: a member is missing, or the members differ.
    """
    record = read(folder)
    members = []
    for name in record.members:
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            raise UserError(f'{folder} is an ensemble, and its member {path} is gone')
        members.append(load_member(path))
    return join(folder, record, members)


def join(folder: str, record: Record, members):
    """One `trained.Trained` that averages the probabilities of several.

    Raises:
      UserError: the members differ in their network, classes or preparation of images.
    """
    first = members[0]
    for name, other in zip(record.members, members, strict=True):
        if field := _find_difference(first, other):
            raise UserError(
                f'{folder}: {name} differs from {record.members[0]} in {field}, so '
                'their probabilities cannot be averaged'
            )
    module = ensemble.Ensemble(first.module, len(members), first.outputs)
    notes = dict(first.notes)
    if all(one.decisions and one.decisions.unusual for one in members):
        notes[MISSING_SCORE] = (
            f'{folder} has no score of unusual images, as earlier versions had none '
            f'for ensembles: calibrate {shlex.quote(folder)} adds it'
        )
    metadata = {k: v for k, v in first.metadata.items() if k != 'epoch'} | {
        'data': first.metadata['data'] | {'fold': 0},
        'images': record.images,
        'identity': record.identity,
        'members': [
            [name, one.step] for name, one in zip(record.members, members, strict=True)
        ],
    }
    return dataclasses.replace(
        first,
        module=module,
        variables=ensemble.stack([_calibrated(one) for one in members]),
        metadata=metadata,
        metrics={},
        step=None,
        notes=type(first.notes)(notes),
        decisions=None,  # an ensemble has its own
    )


def finish_note(trained):
    """Removes or completes the line about a missing score of unusual images."""
    found, line = trained.decisions, trained.notes.pop(MISSING_SCORE, '')
    is_told = 'decisions' in trained.notes  # that they are of other weights
    if not line or is_told or (found and found.unusual):
        return
    if found and found.thresholds:  # which calibrate chooses again
        values = found.thresholds.values
        line += f', and --threshold={found.thresholds.rule}'
        if len(values) == 2 and values[1] is None:
            line += f' --positive_class={shlex.quote(trained.class_names[0])}'
        line += ' keeps its thresholds'
    trained.notes[MISSING_SCORE] = line


def _calibrated(trained):
    """The variables with the member's calibration folded in."""
    if trained.calibration is None:
        return trained.variables
    return trained.calibration.fold(trained.variables)


def _find_difference(one, other):
    """How two members differ; empty if they can be averaged."""
    shapes = [
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(trained.variables)]
        for trained in (one, other)
    ]
    if one.module != other.module or shapes[0] != shapes[1]:
        return 'its network'
    for name in _ALIKE:
        if one.metadata.get(name) != other.metadata.get(name):
            return name
    for name in _ALIKE_DATA:
        if one.metadata['data'].get(name) != other.metadata['data'].get(name):
            return f'data.{name}'
    return ''
