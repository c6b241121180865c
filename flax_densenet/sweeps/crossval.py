"""Cross-validation: a model for each fold of the data, trained on the other folds.

Each fold is an ordinary run of `fit.fit`, in `fold-1/`, `fold-2/`, ... of one folder,
with `data.folds` and `data.fold` among its settings. `crossval.json` records which
folds are done. Run the same command to resume: finished folds stay as they are, and the
run that was interrupted resumes from its last checkpoint.

When all folds are trained, their predictions for their own held-out images are combined
(`out_of_fold`), and `ensemble.json` makes them one model (`ensembles`). If the data has
a test part, it is in no fold, and the ensemble is measured on it.
"""

import dataclasses
import gc
import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax

from flax_densenet import errors
from flax_densenet import settings as settings_lib
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import run_folder
from flax_densenet.data import dataset, identity, notes
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.errors import UserError
from flax_densenet.evaluation import doubt, fitting, out_of_fold, results, selection
from flax_densenet.inference import explain
from flax_densenet.report import page as report_page
from flax_densenet.sweeps import crossval_record, one_run
from flax_densenet.sweeps import plan as sweep_plan
from flax_densenet.system import atomic, lock, program, signals
from flax_densenet.train import prepare
from flax_densenet.weights import choices as choices_lib
from flax_densenet.weights import ensembles
from flax_densenet.weights import precision as precision_lib
from flax_densenet.weights import trained as trained_lib

_LOGGER = logging.getLogger(__name__)
VAL_FRACTION = 0.1  # default share of the training images of each fold
_REMEDY = 'use another --workdir, or the same settings and images'
# Finds images of none of the classes, with their scores.
FindOthers = Callable[[trained_lib.Trained, settings_lib.Settings], doubt.Others | None]


@notes.once()
def run(
    settings: settings_lib.Settings | Mapping[str, Any],
    workdir: str,
    *,
    folds: int,
    val_fraction: float | None = None,
    class_names: tuple[str, ...] | None = None,
    arguments: tuple[str, ...] = (),
    report: bool = True,
    stop: signals.Stop | None = None,
) -> out_of_fold.OutOfFold:
    """Trains all folds, measures them, and makes an ensemble of them.

    Args:
      settings: of all folds; a config, or of `settings.from_config`.
      workdir: folder of the cross-validation; made where absent, locked meanwhile.
      folds: how many, at least 2.
      val_fraction: share of each fold's training images that choose its best epoch, so
        that the held-out images choose nothing; 0 for none. None for `VAL_FRACTION`,
        unless the data has a validation part.
      class_names: as of `fit.fit`.
      arguments: of the command line, for the record.
      report: whether to write `report.html`.
      stop: as of `fit.fit`.

    Raises:
      UserError: a field, the data or the workdir cannot be used, or a fold failed.
      signals.Stopped: `stop` was asked; training so far is saved.
    """
    given = _with_fold(settings_lib.from_config(settings), folds, 0)
    _check_workdir(workdir)
    shared, record = _plan(given, class_names, list(arguments), val_fraction)
    checkpoint_reader.make_workdir(workdir)
    with lock.hold(workdir, doing='runs a cross-validation'):
        record = _open_record(workdir, record)
        finished = len(record.runs) == folds
        for fold in range(1, folds + 1):
            if str(fold) not in record.runs:
                _train(workdir, record, shared, fold, class_names, stop)
        _write_files(workdir, record, shared)
        rules = selection.Rules(**vars(shared.decisions))
        keeps = finished and _has_decisions(workdir, rules)
        return measure(workdir, report=report, rules=None if keeps else rules)


def _has_decisions(workdir, rules):
    """Whether a finished cross-validation has decisions, by the rule if there is one.

    Those that `calibrate` fitted stay.
    """
    found = trained_lib.load_trained(workdir).decisions
    if found is None or not rules.threshold:
        return found is not None
    return found.thresholds is not None and found.thresholds.rule == rules.threshold


def _with_fold(settings, folds, fold):
    data = dataclasses.replace(settings.data, folds=folds, fold=fold)
    return dataclasses.replace(settings, data=data)


def _check_workdir(workdir):
    if os.path.exists(os.path.join(workdir, run_folder.METRICS_FILE)):
        raise UserError(
            f'--workdir={workdir} holds a run; a cross-validation needs a folder of '
            'its own'
        )


