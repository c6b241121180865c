"""The manifest of a pack: its files, and their checksums."""

import dataclasses
import hashlib
import json
import os

from flax_densenet.errors import UserError, printable

FILE = 'pack.json'
FORMAT, VERSION = 'flax_densenet pack', 1
# For packs with three parts; earlier versions of this program read two.
VERSION_OF_THREE = 2
PARTS = ('train', 'val', 'test')
REMEDY = 'copy it again, or recreate it with pack'
_MAX_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file with `count` images of a part, its size in bytes and its SHA-256."""

    file: str
    part: str
    count: int
    bytes: int
    sha256: str
    fingerprint: str  # names of the images that it was made from


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `pack.json`.

    Attributes:
      source: the `data.source` that was packed.
      has_test: whether the source had a test part. There are shards of `val` if it had
        three parts.
      shorter_side: in pixels; larger images were reduced to it; 0 if they were not.
    """

    source: str
    class_names: tuple[str, ...]
    multi_label: bool
    has_test: bool
    shorter_side: int
    index_bytes: int
    index_sha256: str
    shards: tuple[Shard, ...]

    def count(self, part: str) -> int:
        """Number of images in a part."""
        return sum(shard.count for shard in self.shards if shard.part == part)

    def to_json(self) -> str:
        """The text of `pack.json`; equal packs have equal texts."""
        counts = {part: self.count(part) for part in PARTS}
        version = VERSION_OF_THREE
        if not counts['val']:
            del counts['val']
            version = VERSION
        fields = {'format': FORMAT, 'version': version} | dataclasses.asdict(self)
        return json.dumps(fields | {'images': counts}, indent=1) + '\n'


def load(folder: str) -> Manifest:
    """Reads and checks `pack.json`.

    Raises:
      UserError: it is missing, cannot be read or is invalid.
    """
    path = os.path.join(folder, FILE)
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise UserError(f'{path} is too large to be a manifest; {REMEDY}')
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is damaged (not JSON); {REMEDY}') from error
    try:
        return _to_manifest(content)
    except (KeyError, TypeError, ValueError) as error:
        reason = f'no {error}' if isinstance(error, KeyError) else error
        raise UserError(
            f'{path} is damaged or from another program ({reason})'
        ) from error


def _to_manifest(content) -> Manifest:
    """Raises KeyError, TypeError or ValueError if it is not a valid manifest."""
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        raise ValueError(f'no {FORMAT}')
    if content['version'] not in (VERSION, VERSION_OF_THREE):
        raise ValueError(
            f'version {content["version"]}; this program reads {VERSION} and '
            f'{VERSION_OF_THREE}'
        )
    fields = {}
    for field in dataclasses.fields(Manifest):
        kind = {'class_names': list, 'shards': list}.get(field.name, field.type)
        fields[field.name] = _typed(content, field.name, kind)
    names = fields['class_names'] = tuple(fields['class_names'])
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError('no class names')
    fields['shards'] = tuple(map(to_shard, fields['shards']))
    parts = [shard.part for shard in fields['shards']]
    if 'train' not in parts or parts != sorted(parts, key=PARTS.index):
        raise ValueError('no training shards at the start')
    if ('test' in parts) != fields['has_test']:
        raise ValueError('test shards do not match has_test')
    if 'val' in parts and 'test' not in parts:
        raise ValueError('shards of val without test')
    return Manifest(**fields)


def to_shard(content) -> Shard:
    """Raises KeyError, TypeError or ValueError if the JSON is not a shard."""
    if not isinstance(content, dict):
        raise ValueError('no shards')
    fields = {
        field.name: _typed(content, field.name, field.type)
        for field in dataclasses.fields(Shard)
    }
    shard = Shard(**fields)
    name = shard.file
    if os.path.basename(name) != name or name in ('', '.', '..') or '\0' in name:
        raise ValueError(f'shard {name} is not a plain name')
    if shard.part not in PARTS or not 0 < shard.count < 2**40:
        raise ValueError(f'shard {name} of {shard.part} with {shard.count} images')
    return shard


def _typed(content, name, kind):
    value = content[name]
    if type(value) is not kind:  # True would count as an int
        raise TypeError(f'{name} is not of type {kind.__name__}')
    return value


def check_size(path: str, expected: int):
    """Raises `UserError` if a file is missing or has another size."""
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise UserError(
            f'{path} cannot be read ({error.strerror}); {REMEDY}'
        ) from error
    if size != expected:
        raise UserError(
            f'{path} has {size} bytes instead of {expected}: truncated or from another '
            f'pack; {REMEDY}'
        )


def sha256(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with open(path, 'rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error


def describe(manifest: Manifest) -> str:
    """One line about the content of a pack."""
    size = sum(shard.bytes for shard in manifest.shards)
    parts = f'{manifest.count("train")} images'
    if manifest.count('val'):
        parts += (
            f' to train on, {manifest.count("val")} for validation and '
            f'{manifest.count("test")} to test on'
        )
    elif manifest.has_test:
        parts += f' to train on and {manifest.count("test")} to test on'
    return printable(
        f'{parts}, {len(manifest.class_names)} '
        f'{"labels" if manifest.multi_label else "classes"}, '
        f'{len(manifest.shards)} shards, {size / 2**20:,.1f} MiB'
    )
