"""Optuna behind a few calls: what to try next, and whether to continue a trial.

Its storage is an SQLite file, with atomic writes even if the process is killed; the
last line of a journal file could be incomplete, after which Optuna could not read it.
Each suggestion is drawn with a separate seed from the trials before it, so an
interrupted sweep continues with the settings that it would have had.
"""

import contextlib
import sqlite3
import warnings
from typing import Any

from flax_densenet import errors
from flax_densenet.errors import UserError

PRUNERS = ('none', 'median', 'halving')
FILE = 'sweep.db'
_STUDY = 'sweep'
ENOUGH = 10  # finished trials needed for a meaningful importance


def _optuna():
    with errors.extra('sweep', 'sweep'):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def check(prune: str):
    """Raises if Optuna is missing, or if there is no such pruner."""
    if prune not in PRUNERS:
        raise UserError(f'--prune={prune} is not known; use {", ".join(PRUNERS)}')
    _optuna()


def make_pruner(prune: str, epochs: int):
    """Ends trials that fall behind others at the same epoch.

    Args:
      prune: `median`: ends trials with a best result below the median of the finished
        trials, once there are five, and after a quarter of the epochs (at least two);
        `halving`: ends trials that are not in the best third after a ninth and a third
        of the epochs.
      epochs: number of epochs of a complete trial.
    """
    pruners = _optuna().pruners
    if prune == 'median':
        return pruners.MedianPruner(
            n_startup_trials=5, n_warmup_steps=max(2, -(-epochs // 4))
        )
    if prune == 'halving':
        return pruners.SuccessiveHalvingPruner(
            min_resource=max(1, epochs // 9), reduction_factor=3
        )
    return pruners.NopPruner()


class Tuner:
    """The trials of a sweep, by their number.

    Args:
      path: of the storage; made where absent.
      parameters: of a search, by name: a list of choices (text), or
        `(low, high, log)` with ends that are both int or both float. Empty for a grid.
      pruner: of `make_pruner`.
      seed: of the search.

    Raises:
      UserError: the storage cannot be read or written; so do all methods.
    """

    def __init__(self, path: str, parameters: dict[str, Any], pruner, seed: int):
        optuna = _optuna()
        self._optuna, self._path, self._seed = optuna, path, seed
        self._space = {
            name: self._distribution(values) for name, values in parameters.items()
        }
        with self._storage():
            # A path may contain characters that are special in a URL or in Optuna's
            # template.
            self._stored = optuna.storages.RDBStorage(
                'sqlite:///sweep',
                engine_kwargs={
                    'creator': lambda: sqlite3.connect(path, check_same_thread=False)
                },
            )
            self._study = optuna.create_study(
                storage=self._stored,
                study_name=_STUDY,
                direction='maximize',
                pruner=pruner,
                load_if_exists=True,
            )

    def close(self):
        """Closes the file."""
        self._stored.engine.dispose()

    def _distribution(self, values):
        kinds = self._optuna.distributions
        if isinstance(values, list):
            return kinds.CategoricalDistribution(values)
        low, high, log = values
        if isinstance(low, int):
            return kinds.IntDistribution(low, high, log=log)
        return kinds.FloatDistribution(low, high, log=log)

    @contextlib.contextmanager
    def _storage(self):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of what is experimental there
                yield
        except (self._optuna.exceptions.StorageInternalError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        except Exception as error:
            # Errors of sqlalchemy, which is not imported here.
            if type(error).__module__.partition('.')[0] != 'sqlalchemy':
                raise
            raise self._unusable(error) from error

    def _unusable(self, error):
        message = str(getattr(error, '__cause__', None) or error).splitlines()[0]
        return UserError(
            f'{self._path} cannot be used ({message}); restore it from a copy, or use '
            'another --workdir'
        )

    def drop_unknown(self, known: set[int]):
        """Marks trials that were begun but not recorded as failed.

        Args:
          known: numbers of the recorded trials, all of which must exist.
        """
        states = self._optuna.trial.TrialState
        with self._storage():
            trials = self._study.get_trials()
            if gone := known - {trial.number for trial in trials}:
                raise self._unusable(f'it lacks trial {min(gone)} of the sweep')
            for trial in trials:
                if trial.state == states.RUNNING and trial.number not in known:
                    self._study.tell(trial.number, state=states.FAIL)

    def ask(self, about: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """The number of a new trial, and its parameters.

        Args:
          about: parameters that are given, of a trial that is taken again.
        """
        states = self._optuna.trial.TrialState
        with self._storage():
            told = [t for t in self._study.get_trials() if t.state != states.FAIL]
            # By the count, since one that was given up leaves a gap in the numbers.
            self._study.sampler = self._optuna.samplers.TPESampler(
                seed=self._seed % 2**31 + len(told)
            )
            if about is not None and self._space:
                self._study.enqueue_trial(about)
            trial = self._study.ask(self._space)
        return trial.number, trial.params

    def _load(self, number):
        study_id = self._stored.get_study_id_from_name(_STUDY)
        place = self._stored.get_trial_id_from_study_id_trial_number(study_id, number)
        return self._optuna.trial.Trial(self._study, place)

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Reports the metric after an epoch; returns whether to end the trial.

        If an epoch was reported before, the first value counts.
        """
        with self._storage():
            trial = self._load(number)
            trial.report(value, epoch)
            return trial.should_prune()

    def finish(self, number: int, value: float | None):
        """Reports the result; None for a trial that was pruned or failed.

        Optuna leaves failed trials out, and would try the like again; as pruned ones
        they count as bad.
        """
        states = self._optuna.trial.TrialState
        with self._storage():
            state = states.PRUNED if value is None else states.COMPLETE
            self._study.tell(number, value, state=state, skip_if_finished=True)

    def importances(self) -> dict[str, float]:
        """Each parameter's share of the variance of results (fANOVA).

        Returns:
          Empty for a grid, for fewer than `ENOUGH` results, or if all results are
          equal.
        """
        states = self._optuna.trial.TrialState
        with self._storage():
            done = self._study.get_trials(states=(states.COMPLETE,))
            if not self._space or len(done) < ENOUGH:
                return {}
            if len({trial.value for trial in done}) == 1:
                return {}
            importance = self._optuna.importance
            evaluator = importance.FanovaImportanceEvaluator(seed=0)
            shares = importance.get_param_importances(self._study, evaluator=evaluator)
        return {name: float(share) for name, share in shares.items()}
