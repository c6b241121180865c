"""Reads and writes decisions: what was fitted on labeled images after training.

In the folder of a run, `decisions.json` (with its arrays in `decisions.safetensors`)
belongs to one checkpoint. Next to a weight file, `NAME.decisions.json` belongs to that
file. It holds the calibration of the probabilities, thresholds, and the other entries
in `ENTRIES`.

To add a kind of entry, write a subclass of `decision_entry.Entry`, add a field to
`Decisions` and its `from_files` to `ENTRIES`. Files may come from a stranger, so
everything in them is checked.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.models import layers
from flax_densenet.system import atomic
from flax_densenet.weights import calibration as calibration_lib
from flax_densenet.weights import (
    conformal,
    decision_entry,
    safetensors_files,
    unusual_members,
)
from flax_densenet.weights import thresholds as thresholds_lib
from flax_densenet.weights import unusual as unusual_lib

FILE, ARRAYS_FILE = 'decisions.json', 'decisions.safetensors'
STATISTICS_FILE = 'statistics.safetensors'  # of a folder of the Hub
VERSION = 1
_LARGEST = 2**26  # bytes of decisions.json
_LARGEST_ARRAYS = 2**31  # bytes of decisions.safetensors
# How entries are read, by the name of the field of `Decisions`, which is also the name
# in files.
ENTRIES: dict[str, Callable[..., decision_entry.Entry]] = {
    'calibration': calibration_lib.Calibration.from_files,
    'thresholds': thresholds_lib.Thresholds.from_files,
    'unusual': unusual_members.from_files,
    'sets': conformal.ConformalSets.from_files,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Decisions:
    """The fitted decisions of one model.

    Attributes:
      step: step of the checkpoint; None for weights that are not a checkpoint.
      model: `fingerprint` of the model.
      classes: number of outputs of the model.
      data: the data source, as in `data.source`.
      part: the part of the data used for the fit: `val`, `test` or `all`.
      count: number of images used for the fit.
      calibration: calibration of the probabilities; None if it was not fitted.
      thresholds: thresholds of the probabilities; None if they were not chosen.
      unusual: the score of unusual images; None if it was not fitted.
      sets: sets of classes with a chosen coverage; None if they were not fitted.
    """

    step: int | None
    model: str
    classes: int
    data: str
    part: str
    count: int
    calibration: calibration_lib.Calibration | None = None
    thresholds: thresholds_lib.Thresholds | None = None
    unusual: unusual_lib.Unusual | unusual_members.MembersUnusual | None = None
    sets: conformal.ConformalSets | None = None

    @property
    def where(self) -> str:
        """Describes the data of the fit: `360 test images of digits`."""
        part = {'val': 'validation ', 'test': 'test '}.get(self.part, '')
        return f'{self.count:,} {part}image{"" if self.count == 1 else "s"} of ' + (
            self.data or 'unknown data'
        )

    def to_files(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Values for JSON, and arrays by `ENTRY.FIELD`."""
        plain: dict[str, Any] = {'version': VERSION}
        arrays: dict[str, np.ndarray] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, decision_entry.Entry):
                plain[field.name], found = value.to_files()
                arrays |= {f'{field.name}.{key}': found[key] for key in found}
            elif field.name not in ENTRIES:
                plain[field.name] = value
        return plain, arrays


def from_files(
    place: str, plain: Any, arrays: dict[str, np.ndarray], classes: int
) -> Decisions:
    """Restores decisions from the result of `Decisions.to_files` and checks them.

    Args:
      plain, arrays: the result of `Decisions.to_files`.
      place: where they come from, for error messages.
      classes: number of outputs of the model.

    Raises:
      UserError: a field is missing or has an invalid value.
    """
    found: dict[str, Any] = {}
    name = 'all of it'
    try:
        if not isinstance(plain, dict):
            raise ValueError('it must be an object')
        for name, is_good in _FIELDS.items():
            if name not in plain:
                raise ValueError('it is missing')
            if not is_good(plain.get(name)):
                raise ValueError(f'{plain.get(name)!r:.60}')
        name = 'classes'
        if plain['classes'] != classes:
            raise ValueError(f'{plain["classes"]}, and the model has {classes}')
        for name, read in ENTRIES.items():
            if plain.get(name) is None:
                continue
            own = {
                key.removeprefix(f'{name}.'): array
                for key, array in arrays.items()
                if key.startswith(f'{name}.')
            }
            found[name] = read(plain[name], own)
            found[name].check(classes)
    except ValueError as error:
        raise UserError(
            f'{place} is not what this program writes ({name}: {error}); delete it, or '
            'run calibrate'
        ) from error
    return Decisions(
        **{key: plain[key] for key in _FIELDS if key != 'version'}, **found
    )


