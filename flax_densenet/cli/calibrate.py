"""`calibrate`: fits the probabilities and thresholds of a trained model."""

import dataclasses
import os

from flax_densenet.cli import arguments, crossval, options, trained_model
from flax_densenet.errors import UserError
from flax_densenet.system import terminal


def run(invocation: options.Invocation):
    """Fits, saves the result next to the model, and prints the gain."""
    from flax_densenet.evaluation import (
        choosing,
        decision_text,
        fitting,
        measured_data,
        results,
        selection,
        threshold_rules,
    )
    from flax_densenet.weights import decisions, published

    flags = invocation.flags
    if flags.threshold:
        threshold_rules.parse(flags.threshold, '--threshold')
    if published.is_name(invocation.fields['init_from']):
        name = invocation.fields['init_from']
        raise UserError(
            f'{name} is shared by all programs that use it; calibrate a copy: export '
            f'{name} model.safetensors'
        )
    rules = _rules(flags)
    if crossval.measure(invocation, invocation.workdir, report=False, rules=rules):
        return
    trained, path, settings = trained_model.load(
        invocation, invocation.workdir, raw=True
    )
    source, examples, names, own = measured_data.find_examples(
        trained, path, settings, selecting=True
    )
    choosing.places_of(names, rules.positive_class, source.multi_label)
    part = 'test' if source.has_test or own else 'all'
    loader = settings.loader
    computed = selection.compute(
        trained,
        examples,
        names,
        data=source.name,
        part=part if source.val is None else 'val',
        train=source.train if own else None,
        batch_size=loader.batch_size,
        threads=loader.threads,
        workers=loader.workers,
    )
    made = fitting.fit(computed, rules)
    fitting.save(path, made)
    found = results.from_outputs(
        dataclasses.replace(trained, decisions=made),
        computed.examples,
        computed.class_names,
        computed.outputs,
    )
    terminal.say(decision_text.calibration_line(found.metrics))
    for line in decision_text.threshold_lines(found.metrics):
        terminal.say(line)
    terminal.say(
        f'{decisions.files_of(path)[0]} written, fitted on {made.where}; eval, report, '
        'predict, serve and export use it unless --raw is given'
    )
    if os.path.exists(os.path.join(path, 'report.html')):
        terminal.say(
            f'report.html in {path} shows the model before this; '
            f'`report {path}` writes it again'
        )


def _rules(flags):
    """Checks and returns what to fit."""
    from flax_densenet.evaluation import selection, unusual

    rules = selection.Rules(
        flags.calibrate,
        flags.threshold,
        flags.positive_class,
        unusual=flags.unusual,
        unusual_share=flags.unusual_share,
    )
    unusual.check_settings(
        rules.unusual,
        share=rules.unusual_share,
        images=rules.unusual_images,
        prefix='--',
    )
    return rules


COMMAND = options.Command(
    'calibrate',
    'Calibrate the probabilities and choose the thresholds of a trained model.',
    run,
    usage='MODEL [PHOTOS]',
    details=(
        'MODEL is the folder of a run, or a file or folder of weights. Training does '
        'this automatically at its end. Use the command for other rules, for runs of '
        'earlier versions, and for other weights, which need PHOTOS. It uses the '
        "images of PHOTOS if given, else the run's own validation images, or its test "
        'images if there is no validation part. The result is saved next to the model.',
    ),
    examples=(
        ('calibrate a run of an earlier version', 'calibrate ckpt/birds'),
        (
            'find at least 95% of the positives',
            'calibrate ckpt/moles --threshold=sensitivity=0.95',
        ),
        ('weights of another program', 'calibrate densenet121.pth photos'),
    ),
    flags={
        'Model': (options.WORKDIR, *options.OF_WEIGHTS),
        'What to fit': (
            options.Flag(
                'threshold',
                'How to choose from which probability on a label, or the positive one '
                'of two classes, counts as positive: youden, f1, sensitivity=0.95, '
                'specificity=0.9 or cost=5:1 (a false negative costs 5, a false '
                'positive 1).',
                default='',
                value='RULE',
                default_text='0.5 for labels, and the most likely class',
            ),
            options.Flag(
                'positive_class',
                'The positive one of two classes, for --threshold.',
                default='',
                value='CLASS',
                default_text='the second class',
            ),
            options.Flag(
                'calibrate',
                'Calibrate the probabilities; --nocalibrate keeps them as they are.',
                kind=bool,
                default=True,
            ),
            options.Flag(
                'unusual',
                'How to score images that are unlike the training images: both, '
                'energy, mahalanobis, neighbor or off (docs/unusual.md).',
                default='auto',
                value='METHOD',
                default_text='both; mahalanobis with several labels; energy if the '
                'training images are not known',
            ),
            options.Flag(
                'unusual_share',
                'Share of these images that count as usual.',
                kind=float,
                default=0.95,
                value='SHARE',
            ),
        ),
    }
    | options.SEVERAL_PROCESSES,
    place=arguments.place_model_and_data,
    fields='Only init_from and data.* apply; everything else comes from the model.',
)