def _plan(settings, class_names, arguments, val_fraction):
    """The settings that all folds share, and a new record; all that can fail early."""
    folds = settings.data.folds
    resolved, _ = prepare.resolve(settings, None, class_names)
    every = dataset.from_settings(resolved.data, resolved.preparation)
    # The detected window, so that the folds make one ensemble.
    seen = every.train.preparation
    preparation = dataclasses.replace(
        settings.preparation, window=seen.window or (), bit_depth=seen.bit_depth
    )
    if val_fraction is None:
        val_fraction = _choose_val_fraction(every)
    data = dataclasses.replace(settings.data, val_fraction=val_fraction)
    settings = dataclasses.replace(settings, data=data, preparation=preparation)
    first = _with_fold(settings, folds, 1)
    prepare.prepare(first, '', resume=False, class_names=class_names)
    free = {*sweep_plan.FREE, *crossval_record.PLACES, 'data.fold', 'data.folds'}
    config = settings_lib.flatten(settings)
    record = crossval_record.CrossvalRecord(
        folds,
        {name: value for name, value in config.items() if name not in free},
        arguments,
        {name: len(part) for name, part in every.parts.items()},
        identity.describe(every),
    )
    # In the form that JSON returns.
    fields = json.loads(json.dumps(dataclasses.asdict(record)))
    return settings, crossval_record.CrossvalRecord(**fields)


def _choose_val_fraction(every):
    """The share for validation; 0 if the data has its own validation part."""
    if every.val is not None:
        return 0.0
    notes.say(
        f"data.val_fraction={VAL_FRACTION:g}: these of each fold's training images "
        'choose its best epoch, so that the held-out images choose nothing; '
        '--config.data.val_fraction=0 trains on them as well'
    )
    return VAL_FRACTION


def _open_record(workdir, now):
    """The record of the workdir, or the new one."""
    if not crossval_record.is_crossval(workdir):
        now.save(workdir)
        return now
    before = crossval_record.load(workdir)
    if message := crossval_record.find_difference(before, now):
        raise UserError(
            f'--workdir={workdir} holds a cross-validation {message}; {_REMEDY}'
        )
    now.runs = before.runs
    return now


def _train(workdir, record, settings, fold, class_names, stop):
    """Trains the run of a fold, or resumes it."""
    folder = os.path.join(workdir, crossval_record.folder_of(fold))
    _LOGGER.info(f'{_progress(record, fold)} in {folder}')
    try:
        more = {'class_names': class_names} if class_names else {}
        tested = one_run.train(
            _with_fold(settings, record.folds, fold), folder, stop=stop, **more
        )
    except UserError as error:
        raise UserError(f'fold {fold}: {error}') from error
    finally:
        # Otherwise each run would leave its compiled programs in memory.
        jax.clear_caches()
        gc.collect()
    record.runs[str(fold)] = one_run.result_of(folder, tested)
    record.save(workdir)


def _progress(record, fold):
    """`fold 3 of 5, about 12 min left`, from the time of the previous folds."""
    line = f'fold {fold} of {record.folds}'
    if record.runs:
        mean = record.seconds / len(record.runs)
        minutes = mean * (record.folds - len(record.runs)) / 60
        line += f', about {max(round(minutes), 1)} min left'
    return line


def _write_files(workdir, record, settings):
    """The description of the ensemble of the folds."""
    with atomic.replacing(os.path.join(workdir, run_folder.CONFIG_FILE)) as file:
        json.dump(settings_lib.to_config(settings), file, indent=2)
    names = [crossval_record.folder_of(n) for n in range(1, record.folds + 1)]
    source = os.path.join(workdir, names[0], run_folder.ENVIRONMENT_FILE)
    if os.path.isfile(source):
        shutil.copy(source, os.path.join(workdir, run_folder.ENVIRONMENT_FILE))
    ensembles.save(
        workdir, ensembles.Record(tuple(names), record.images, record.identity)
    )


