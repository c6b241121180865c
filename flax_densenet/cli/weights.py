"""`weights`: lists, downloads and checks published weights."""

from flax_densenet.cli import arguments, options
from flax_densenet.errors import UserError


def run(invocation: options.Invocation) -> int | None:
    """Prints the table, or downloads or checks one file of weights."""
    from flax_densenet.weights import published, published_table

    flags, patterns = invocation.flags, invocation.positionals
    if flags.fetch or flags.verify:
        if patterns:
            raise UserError(f'{patterns[0]}: --fetch and --verify take one name each')
        if flags.fetch:
            print(published.fetch(flags.fetch).path)
        return _verify(flags.verify) if flags.verify else None
    pattern = patterns[0] if patterns else '*'
    entries = published.list_weights(pattern)
    if not entries:
        raise UserError(
            f'no published weights are called {pattern}; `weights` lists all'
        )
    if flags.markdown:
        print(published_table.format_markdown(entries))
        return None
    print(entries)
    if not patterns:
        print(
            '\nBesides these: hf:OWNER/NAME[@REVISION], a folder of timm or of this '
            'program on the\nHugging Face Hub, and https://...#sha256=DIGEST, a file. '
            '~: the size of the parameters.'
        )
    return None


def _verify(name):
    from flax_densenet.inference import check

    found = check.verify(name)
    print(found)
    return 0 if found.agrees is not False else 1


def _place(positionals):
    arguments.check_count(positionals, 'PATTERN')
    return []


COMMAND = options.Command(
    'weights',
    'List published weights that can be used by name, download or check them.',
    run,
    usage='[PATTERN]',
    details=(
        'All commands that take a model or --config.init_from also take these names. A '
        'file is downloaded when it is first used, and works without a network from '
        'then on. PATTERN is a part of a name, or one with * and ?.',
    ),
    examples=(
        ('all', 'weights'),
        ('the weights of Keras', 'weights keras:'),
        ('download one ahead of time', 'weights --fetch=torchvision:densenet121'),
        (
            'see its predictions for a photo',
            'weights --verify=torchvision:densenet121',
        ),
    ),
    flags={
        'One set of weights': (
            options.Flag('fetch', 'Download it, and print its path.', value='NAME'),
            options.Flag(
                'verify',
                'Load it, print its predictions for a photo, and compare its outputs '
                'with those of the published file, if they are known.',
                value='NAME',
            ),
        ),
        'Output': (
            options.Flag(
                'markdown',
                'Print the table as Markdown.',
                kind=bool,
                default=False,
            ),
        ),
    },
    place=_place,
)
