"""The samples of a tar file: `key.jpg` next to `key.cls` or `key.json`."""

import collections
import dataclasses
import itertools
import json
import os
import tarfile

from flax_densenet.data import group_columns, images
from flax_densenet.errors import UserError
from flax_densenet.system import platforms

_LABELS = ('cls', 'json')
# Fields of a sample's JSON that can hold the class.
_FIELDS = ('label', 'cls', 'class', 'class_name')
_END = 1024
_MOST_FIELDS, _LONGEST_FIELD = 100, 40
_MAX_LABEL_BYTES, MAX_CLASSES = 2**20, 100_000


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image in a tar: its place, label and group.

    Attributes:
      name: of the file in the tar.
      offset, size: of its content, in bytes.
      label: the number or name of its class.
      fields: of its JSON, those that can tell the group or divide the images.
    """

    name: str
    offset: int
    size: int
    label: int | str
    fields: dict[str, str]


def scan(path: str, column: str | None = None) -> list[Sample]:
    """The samples of a tar file, in its order.

    Args:
      column: the field of their JSON with the groups, or None.

    Raises:
      UserError: the tar is damaged, or a sample has no image or label.
    """
    samples: dict[str, dict] = collections.defaultdict(dict)
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, 'r:') as tar:
            for member in tar:
                _add(path, size, member, samples)
        with open(path, 'rb') as file:
            # Without two empty blocks, the file may end between two images.
            file.seek(-min(size, _END), os.SEEK_END)
            if file.read() != bytes(_END):
                raise UserError(f'{path} has no end of a tar file; copy it again')
            return [
                _sample(path, file, key, inside, column)
                for key, inside in samples.items()
            ]
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f'{path} is not a valid uncompressed tar file ({error}); copy it again'
        ) from error
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error


def _add(path, size, member, samples):
    folder, _, base = member.name.rpartition('/')
    if member.isdir() or base.startswith('.') or '__MACOSX' in folder.split('/'):
        return
    if not member.isreg() or member.issparse():
        raise UserError(f'{path}: {member.name} is not a regular file; pack it as one')
    if not 0 <= member.offset_data <= member.offset_data + member.size <= size:
        raise UserError(f'{path} is truncated within {member.name}; copy it again')
    key, _, kind = base.partition('.')
    key, kind = f'{folder}/{key}' if folder else key, kind.lower()
    if kind in samples[key]:
        raise UserError(f'{path}: {member.name} appears twice; remove one')
    samples[key][kind] = member


def _sample(path, file, key, inside, column) -> Sample:
    kinds = [kind for kind in inside if f'.{kind}' in images.EXTENSIONS]
    if len(kinds) != 1:
        raise UserError(
            f'{path}: {key} has {len(kinds)} images ({", ".join(inside)}); each key '
            'needs one, such as key.jpg'
        )
    kind = next((kind for kind in _LABELS if kind in inside), None)
    if kind is None:
        hint = ''
        if '/' in key:
            hint = '; a tar of class folders is read unpacked, as folder:PATH'
        raise UserError(
            f'{path}: {key} has no label; add {key}.cls or {key}.json{hint}'
        )
    content = _read_text(path, file, inside[kind])
    image = inside[kinds[0]]
    label = _label(path, inside[kind].name, kind, content)
    fields = {}
    if 'json' in inside:
        fields = _short_fields(_read_text(path, file, inside['json']), column)
    return Sample(image.name, image.offset_data, image.size, label, fields)


def _read_text(path, file, member):
    if member.size > _MAX_LABEL_BYTES:
        raise UserError(f'{path}: {member.name} is too large to be a label')
    return platforms.read_at(file, member.size, member.offset_data)


def _short_fields(content, column):
    """The numbers and short words of a sample's JSON besides its label, as text."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):  # of no use here; `_label` reports it
        return {}
    if not isinstance(fields, dict):
        return {}
    return {
        name: text
        for name, value in itertools.islice(fields.items(), _MOST_FIELDS)
        if isinstance(value, str | int | float) and name not in _FIELDS
        if len(text := str(value)) <= _LONGEST_FIELD
        or name == column
        or group_columns.is_group(name)
    }


def _label(path, name, kind, content) -> int | str:
    """The number or name of the class in a `.cls` or `.json` file."""
    try:
        label = content.decode().strip()
        if kind == 'json':
            fields = json.loads(label)
            fields = fields if isinstance(fields, dict) else {'label': fields}
            label = next((fields[n] for n in _FIELDS if n in fields), None)
        elif label.isdecimal():
            label = int(label)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: {name} cannot be read as a label') from error
    if type(label) is int and 0 <= label < MAX_CLASSES:
        return label
    if isinstance(label, str) and label:
        return label
    raise UserError(
        f'{path}: {name} does not name a class; give a number from 0 to '
        f'{MAX_CLASSES - 1} or a name'
        + (f' in its field {_FIELDS[0]}' if kind == 'json' else '')
    )
