"""`pack`: copies a set of images into a few large files."""

from flax_densenet.cli import arguments, options
from flax_densenet.errors import UserError
from flax_densenet.system import terminal

_TABLE = (
    *('label_kind', 'label_columns', 'blank_labels', 'uncertain_labels'),
    *('soft_labels', 'groups', 'split'),
)
_FIELDS = (
    *('data.source', 'data.labels', 'data.bad_images', 'data.threads'),
    *(f'data.{name}' for name in _TABLE),
)


def run(invocation: options.Invocation):
    """Packs folder:PATH or tar:PATH into --out; without --out, verifies packed:DIR."""
    from flax_densenet.data import label_options
    from flax_densenet.data.packed import manifest
    from flax_densenet.data.packed import plan as pack_plan
    from flax_densenet.data.packed import writer as pack_writer

    for name in invocation.overrides:
        if name not in _FIELDS:
            raise UserError(
                f'--config.{name} has no effect on pack; only {", ".join(_FIELDS)} can '
                'be set'
            )
    fields, flags = invocation.fields['data'], invocation.flags
    out = invocation.path('out')
    kind, _, name = fields['source'].partition(':')
    if kind == 'packed' and not out:
        intact = manifest.describe(pack_writer.verify(name))
        terminal.say(f'{name}: all files are intact; {intact}')
        return
    if not out:
        raise UserError('pack needs the folder to write: pack PHOTOS FOLDER')
    if not 1 <= fields['threads'] <= 1024:
        raise UserError(f'data.threads={fields["threads"]} must be from 1 to 1024')
    if fields['bad_images'] not in ('error', 'skip'):
        raise UserError(
            f'data.bad_images={fields["bad_images"]} is not known; use error, skip'
        )
    names = [flag.name for flag in _PACKING]
    packing = pack_plan.Options(**{name: getattr(flags, name) for name in names})
    made = pack_writer.pack(
        fields['source'],
        out,
        options=packing,
        table=label_options.options_of(fields),
        **{name: fields[name] for name in ('labels', 'bad_images', 'threads')},
    )
    terminal.say(f'{out}: {manifest.describe(made)}')
    print(f'use it with --config.data.source=packed:{out}')


def _place(positionals):
    arguments.check_count(positionals, 'PHOTOS', 'FOLDER')
    photos, *out = positionals
    placed = [('config.data.source', arguments.source(photos))]
    return placed + [('out', name) for name in out]


_PACKING = (
    options.Flag(
        'shard_mib',
        'Maximum size of a file in MiB. A file has at most 2048 images.',
        kind=float,
        default=256.0,
        value='MIB',
    ),
    options.Flag(
        'max_side',
        'Shrink images whose shorter side has more pixels than this, and save them as '
        'JPEG. 0 keeps all images as they are.',
        kind=int,
        default=0,
        value='PIXELS',
    ),
    options.Flag(
        'quality',
        'JPEG quality of these images, 1 to 100.',
        kind=int,
        default=90,
        value='N',
    ),
)
COMMAND = options.Command(
    'pack',
    'Pack a set of images into a few large files, for network disks.',
    run,
    usage='PHOTOS FOLDER',
    details=(
        'PHOTOS is a folder of images or tar files of webdataset; FOLDER is new. Train '
        'on it with `train FOLDER`. `pack FOLDER` alone verifies the checksums of a '
        'packed folder. Needs the extra: pip install "flax_densenet[packed]".',
    ),
    examples=(
        ('pack ImageNet, shrunk', 'pack imagenet packed --max_side=320'),
        ('verify', 'pack packed'),
    ),
    flags={
        'Output': (
            options.Flag('out', 'Folder to write.', value='FOLDER', is_path=True),
            *_PACKING,
        ),
    },
    place=_place,
    fields=f'Only {", ".join(_FIELDS)} apply.',
)
