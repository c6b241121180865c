"""`lr_find`: which learning rates make sense for a model and data."""

from flax_densenet.cli import arguments, options


def run(invocation: options.Invocation):
    """Raises the learning rate step by step; prints and plots the losses."""
    from flax_densenet.train import lr_finder

    lr_finder.find(invocation.fields, invocation.workdir, steps=invocation.flags.steps)


COMMAND = options.Command(
    'lr_find',
    'Find a learning rate: raise it step by step and watch the loss.',
    run,
    usage='[PHOTOS]',
    details=(
        'Trains a copy of the model while the learning rate grows, and suggests a '
        'rate. The run itself is not changed. Writes lr_find.png and lr_find.json.',
    ),
    examples=(
        ('for a recipe', 'lr_find --config=folder:photos'),
        ('with more steps', 'lr_find photos --steps=200'),
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
    }
    | options.SEVERAL_PROCESSES,
    place=arguments.place_data,
    fields='All settings apply.',
)
