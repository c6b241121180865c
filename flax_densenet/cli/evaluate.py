"""`eval`: measures a trained model on labeled images."""

from flax_densenet.cli import (
    arguments,
    crossval,
    options,
    own_images,
    trained_model,
)
from flax_densenet.system import terminal


def run(invocation: options.Invocation):
    """Prints the metrics; writes `eval.json` and `predictions.csv`."""
    from flax_densenet.evaluation import decision_text, precisions, results

    workdir = invocation.workdir
    if crossval.measure(invocation, workdir, report=False):
        return
    trained, path, settings = trained_model.load(invocation, workdir)
    trained_model.check_others(invocation, trained, path)
    trained, source, found, trained_on = precisions.of_data(
        trained, path, settings, invocation.flags.precision
    )
    found = trained_model.add_others(invocation, trained, settings, found)
    own = own_images.are_measured(
        invocation, trained, source=source, trained_on=trained_on
    )
    measured = results.describe(trained, settings.data.source, weights=path, own=own)
    what = 'test images' if source.has_test or trained_on else 'images'
    where = f'{len(found.labels)} {what} of {settings.data.source}, {measured.model}'
    results.save(workdir, found, measured)
    terminal.say(results.format_metrics_table(found, where))
    line = decision_text.describe_fit(trained.decisions, source.name, own=trained_on)
    if line:
        terminal.say(line)
    names = [results.EVAL_FILE, results.PREDICTIONS_FILE]
    terminal.say(own_images.describe(workdir, names))


COMMAND = options.Command(
    'eval',
    'Measure a trained model: accuracy, F1, AUROC and calibration.',
    run,
    usage='MODEL [PHOTOS]',
    details=(
        'MODEL is the folder of a run or a file of weights. The best checkpoint is '
        "measured on the run's own test images or, if you name other data with PHOTOS, "
        '--config.data.source or a recipe, on that data. Classes are matched by name. '
        "Writes eval.json and predictions.csv. Those of the run's own images are kept "
        'in its subfolder own when others are measured.',
    ),
    examples=(
        ("the run's own test images", 'eval ckpt/birds'),
        ('other images', 'eval ckpt/birds other_photos'),
        (
            'also how many images of other things are noticed',
            'eval ckpt/birds --others=cats',
        ),
        ('average over mirrored images', 'eval ckpt/birds --config.data.tta=flip'),
    ),
    flags={
        'Model': (
            options.WORKDIR,
            *options.OF_WEIGHTS,
            options.RAW,
            options.MEASURED_PRECISION,
            options.OTHERS,
        )
    }
    | options.SEVERAL_PROCESSES,
    place=arguments.place_model_and_data,
    fields='Only init_from and data.* apply; everything else comes from the model.',
)
