"""Keeps a command from overwriting the files that it reads."""

import os

from flax_densenet.cli import options
from flax_densenet.data import listing
from flax_densenet.errors import UserError
from flax_densenet.system import paths

_OUTPUTS = ('out', 'features')
# Flags and settings that name files which a command reads.
_READ_FLAGS = ('files', 'workdir', 'class_names', 'others')
_READ_FIELDS = ('init_from', 'data.labels')


def check(invocation: options.Invocation):
    """Raises `UserError` if an output is an image, or a file that the command reads."""
    flags = invocation.command.all_flags()
    for name in _OUTPUTS:
        out = invocation.path(name) if name in flags else None
        if not out or not os.path.isfile(out):
            continue
        for source, path in _inputs(invocation, flags):
            if os.path.exists(path) and os.path.samefile(path, out):
                raise UserError(
                    f'--{name}={out} would overwrite {source}, which '
                    f'{invocation.command.name} reads; name another file'
                )
        if listing.is_image_file(out):
            raise UserError(
                f'--{name}={out} would overwrite an image; name another file'
            )


def _inputs(invocation, flags):
    """Pairs of a flag with its value, and the path."""
    for name in _READ_FLAGS:
        value = invocation.flags[name].value if name in flags else None
        for text in value if isinstance(value, list) else [value or '']:
            yield f'--{name}={text}', paths.expand(text)
    if invocation.command.fields:
        fields = invocation.overrides
        for name in _READ_FIELDS:
            text = fields.get(name) or ''
            yield f'--config.{name}={text}', paths.expand(text)
    if invocation.recipe:
        yield f'--config={invocation.recipe.text}', invocation.recipe.path
