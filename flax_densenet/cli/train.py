"""`train`: trains a model, or resumes training."""

from flax_densenet.cli import arguments, options
from flax_densenet.errors import UserError


def run(invocation: options.Invocation):
    """Trains in the run's folder."""
    from flax_densenet import settings
    from flax_densenet.report import finished, plots
    from flax_densenet.system import signals
    from flax_densenet.train import fit
    from flax_densenet.weights import heads

    workdir = invocation.workdir
    names = invocation.flags.class_names
    names = names and heads.read_names(names)
    with signals.stop_gently() as stop:
        result = fit.fit(
            settings.from_config(invocation.fields),
            workdir,
            class_names=names,
            stop=stop,
            save_samples=plots.save_samples,
        )
        finished.write(workdir, **result.report_options())
        result.send_files()


def _published(variant):
    """The name of the published weights of a network."""
    from flax_densenet.weights import published

    if variant not in published.DEFAULTS:
        raise UserError(
            f'--pretrained: there are no published weights of {variant}, only of '
            f'{", ".join(published.DEFAULTS)}; name other weights with '
            '--config.init_from'
        )
    return variant


def _imply(given):
    """The flags that --pretrained implies: a recipe, or weights for the given one."""
    if given.get('pretrained', 'false') in ('false', 'False'):
        return []
    variant = given.get('config.model.variant') or 'densenet121'
    weights = given.get('config.init_from') or _published(variant)
    if 'config' not in given:
        return [('config', f'finetune:{weights},auto')]
    return [] if 'config.init_from' in given else [('config.init_from', weights)]


PRETRAINED = options.Flag(
    'pretrained',
    "Fine-tune published weights of model.variant. With --config, the recipe's "
    'settings are kept; without it, settings for fine-tuning are chosen by the number '
    'of images.',
    kind=bool,
    default=False,
)
COMMAND = options.Command(
    'train',
    'Train a model on labeled images, or resume training.',
    run,
    usage='[PHOTOS]',
    details=(
        'PHOTOS is a folder with one subfolder of images per class (PHOTOS/CLASS/*) or '
        'PHOTOS/{train,val,test}/CLASS/*. It can also be a folder made by `pack`, tar '
        'files of webdataset, parquet files, or a source such as hf:cifar10 or '
        'tfds:mnist; see `settings data.source`. '
        'Without --config, PHOTOS trains the recipe densenet121.',
        'With --pretrained, training starts from published weights, with settings that '
        'suit the number of images and are printed (docs/pretrained.md).',
        'Run the same command again to resume after an interruption.',
    ),
    examples=(
        ('DenseNet-121 on your own images', 'train photos'),
        (
            'a recipe with augmentation, for 30 epochs',
            'train --config=folder:photos --config.train.epochs=30',
        ),
        ('start from published weights', 'train photos --pretrained'),
        (
            'start from your own weights',
            'train photos --config=finetune:densenet121.pth --workdir=ckpt/birds',
        ),
    ),
    flags={
        'Output': (options.WORKDIR,),
        'Weights to start from': (
            PRETRAINED,
            options.OF_WEIGHTS[0],
        ),
    }
    | options.SEVERAL_PROCESSES,
    place=arguments.place_data,
    implied=_imply,
    fields='All settings apply.',
)
