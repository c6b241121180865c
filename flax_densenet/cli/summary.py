"""`summary`: the layers, parameters and operations of a model."""

import os

from flax_densenet.cli import arguments, options
from flax_densenet.system import paths


def run(invocation: options.Invocation):
    """Prints a table of the layers."""
    from flax_densenet import settings as settings_lib
    from flax_densenet.data import dataset
    from flax_densenet.models import factory, summary
    from flax_densenet.settings import sizes
    from flax_densenet.train import by_count, finetune
    from flax_densenet.weights import transfer, weight_file

    config = invocation.fields
    found = weight_file.load(config['init_from']) if config['init_from'] else None
    settings = transfer.resolve(settings_lib.from_config(config), found)
    blocks = len(factory.from_settings(settings.model, num_classes=1).block_sizes)
    settings = by_count.choose(settings, 1000, blocks=blocks)  # images, for example
    size = settings.preparation.image_size
    if not size:
        kind = settings.data.source.partition(':')[0]
        size = dataset.DEFAULT_IMAGE_SIZES.get(kind, 224)
    # A summary reads no data, so it assumes 1000 classes unless weights are given.
    classes = found.num_classes if found else 1000
    module = factory.from_settings(settings.model, num_classes=classes)
    plan = finetune.plan_of(module, settings)
    shape = (*sizes.pair(size), settings.preparation.channels)
    print(f'{settings.model.variant} with {classes} classes')
    print(summary.format_summary(module, shape, rates=plan.rates))
    if str(plan):
        print(plan)


def _place(positionals):
    arguments.check_count(positionals, 'MODEL')
    name = positionals[0]
    # A plain network name is summarized without loading its weights.
    if os.path.exists(paths.expand(name)) or ':' in name:
        return [('config.init_from', name)]
    return [('config.model.variant', name)]


COMMAND = options.Command(
    'summary',
    'Print the layers, parameters and operations of a model.',
    run,
    usage='[MODEL]',
    details=(
        'MODEL is a variant such as densenet121 or BC-L100k12, the folder of a run, or '
        'a file of weights. Without it, the model of the recipe is shown.',
    ),
    examples=(
        ('a variant', 'summary densenet161'),
        ('a recipe', 'summary --config=cifar'),
        ('with another image size', 'summary densenet121 --config.data.image_size=320'),
    ),
    place=_place,
    fields='The settings of the model and data.image_size apply.',
)