@notes.once()
def measure(
    workdir: str,
    *,
    settings_of: Callable[[dict[str, Any]], settings_lib.Settings] | None = None,
    choices: choices_lib.Choices = choices_lib.NO_CHOICES,
    precision: str | None = None,
    report: bool = True,
    rules: selection.Rules | None = None,
    others: FindOthers | None = None,
    path: str | None = None,
    how: explain.Options = explain.DEFAULT,
    private: bool | None = None,
) -> out_of_fold.OutOfFold:
    """Measures a finished cross-validation; writes and logs the results.

    `eval.json`, `predictions.csv` and `report.html` are of the out-of-fold predictions;
    those in `test/` are of the ensemble on the test part of the data, if there is one.

    Args:
      settings_of: settings to measure a model with, of its metadata; by default those
        of the folds.
      choices: as of `trained.load_trained`.
      precision: as of `precisions.of_data`.
      report: whether to write `report.html`, if the packages for it are there.
      rules: for the decisions of the ensemble, which are fitted on the out-of-fold
        predictions and kept; None to use those that it has.
      others: finds images of none of the classes, of the model and the settings.
      path, how, private: as of `page.save_report`.

    Raises:
      UserError: the data or a fold is not there any more.
    """
    settings_of = settings_of or _own_settings
    options: dict[str, Any] = {'mesh': mesh_lib.make_mesh(), 'choices': choices}
    ensemble = trained_lib.load_trained(workdir, **options)
    found, ensemble = _collect(
        workdir, ensemble, rules, settings_of, precision=precision, **options
    )
    settings = settings_of(ensemble.metadata)
    ensemble = ensemble.with_tta(settings.evaluation.tta)
    if precision in ('float32', 'bfloat16'):
        ensemble = precision_lib.to(ensemble, precision)
    unlike = others(ensemble, settings) if others else None
    pooled = dataclasses.replace(
        found.results, decisions=ensemble.decisions, others=unlike
    )
    found = dataclasses.replace(found, results=pooled)
    lines = _describe_results(found)
    names = ensemble.class_names
    source = dataset.from_settings(settings.data, settings.preparation, names)
    if source.has_test:
        lines += _measure_test(workdir, ensemble, settings, unlike)
    files = [results.EVAL_FILE, results.PREDICTIONS_FILE]
    if report and errors.is_installed('jinja2'):
        report_page.save_report(
            *(workdir, ensemble, source, found.results),
            path=path,
            trained_on=False,
            how=how,
            private=private,
            pooled=found,
        )
        files.append(path or report_page.REPORT_FILE)
    else:
        results.save(workdir, found.results, found.measured(), found.about())
    _LOGGER.info('\n'.join([*lines, *_describe_files(workdir, found, files)]))
    return found


def _describe_results(found):
    where = f'{len(found.results.labels)} images of {found.data}'
    title = f'{where}, {found.measured().model}'
    return [
        out_of_fold.format_folds(found),
        results.format_metrics_table(found.results, title),
        out_of_fold.describe_selection(found),
    ]


def _describe_files(workdir, found, files):
    command = [*program.words(), 'predict', shlex.quote(workdir), 'FILES']
    return [
        f'{", ".join(files[:-1])} and {files[-1]} are in {workdir}',
        f'the {len(found.folds)} models as one: {" ".join(command)}',
    ]


def _collect(workdir, ensemble, rules, *where, **options):
    """The out-of-fold results, and the ensemble with what the rules fit on them."""
    own = ensemble.decisions
    score = own and own.unusual
    if rules is None or not rules.fit_anything:
        found = out_of_fold.collect(workdir, *where, unusual=score, **options)
        ensemble.notes.tell()
        return found, ensemble
    found = out_of_fold.collect(workdir, *where, **options)
    made = out_of_fold.fit(found, ensemble, rules)
    fitting.save(workdir, made)
    for name in ('decisions', ensembles.MISSING_SCORE):
        ensemble.notes.pop(name, None)
    if made.unusual is not None:
        found = out_of_fold.rescale(found, made.unusual)
    return found, dataclasses.replace(ensemble, decisions=made)


def _own_settings(metadata):
    fields = dict(metadata['data'])
    fields['image_size'] = fields.get('image_size') or metadata['image_size']
    return settings_lib.from_saved({'data': fields})


def _measure_test(workdir, ensemble, settings, others):
    """Lines about the ensemble on the test part of the data."""
    _, own, _ = results.of_data(ensemble, workdir, settings)
    own = dataclasses.replace(own, others=others)
    measured = results.describe(ensemble, settings.data.source, weights=workdir)
    folder = os.path.join(workdir, out_of_fold.TEST)
    results.save(folder, own, measured)
    where = f'{len(own.labels)} images of the test part, {measured.model}'
    return [
        results.format_metrics_table(own, where),
        f'the test part is in no fold; its {results.EVAL_FILE} is in {folder}',
    ]
