"""Many runs with one command: a grid of settings or a search, over seeds.

Each run is an ordinary run of `fit.fit`, in `trials/<trial>/seed<seed>/` of the sweep's
folder. `sweep.json` (see `record`) has the results, and Optuna's storage the state of
its search and pruning. Both are always written after the run's own checkpoints, so the
same command resumes after any interruption: it keeps finished runs, reports epochs that
Optuna has not seen, and resumes the interrupted run.

A setting is trained with one seed after another. The metric of the first seed after
each epoch decides about pruning; a setting that is pruned or fails is not trained with
the other seeds. A search gets the mean over the seeds.
"""

import gc
import itertools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from flax_densenet import errors
from flax_densenet import settings as settings_lib
from flax_densenet.checkpoints import epoch_records, run_folder
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.errors import UserError
from flax_densenet.sweeps import one_run, optuna_study, space
from flax_densenet.sweeps import page as sweep_page
from flax_densenet.sweeps import plan as sweep_plan
from flax_densenet.sweeps import record as sweep_record
from flax_densenet.sweeps import table as sweep_table
from flax_densenet.system import lock, signals

_LOGGER = logging.getLogger(__name__)

_REPEATS = 50  # repeated suggestions in a row that end a search
_REMEDY = 'use another --workdir, or the same settings'


def run(
    settings: settings_lib.Settings | Mapping[str, Any],
    workdir: str,
    flags: list[str],
    *,
    override: Callable[[dict[str, str]], settings_lib.Settings | Mapping[str, Any]],
    trials: int | None = None,
    prune: str = 'none',
    retry: bool = False,
    arguments: tuple[str, ...] = (),
    stop: signals.Stop | None = None,
) -> list[sweep_table.Row]:
    """Trains all settings, and ends with the table, `sweep.csv` and `sweep.html`.

    Args:
      settings: what all runs share; of `settings.from_config`, or a config.
      workdir: folder of the sweep; created if missing, and locked during training.
      flags: values of `--sweep`, see `space`.
      override: function that returns the settings with some fields changed, by name as
        text; raises `UserError` for invalid values.
      trials: number of settings to search for; None for the grid of all values.
      prune: one of `optuna_study.PRUNERS`.
      retry: whether to train failed settings again.
      arguments: arguments of the command line, for the command that the page shows.
      stop: as in `fit.fit`.

    Returns:
      The rows of the table.

    Raises:
      UserError: a field, a value or the workdir cannot be used, or all settings failed.
      signals.Stopped: `stop` was asked; training so far is saved.
    """
    optuna_study.check(prune)
    _check_workdir(workdir)
    settings = settings_lib.from_config(settings)
    plan = sweep_plan.Plan(settings, flags, override, trials, prune)
    plan.check()
    checkpoint_reader.make_workdir(workdir)
    with lock.hold(workdir, doing='runs a sweep'):
        kept = _open_book(workdir, plan, list(arguments))
        optuna = optuna_study.Tuner(
            os.path.join(workdir, optuna_study.FILE),
            plan.parameters,
            optuna_study.make_pruner(prune, settings.train.epochs),
            seed=plan.seeds[0],
        )
        try:
            sweep = _Sweep(workdir, plan, kept, optuna, stop)
            sweep.train_all(retry)
            kept.importances = optuna.importances()
            kept.save(workdir)
        finally:
            optuna.close()
        rows = sweep_page.save(workdir, kept)
    _LOGGER.info(sweep_page.format_end(workdir, kept, rows))
    if all(row.setting.state == 'failed' for row in rows):
        raise UserError(
            f'all {len(rows)} settings failed, the first with: {kept.settings[0].why}'
        )
    return rows


def _check_workdir(workdir):
    if os.path.exists(os.path.join(workdir, run_folder.METRICS_FILE)):
        raise UserError(
            f'--workdir={workdir} holds a run; a sweep needs a folder of its own'
        )


def _open_book(workdir, plan, arguments):
    """The sweep of the workdir, extended by new settings, or a new one."""
    definition = plan.definition()
    if not sweep_record.is_sweep(workdir):
        return sweep_record.SweepRecord(definition, arguments)
    kept = sweep_record.load(workdir)
    try:
        message = sweep_plan.find_difference(kept.definition, definition)
    except (LookupError, TypeError, AttributeError) as error:
        path = os.path.join(workdir, sweep_record.FILE)
        raise UserError(f'{path} is not a record of a sweep ({error})') from error
    if message:
        raise UserError(f'--workdir={workdir} holds a sweep {message}; {_REMEDY}')
    if plan.trials is not None and plan.trials < len(kept.settings):
        raise UserError(
            f'--workdir={workdir} holds a sweep of {len(kept.settings)} trials, more '
            f'than --trials={plan.trials}; use as many or more'
        )
    kept.definition, kept.arguments = definition, arguments
    return kept


