"""`sweep`: trains a grid of settings, or searches for the best ones."""

import copy
import functools

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from flax_densenet.cli import arguments, command_line, options, train
from flax_densenet.errors import UserError


def run(invocation: options.Invocation):
    """Trains all runs; writes `sweep.html` and `sweep.csv`."""
    from flax_densenet.sweeps import runner as sweep_runner
    from flax_densenet.system import signals

    flags = invocation.flags
    shared = copy.deepcopy(invocation.config)
    # Each takes a few seconds per run.
    for name, off in (('report', False), ('calibrate', False), ('unusual', 'off')):
        if f'train.{name}' not in invocation.overrides:
            shared.train[name] = off
    workdir = invocation.path('workdir') or f'{invocation.workdir}-sweep'
    with signals.stop_gently() as stop:
        sweep_runner.run(
            options.to_dict(shared),
            workdir,
            flags.sweep,
            override=functools.partial(override, shared),
            trials=flags.trials,
            prune=flags.prune,
            retry=flags.retry_failed,
            arguments=invocation.config_arguments,
            stop=stop,
        )


def override(config: ConfigDict, fields: dict[str, str]):
    """A config with some fields changed, by name and text, as flags do."""
    given = [f'--config.{name}={text}' for name, text in fields.items()]
    values, config = absl_flags.FlagValues(), copy.deepcopy(config)
    try:
        for name in fields:
            command_line.check_field(name)
        config_flags.DEFINE_config_dict(
            'config', config, flag_values=values, sys_argv=['', *given]
        )
        values(['', *given])
    except (absl_flags.Error, TypeError, ValueError) as error:  # including UserError
        message = command_line.one_line(str(error))
        raise UserError(f'--sweep: {message.replace("--config.", "")}') from error
    return options.to_dict(config)


COMMAND = options.Command(
    'sweep',
    'Train a grid of settings, or search for the best ones.',
    run,
    usage='[PHOTOS] --sweep=FIELD=VALUE,VALUE...',
    details=(
        'Each --sweep names values of one setting; several make a grid. '
        'FIELD=VALUE,VALUE tries each value. FIELD=LOW..HIGH searches a range, with '
        "--trials. 'FIELD=VALUE FIELD=VALUE; FIELD=VALUE' changes settings together, "
        'one combination after each semicolon; @FILE reads a combination from each '
        'line. train.seed=0,1,2 trains each combination with these seeds. Run the same '
        'command again to resume.',
        'Needs the extra: pip install "flax_densenet[sweep]".',
    ),
    examples=(
        (
            'a grid with three seeds',
            'sweep photos --sweep=optimizer.learning_rate=1e-4,1e-3 '
            '--sweep=train.seed=0,1,2',
        ),
        (
            'a search',
            'sweep photos --sweep=optimizer.learning_rate=1e-5..1e-2 --trials=20 '
            '--prune=median',
        ),
        (
            'how much of published weights to freeze',
            'sweep photos --pretrained --sweep=train.freeze=none,denseblock3',
        ),
    ),
    flags={
        'Search': (
            options.Flag(
                'sweep',
                'Values of settings to try. Can be given several times.',
                kind=list,
                value='VALUES',
            ),
            options.Flag(
                'trials',
                'Number of combinations to try, instead of the whole grid.',
                kind=int,
                value='N',
            ),
            options.Flag(
                'prune',
                'How to stop combinations that fall behind: none, median or halving.',
                default='none',
                value='METHOD',
            ),
            options.Flag(
                'retry_failed',
                'Train failed combinations again.',
                kind=bool,
                default=False,
            ),
        ),
        'Output': (
            options.Flag(
                'workdir',
                'Folder of the sweep.',
                value='FOLDER',
                default_text='ckpt/NAME-sweep, with the name of the recipe',
                is_path=True,
            ),
        ),
        'Weights to start from': (train.PRETRAINED,),
    },
    place=arguments.place_data,
    implied=train.COMMAND.implied,
    fields='All settings apply, to all runs.',
)
