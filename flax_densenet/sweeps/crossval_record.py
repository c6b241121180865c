"""`crossval.json`: the definition of a cross-validation, and its trained folds."""

import dataclasses
import json
import os
from typing import Any

from flax_densenet.errors import UserError
from flax_densenet.sweeps.record import TrialResult
from flax_densenet.system import atomic
from flax_densenet.weights import ensembles

FILE = ensembles.UNFINISHED
VERSION = 1
# The path of the data may change; whether it is the same is checked by its content.
PLACES = ('data.source', 'data.labels', 'data.tfds_dir', 'init_from')


@dataclasses.dataclass
class CrossvalRecord:
    """The content of `crossval.json`.

    Attributes:
      folds: number of folds.
      config: settings by full name that must be the same when it is resumed.
      arguments: arguments of the command line.
      images: numbers of images by part, as in a checkpoint's metadata.
      identity: identity of the images, see `data.identity`.
      runs: results of the trained folds, by number as text.
    """

    folds: int
    config: dict[str, Any]
    arguments: list[str]
    images: dict[str, int]
    identity: dict[str, Any]
    runs: dict[str, TrialResult] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds of training, for all folds so far."""
        return sum(run.seconds for run in self.runs.values())

    def save(self, workdir: str):
        """Writes `crossval.json`."""
        with atomic.replacing(os.path.join(workdir, FILE)) as file:
            json.dump({'version': VERSION} | dataclasses.asdict(self), file, indent=1)


def folder_of(fold: int) -> str:
    """Name of the folder of a fold's run."""
    return f'fold-{fold}'


def is_crossval(workdir: str) -> bool:
    """Whether a folder holds a cross-validation."""
    return os.path.isfile(os.path.join(workdir, FILE))


def load(workdir: str) -> CrossvalRecord:
    """Reads `crossval.json`.

    Raises: UserError: it cannot be read, or is not a record of this program.
    """
    path = os.path.join(workdir, FILE)
    try:
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
        if found.pop('version') != VERSION:
            raise ValueError('another version')
        runs = {str(int(k)): TrialResult(**run) for k, run in found['runs'].items()}
        record = CrossvalRecord(**found | {'runs': runs})
        numbers = [record.folds, *(run.seconds for run in record.runs.values())]
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError('numbers expected')
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
        raise UserError(f'{path} is not a record of a cross-validation ({e})') from e
    return record


def find_difference(before: CrossvalRecord, now: CrossvalRecord) -> str:
    """How a recorded cross-validation differs from the new one; empty to resume."""
    if before.folds != now.folds:
        return f'of {before.folds} folds, not {now.folds}'
    for name in before.config.keys() & now.config.keys():
        if before.config[name] != now.config[name]:
            return f'with {name}={before.config[name]}, not {now.config[name]}'
    if before.images != now.images:
        counts = [sum(record.images.values()) for record in (before, now)]
        return f'on {counts[0]} images, and the data has {counts[1]} now'
    for key in ('names', 'labels'):
        known = before.identity.get(key)
        if known and known != now.identity.get(key):
            what = 'images' if key == 'names' else 'labels'
            return f'on other {what} than the data has now'
    return ''