class _Sweep:
    """The settings of a plan, trained one after another in this process."""

    def __init__(self, workdir, plan, kept, optuna, stop):
        self.workdir, self.plan, self.book = workdir, plan, kept
        self.tuner, self.stop = optuna, stop

    def train_all(self, retry: bool):
        """Trains everything that is not done yet."""
        settings = self.book.settings
        self.tuner.drop_unknown({setting.number for setting in settings})
        for setting in settings:
            if setting.state == 'failed' and retry:
                setting.number, _ = self.tuner.ask(setting.parameters)
                setting.state, setting.why = 'training', ''
            missing = {str(seed) for seed in self.plan.seeds} - setting.runs.keys()
            if setting.state == 'done' and missing:
                setting.state = 'training'
            if setting.state == 'training':
                self.train_setting(setting)
            else:  # if it was not reported before a kill
                self.tell(setting)
        for setting in self.search() if self.plan.trials else self.new_of_grid():
            self.train_setting(setting)

    def new_of_grid(self):
        """Adds the missing settings of the grid."""
        for fields in self.plan.space.grid():
            values = self.plan.values_of(fields)
            if not any(known.values == values for known in self.book.settings):
                number, _ = self.tuner.ask()
                yield self.add(sweep_record.SettingResult(fields, values, number))

    def search(self):
        """Adds settings that Optuna suggests, up to the requested number."""
        repeats = itertools.count(1)
        while len(self.book.settings) < self.plan.trials:
            number, parameters = self.tuner.ask()
            fields = self.plan.fields_of(parameters)
            values = self.plan.values_of(fields)
            known = [s for s in self.book.settings if s.values == values]
            if not known:
                repeats = itertools.count(1)
                yield self.add(
                    sweep_record.SettingResult(fields, values, number, parameters)
                )
                continue
            self.tuner.finish(number, _mean(known[0]))
            if next(repeats) == _REPEATS:
                _LOGGER.info(
                    f'the search ends with {len(self.book.settings)} settings: '
                    f'{_REPEATS} suggestions in a row were already among them'
                )
                return

    def add(self, setting):
        """Records a new setting."""
        self.book.settings.append(setting)
        self.book.save(self.workdir)
        return setting

    def train_setting(self, setting):
        """Trains a setting with the seeds that it has not been trained with."""
        for seed in self.plan.seeds:
            if str(seed) in setting.runs:
                continue
            try:
                self.train_run(setting, seed)
            except (UserError, MemoryError, RuntimeError) as error:
                setting.why, setting.state = _why_failed(error), 'failed'
                _LOGGER.info(f'{setting} failed: {setting.why}')
            finally:
                # Otherwise each run would leave its compiled programs in memory.
                jax.clear_caches()
                gc.collect()
            if setting.state != 'training':
                break
            self.book.save(self.workdir)
        else:
            setting.state = 'done'
        self.book.save(self.workdir)
        self.tell(setting)
        sweep_page.save(self.workdir, self.book)

    def train_run(self, setting, seed):
        """Trains one run, or resumes it, and records its result."""
        name = self.book.folder(setting, seed)
        folder = os.path.join(self.workdir, name)
        fields = setting.fields | {space.SEED: str(seed)}
        _LOGGER.info(f'{self.progress()} in {name}: {sweep_plan.join(fields)}')
        settings = self.plan.override(fields)
        watch = _Watch(
            self.tuner,
            setting.number,
            epochs=settings.train.epochs,
            asks=not setting.runs,
        )
        tested = None
        # Epochs that were finished, but not reported, when the process was killed.
        if not any(map(watch, run_folder.load_run(folder).records)):
            tested = one_run.train(settings, folder, stop=self.stop, ends_after=watch)
        records = run_folder.load_run(folder).records
        part = self.book.part = epoch_records.part_of(records[-1])
        if epoch_records.get(records[-1], 'mean_auroc') is not None:
            self.book.figure = 'mean AUROC'
        else:
            self.book.figure = f'{epoch_records.WORDS[part]} accuracy'
        setting.runs[str(seed)] = one_run.result_of(folder, tested)
        if watch.pruned:
            setting.state = 'pruned'
            _LOGGER.info(f'{setting}: pruned after epoch {len(records)}')

    def progress(self):
        """`run 4 of 6, about 12 min left`, from the time of the previous runs."""
        runs = [run for one in self.book.settings for run in one.runs.values()]
        total = self.plan.count * len(self.plan.seeds)
        # Settings that were pruned or failed have no other seeds.
        total -= sum(
            len(self.plan.seeds) - len(one.runs)
            for one in self.book.settings
            if one.state in ('pruned', 'failed')
        )
        line = f'run {len(runs) + 1} of {total}'
        if runs:
            mean = sum(run.seconds for run in runs) / len(runs)
            minutes = mean * (total - len(runs)) / 60
            line += f', about {max(round(minutes), 1)} min left'
        return line

    def tell(self, setting):
        """Reports the result of a setting to Optuna."""
        self.tuner.finish(setting.number, _mean(setting))


def _mean(setting):
    """The result for Optuna: None for settings that did not finish."""
    if setting.state != 'done':
        return None
    figures = [one.best for one in setting.runs.values()]
    return sum(figures) / len(figures)


class _Watch:
    """Called with the record of each epoch; returns True to end the run early."""

    def __init__(self, optuna, number, *, epochs, asks):
        self._tuner, self._number = optuna, number
        self._epochs, self._asks = epochs, asks
        self.pruned = False

    def __call__(self, record):
        if self._asks:
            figure = checkpoint_reader.rank(record)[0]
            behind = self._tuner.report(self._number, record['epoch'], figure)
            self.pruned = behind and record['epoch'] < self._epochs
        return self.pruned


def _why_failed(error):
    """The line on a failed setting; raises errors that would affect all settings."""
    if isinstance(error, UserError):
        if isinstance(error.__cause__, OSError) or str(error).startswith('--workdir='):
            raise error
        return str(error)
    if (message := errors.explain_system_error(error)) is None:
        raise error
    return message.partition('; the same command')[0]
