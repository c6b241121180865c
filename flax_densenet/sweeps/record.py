"""`sweep.json`: the definition of a sweep, its settings and their results.

It is the only record of a sweep: it is replaced atomically after each run, and the
table and page need nothing else, neither Optuna nor the runs' folders.
"""

import dataclasses
import json
import os
from typing import Any

from flax_densenet.checkpoints import epoch_records
from flax_densenet.errors import UserError
from flax_densenet.settings import RENAMED
from flax_densenet.system import atomic

FILE, TRIALS = 'sweep.json', 'trials'
# The state of a setting; `training` also after an interruption.
STATES = ('training', 'done', 'pruned', 'failed')


@dataclasses.dataclass
class TrialResult:
    """A setting trained with one seed.

    Attributes:
      figures: accuracy (mean AUROC with several labels) after each epoch, on the images
        that choose the best epoch.
      best_epoch: from 1; by `checkpoint_reader.rank`.
      loss: loss of this epoch on the same images.
      seconds: time of the training.
      test: accuracy (mean AUROC) of this epoch on the test images, if they were not
        used for any choice; else None.
    """

    figures: list[float]
    best_epoch: int
    loss: float
    seconds: float
    test: float | None = None

    @property
    def best(self) -> float:
        """The metric of the best epoch."""
        return self.figures[self.best_epoch - 1]


@dataclasses.dataclass
class SettingResult:
    """A setting: values of the fields that a sweep varies.

    Attributes:
      fields: values as text, as in a flag.
      values: the same as JSON values.
      number: number of its trial in Optuna's storage.
      parameters: parameters of that trial, in a search.
      state: one of `STATES`.
      why: the reason if it failed.
      runs: results by seed, as text.
    """

    fields: dict[str, str]
    values: dict[str, Any]
    number: int
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: str = 'training'
    why: str = ''
    runs: dict[str, TrialResult] = dataclasses.field(default_factory=dict)

    def __str__(self):
        return ' '.join(f'{name}={text}' for name, text in self.fields.items())


@dataclasses.dataclass
class SweepRecord:
    """The content of `sweep.json`.

    Attributes:
      definition: values that must be the same when a sweep continues, see `plan`.
      arguments: arguments of the command line that all runs share.
      figure: the metric in `TrialResult.figures`: `test accuracy`, `validation
        accuracy` or `mean AUROC`.
      part: which images choose: `val` or `test`.
      importances: share of each field in the variance of results, for a search.
    """

    definition: dict[str, Any]
    arguments: list[str]
    figure: str = 'test accuracy'
    settings: list[SettingResult] = dataclasses.field(default_factory=list)
    importances: dict[str, float] = dataclasses.field(default_factory=dict)
    part: str = epoch_records.TEST

    @property
    def fields(self) -> list[str]:
        """The fields that differ between settings, in the order of the flags."""
        return [name for axis in self.definition['axes'] for name in axis['fields']]

    @property
    def short_fields(self) -> list[str]:
        """The same without their sections, if they remain distinct."""
        ends = [name.rpartition('.')[2] for name in self.fields]
        pairs = zip(self.fields, ends, strict=True)
        return [end if ends.count(end) == 1 else name for name, end in pairs]

    def folder(self, setting: SettingResult, seed: str | int = '') -> str:
        """The folder of a setting, or of its run with a seed, below the sweep's."""
        name = os.path.join(TRIALS, f'{self.settings.index(setting) + 1:03}')
        return os.path.join(name, f'seed{seed}') if seed != '' else name

    def save(self, workdir: str):
        """Writes `sweep.json`."""
        with atomic.replacing(os.path.join(workdir, FILE)) as file:
            json.dump(dataclasses.asdict(self), file, indent=1)


def is_sweep(workdir: str) -> bool:
    """Whether a folder holds a sweep."""
    return os.path.isfile(os.path.join(workdir, FILE))


def load(workdir: str) -> SweepRecord:
    """Reads `sweep.json`.

    Raises: UserError: it cannot be read, or is not a record of this program.
    """
    path = os.path.join(workdir, FILE)
    try:
        with open(path, encoding='utf-8') as file:
            book = SweepRecord(**_with_current_names(json.load(file)))
        book.settings = [_setting(fields) for fields in book.settings]
        _check(book)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
        raise UserError(f'{path} is not a record of a sweep ({e})') from e
    return book


def _with_current_names(saved):
    """Fields of a config under their current names, wherever they occur."""
    if isinstance(saved, dict):
        return {
            RENAMED.get(name, name): _with_current_names(value)
            for name, value in saved.items()
        }
    if isinstance(saved, list):
        return [_with_current_names(value) for value in saved]
    return RENAMED.get(saved, saved) if isinstance(saved, str) else saved


def _setting(fields):
    setting = SettingResult(**fields)
    setting.runs = {seed: _result(run) for seed, run in setting.runs.items()}
    return setting


def _result(fields):
    if 'test_loss' in fields:  # its name before there were three parts
        fields = {k: v for k, v in fields.items() if k != 'test_loss'} | {
            'loss': fields['test_loss']
        }
    return TrialResult(**fields)


def _check(book):
    """Raises if a value does not have the type that the table and the page need."""
    if book.part not in epoch_records.WORDS:
        raise ValueError(f'a sweep by {book.part}')
    texts = [*book.arguments, *book.fields, *book.importances, book.figure]
    numbers = [*book.importances.values()]
    for setting in book.settings:
        if setting.state not in STATES or set(setting.fields) - set(book.fields):
            raise ValueError(f'a setting {setting.state} of {setting}')
        texts += [*setting.fields.values(), setting.why]
        for seed, run in setting.runs.items():
            texts.append(seed)
            numbers += [run.best, run.loss, run.seconds, *run.figures]
            numbers += [] if run.test is None else [run.test]
    wrong = [x for x in texts if not isinstance(x, str)]
    wrong += [x for x in numbers if not isinstance(x, int | float)]
    if wrong:
        raise TypeError(f'{wrong[0]!r} is out of place')