def fingerprint(variables: dict[str, Any]) -> str:
    """Identifies a model: a hash of the last layer of the classifier."""
    last = layers.linear_layers(variables['params']['classifier'])[-1]
    made = hashlib.sha256()
    for name in ('kernel', 'bias'):
        made.update(np.ascontiguousarray(np.asarray(last[name], np.float32)).tobytes())
    return made.hexdigest()[:32]


def files_of(model: str) -> tuple[str, str]:
    """Paths of the two files of a model: in its folder, or next to its file."""
    if os.path.isdir(model):
        return os.path.join(model, FILE), os.path.join(model, ARRAYS_FILE)
    return f'{model}.{FILE}', f'{model}.{ARRAYS_FILE}'


def save(model: str, decisions: Decisions):
    """Writes both files, or only the JSON file if there are no arrays.

    If the program is killed between the two writes, `load` detects it.

    Args:
      model: the folder of a run, or a file or folder of weights.

    Raises:
      UserError: the folder cannot be written.
    """
    from safetensors import numpy as safetensors

    plain, arrays = decisions.to_files()
    path, of_arrays = files_of(model)
    try:
        if arrays:
            arrays = {key: np.ascontiguousarray(arrays[key]) for key in arrays}
            content = safetensors.save(arrays)
            plain['arrays'] = hashlib.sha256(content).hexdigest()
            with atomic.replacing(of_arrays, 'wb') as file:
                file.write(content)
        plain['checksum'] = _checksum(plain)
        with atomic.replacing(path) as file:
            json.dump(plain, file, indent=1)
            file.write('\n')
        if not arrays and os.path.exists(of_arrays):
            os.unlink(of_arrays)
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror})') from error


def load(model: str, classes: int) -> Decisions | None:
    """Reads what `save` wrote; None if there are no files.

    Args:
      model: as for `save`.
      classes: number of outputs of the model.

    Raises:
      UserError: a file cannot be read, or `save` did not write it.
    """
    path, of_arrays = files_of(model)
    try:
        if os.path.getsize(path) > _LARGEST:
            raise ValueError('it is too large')
        with open(path, encoding='utf-8') as file:
            plain = json.load(file)
        arrays = {}
        if isinstance(plain, dict) and 'checksum' in plain:
            given = plain.pop('checksum')
            if given != _checksum(plain):
                raise ValueError('it is damaged or was changed by hand')
        if isinstance(plain, dict) and plain.get('arrays') is not None:
            arrays = _load_arrays(of_arrays, plain['arrays'])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(
            f'{path} cannot be read ({reason}); delete it, or run calibrate'
        ) from error
    return from_files(path, plain, arrays, classes)


def _checksum(plain):
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _load_arrays(path, digest):
    name = os.path.basename(path)
    if not os.path.isfile(path):
        raise ValueError(f'{name} is missing')
    if os.path.getsize(path) > _LARGEST_ARRAYS:
        raise ValueError(f'{name} is too large')
    made = hashlib.sha256()
    with open(path, 'rb') as file:
        while part := file.read(2**20):
            made.update(part)
    if made.hexdigest() != digest:
        raise ValueError(f'{name} belongs to another file')
    return safetensors_files.read(path)[1]


def save_statistics(folder: str, decisions: Decisions):
    """Writes the entries with arrays into a folder of weights, if there are any.

    The other entries are in the metadata of the weights (`trained.Trained.folded`).
    """
    from safetensors import numpy as safetensors

    plain, arrays = decisions.to_files()
    if not arrays:
        return
    names = sorted({key.partition('.')[0] for key in arrays})
    entries = json.dumps({name: plain[name] for name in names})
    arrays = {key: np.ascontiguousarray(arrays[key]) for key in arrays}
    with open(os.path.join(folder, STATISTICS_FILE), 'wb') as file:
        file.write(safetensors.save(arrays, {'entries': entries}))


def load_statistics(folder: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads the file of `save_statistics`, for `from_files`; empty if there is none.

    Raises:
      UserError: the file cannot be read.
    """
    path = os.path.join(folder, STATISTICS_FILE)
    if not os.path.isfile(path):
        return {}, {}
    try:
        if os.path.getsize(path) > _LARGEST_ARRAYS:
            raise ValueError('it is too large')
        metadata, arrays = safetensors_files.read(path)
        entries = json.loads(metadata.get('entries', ''))
        if not isinstance(entries, dict) or not entries.keys() <= ENTRIES.keys():
            raise ValueError('it has no entries')
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f'{path} cannot be read ({error}); use an intact copy'
        ) from error
    return entries, arrays


def _is_text(most):
    return lambda value: isinstance(value, str) and len(value) <= most


def _is_count(value):
    return type(value) is int and 0 <= value < 2**53


_FIELDS = {
    'version': lambda value: value == VERSION,
    'step': lambda value: value is None or _is_count(value),
    'model': _is_text(64),
    'classes': _is_count,
    'data': _is_text(10_000),
    'part': lambda value: value in ('val', 'test', 'all'),
    'count': _is_count,
}
