"""`push`: shows a trained model, then uploads it to the Hugging Face Hub."""

import os
import sys
import tempfile

from flax_densenet.cli import arguments, options, trained_model
from flax_densenet.errors import UserError


def run(invocation: options.Invocation) -> int | None:
    """Exports the model as a folder for the Hub, shows it, asks, and uploads it."""
    from flax_densenet.export import formats, push
    from flax_densenet.weights import timm_config

    flags = invocation.flags
    if not flags.repository:
        raise UserError('push needs a repository: push MODEL OWNER/NAME')
    if not flags.yes and (sys.stdin is None or not sys.stdin.isatty()):
        raise UserError('push asks before it uploads; in a script, give --yes')
    path = trained_model.find(invocation)
    target = push.find_target(flags.repository, private=flags.private)
    if timm_config.is_folder(path):
        for name in ('license', 'data_license'):
            if flags[name].value:
                raise UserError(
                    f'--{name}: {path} already has a model card; edit its README.md'
                )
        return _send(path, target, ask=not flags.yes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = os.path.join(scratch, 'hub')
        settings = formats.Options(license=flags.license)
        trained_model.export(invocation, path, folder, 'huggingface', settings)
        return _send(folder, target, ask=not flags.yes)


def _send(folder, target, *, ask):
    from flax_densenet.export import push

    print(push.describe(folder, target))
    if ask:
        print('Upload it? [y/N] ', end='', flush=True)
        if sys.stdin.readline().strip().lower() not in ('y', 'yes'):
            print('nothing was uploaded')
            return 1
    print(f'sent: {push.send(folder, target)}')
    print(f'to use it: --config.init_from=hf:{target.name}')
    return None


def _place(positionals):
    arguments.check_count(positionals, 'MODEL', 'OWNER/NAME')
    return list(zip(('workdir', 'repository'), positionals, strict=False))


COMMAND = options.Command(
    'push',
    'Upload a trained model to the Hugging Face Hub.',
    run,
    usage='MODEL OWNER/NAME',
    details=(
        'MODEL is the folder of a run, a file of weights, or a folder that `export '
        '--format=huggingface` wrote, whose card you may have edited. The model card, '
        'the files and their size are shown before anything is uploaded. Log in first, '
        'with `hf auth login` or the environment variable HF_TOKEN.',
    ),
    examples=(
        ('look at it, then upload it', 'push ckpt/birds me/birds --license=mit'),
        ('from a script, kept private', 'push ckpt/birds me/birds --private --yes'),
    ),
    flags={
        'Model': (options.WORKDIR, *options.OF_WEIGHTS, options.RAW),
        'Hub': (
            options.Flag('repository', 'Repository to upload to.', value='OWNER/NAME'),
            options.Flag(
                'private',
                'Create a private repository; an existing public one is refused.',
                kind=bool,
                default=False,
            ),
            options.Flag('yes', 'Upload without asking.', kind=bool, default=False),
        ),
        'Verification': (options.VERIFICATION_FILES,),
        'Model card': options.LICENSES,
    },
    place=_place,
    fields='Only init_from and data.* apply, for the images to verify on.',
)
