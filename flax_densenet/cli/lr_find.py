"""`lr_find`: finds a learning rate for a model and its data."""

from flax_densenet import errors
from flax_densenet.cli import arguments, options, train
from flax_densenet.system import terminal


def run(invocation: options.Invocation):
    """Raises the learning rate step by step; prints and plots the losses."""
    from flax_densenet.distributed import mesh
    from flax_densenet.report import plots
    from flax_densenet.train import lr_finder

    workdir = invocation.workdir
    result = lr_finder.find(invocation.fields, workdir, steps=invocation.flags.steps)
    if not mesh.is_writer():
        return
    where = f'{lr_finder.FILE} is in {workdir}'
    if errors.is_installed('matplotlib'):
        picture = plots.save_rates(workdir, result)
        where = f'{picture} and {lr_finder.FILE} are in {workdir}'
    else:
        terminal.say(
            f'{plots.RATES_FILE} is not written: it needs pip install '
            "'flax_densenet[report]'"
        )
    terminal.say(f'{lr_finder.describe(result)}; {where}')


COMMAND = options.Command(
    'lr_find',
    'Find a learning rate: raise it step by step and watch the loss.',
    run,
    usage='[PHOTOS]',
    details=(
        'Trains a copy of the model with a growing learning rate and suggests a rate. '
        'The run itself is not changed. Writes lr_find.png and lr_find.json.',
    ),
    examples=(
        ('for a recipe', 'lr_find --config=folder:photos'),
        ('with more steps', 'lr_find photos --steps=200'),
        ('for published weights', 'lr_find photos --pretrained'),
    ),
    flags={
        'Search': (
            options.Flag(
                'steps',
                'Training steps to take, at least 40.',
                kind=int,
                default=100,
                value='N',
            ),
        ),
        'Output': (options.WORKDIR,),
        'Weights to start from': (train.PRETRAINED,),
    }
    | options.SEVERAL_PROCESSES,
    place=arguments.place_data,
    implied=train.COMMAND.implied,
    fields='All settings apply.',
)
