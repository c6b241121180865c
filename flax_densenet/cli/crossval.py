"""`crossval`: trains and measures a model for each fold of the data."""

from flax_densenet.cli import arguments, options, train, trained_model
from flax_densenet.errors import UserError

FOLDS = 5


def run(invocation: options.Invocation):
    """Trains all folds; writes pooled metrics, predictions and `report.html`."""
    from flax_densenet.sweeps import crossval
    from flax_densenet.system import signals
    from flax_densenet.weights import heads

    flags, overrides = invocation.flags, invocation.overrides
    if overrides.get('data.fold'):
        raise UserError(
            f'--config.data.fold={overrides["data.fold"]}: crossval trains all folds; '
            'the command train takes one of them'
        )
    chosen = [n for n in (flags.folds, overrides.get('data.folds')) if n is not None]
    if len(set(chosen)) > 1:
        raise UserError(
            f'--folds={chosen[0]} and --config.data.folds={chosen[1]}: give one of them'
        )
    folds = (chosen or [invocation.config.data.folds or FOLDS])[0]
    if folds < 2:
        raise UserError(f'--folds={folds} must be at least 2')
    fields = invocation.fields
    if 'train.report' not in overrides:  # a page per fold takes a few seconds
        fields['train']['report'] = False
    with signals.stop_gently() as stop:
        crossval.run(
            fields,
            invocation.path('workdir') or f'{invocation.workdir}-crossval',
            folds=folds,
            val_fraction=_val_fraction(invocation),
            class_names=flags.class_names and heads.read_names(flags.class_names),
            arguments=invocation.config_arguments,
            stop=stop,
        )


def measure(invocation: options.Invocation, workdir: str, *, report: bool, **more):
    """Measures a cross-validation on its own images, out of fold.

    Each image is predicted by the model that was not trained on it.

    Args:
      **more: passed on to `sweeps.crossval.measure`.

    Returns:
      An `out_of_fold.OutOfFold`; None if the folder holds no cross-validation, or
      other data was named.
    """
    from flax_densenet.weights import ensembles

    if not ensembles.is_ensemble(workdir):
        return None
    from flax_densenet.sweeps import crossval
    from flax_densenet.weights import trained as trained_lib

    flags = invocation.flags
    allowed = ('data.', 'report.') if report else ('data.',)
    trained_model.check_fields(invocation, workdir, *allowed)
    chosen = trained_model.choices(invocation, own_data=True)
    ensemble = trained_lib.load_trained(workdir, choices=chosen)
    if trained_model.data_settings(invocation, ensemble.metadata)[1]:
        return None
    if (rules := more.get('rules')) is not None:
        _check_rules(rules, workdir)
    if 'others' in flags and flags.others:
        trained_model.check_others(invocation, ensemble, workdir)
        more['others'] = lambda trained, settings: trained_model.find_others(
            invocation, trained, settings
        )
    return crossval.measure(
        workdir,
        settings_of=lambda data: trained_model.data_settings(invocation, data)[0],
        choices=chosen,
        precision=flags.precision if 'precision' in flags else None,
        report=report,
        **more,
    )


def _check_rules(rules, workdir):
    """Raises for what each model of a cross-validation has of its own."""
    one = f'name one of its models, such as {workdir}/fold-1'
    if not rules.calibrate:
        raise UserError(
            f'--nocalibrate: each model of {workdir} has its own calibration; {one}'
        )
    if rules.unusual not in ('auto', 'off'):
        raise UserError(
            f'--unusual={rules.unusual}: each model of {workdir} has its own '
            f'statistics; {one}, then {workdir} for the limits'
        )


def _val_fraction(invocation):
    """The value from the user or a recipe; None if neither sets it."""
    chosen = invocation.overrides.get('data.val_fraction')
    return invocation.config.data.val_fraction or None if chosen is None else chosen


COMMAND = options.Command(
    'crossval',
    'Train and measure a model for each fold of the data (cross-validation).',
    run,
    usage='[PHOTOS] --folds=5',
    details=(
        'Divides the images into folds with equal shares of each class; images of one '
        'group (data.groups) and copies stay in one fold. For each fold, trains a run '
        'on the images of the other folds, in FOLDER/fold-1, FOLDER/fold-2, ... Then '
        'each image is predicted by the model that was not trained on it: eval.json, '
        'predictions.csv and report.html hold the metrics of all images, with the mean '
        "and the spread over the folds. A tenth of each fold's training images choose "
        'its best epoch; --config.data.val_fraction changes that.',
        'If the data has a test part, it is in no fold. FOLDER itself is a model for '
        'predict, serve, eval and export: it averages the probabilities of all folds.',
        'Run the same command again to resume after an interruption.',
    ),
    examples=(
        ('five folds', 'crossval photos --folds=5'),
        (
            'fine-tune published weights in each fold',
            'crossval photos --pretrained',
        ),
        ('predict with all five models', 'predict ckpt/densenet121-crossval new.jpg'),
        (
            'one fold only',
            'train photos --config.data.folds=5 --config.data.fold=2',
        ),
    ),
    flags={
        'Folds': (
            options.Flag(
                'folds',
                'Number of folds.',
                kind=int,
                value='N',
                default_text=f'data.folds, else {FOLDS}',
            ),
        ),
        'Output': (
            options.Flag(
                'workdir',
                'Folder of the cross-validation.',
                value='FOLDER',
                default_text='ckpt/NAME-crossval, with the name of the recipe',
            ),
        ),
        'Weights to start from': train.COMMAND.flags['Weights to start from'],
    },
    place=arguments.place_data,
    implied=train.COMMAND.implied,
    fields='All settings apply, to all folds; train.report=True also writes a report '
    'per fold.',
)
