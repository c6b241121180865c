"""The manifest of a pack: which files there are, and that they are whole."""

import dataclasses
import hashlib
import json
import os

from flax_densenet.errors import UserError, printable

FILE = 'pack.json'
FORMAT, VERSION = 'flax_densenet pack', 1
PARTS = ('train', 'test')
REMEDY = 'copy it again, or recreate it with --mode=pack'
_MAX_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of images: `count` of a part, with its size in bytes and its SHA-256."""

    file: str
    part: str
    count: int
    bytes: int
    sha256: str
    fingerprint: str  # of what it was made from


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `pack.json` says.

    Attributes:
      source: `data.source` that was packed.
      has_test: the source had a test part.
      shorter_side: to which images were made smaller, in pixels; 0 for none.
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
        """Images of a part."""
        return sum(shard.count for shard in self.shards if shard.part == part)

    def to_json(self) -> str:
        """The text of `pack.json`, the same for the same pack."""
        fields = {'format': FORMAT, 'version': VERSION} | dataclasses.asdict(self)
        counts = {part: self.count(part) for part in PARTS}
        return json.dumps(fields | {'images': counts}, indent=1) + '\n'


def load(folder: str) -> Manifest:
    """Reads and checks `pack.json`.

    Raises:
      UserError: it is not there, cannot be read or says what no pack says.
    """
    path = os.path.join(folder, FILE)
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise UserError(f'{path} is too large to be a manifest; {REMEDY}')
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is damaged (no JSON); {REMEDY}') from error
    try:
        return _to_manifest(found)
    except (KeyError, TypeError, ValueError) as error:
        said = f'no {error}' if isinstance(error, KeyError) else error
        raise UserError(f'{path} is damaged or of another program ({said})') from error


def _to_manifest(found) -> Manifest:
    """Raises KeyError, TypeError or ValueError where it is none of ours."""
    if not isinstance(found, dict) or found.get('format') != FORMAT:
        raise ValueError(f'no {FORMAT}')
    if found['version'] != VERSION:
        raise ValueError(f'version {found["version"]}; this program reads {VERSION}')
    fields = {}
    for field in dataclasses.fields(Manifest):
        kind = {'class_names': list, 'shards': list}.get(field.name, field.type)
        fields[field.name] = _typed(found, field.name, kind)
    names = fields['class_names'] = tuple(fields['class_names'])
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError('no class names')
    fields['shards'] = tuple(map(to_shard, fields['shards']))
    parts = [shard.part for shard in fields['shards']]
    if 'train' not in parts or parts != sorted(parts, key=PARTS.index):
        raise ValueError('no shards to train on first')
    if ('test' in parts) != fields['has_test']:
        raise ValueError('shards to test on, or none, against has_test')
    return Manifest(**fields)


def to_shard(found) -> Shard:
    """Raises KeyError, TypeError or ValueError where JSON holds no shard."""
    if not isinstance(found, dict):
        raise ValueError('no shards')
    fields = {
        field.name: _typed(found, field.name, field.type)
        for field in dataclasses.fields(Shard)
    }
    shard = Shard(**fields)
    name = shard.file
    if os.path.basename(name) != name or name in ('', '.', '..') or '\0' in name:
        raise ValueError(f'shard {name} is no plain name')
    if shard.part not in PARTS or not 0 < shard.count < 2**40:
        raise ValueError(f'shard {name} of {shard.part} with {shard.count} images')
    return shard


def _typed(found, name, kind):
    value = found[name]
    if type(value) is not kind:  # True would pass for an int
        raise TypeError(f'{name} is no {kind.__name__}')
    return value


def check_size(path: str, expected: int):
    """Raises UserError where a file is missing or of another size."""
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise UserError(
            f'{path} cannot be read ({error.strerror}); {REMEDY}'
        ) from error
    if size != expected:
        raise UserError(
            f'{path} has {size} bytes in place of {expected}: cut short or of another '
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
    """A line on what a pack holds."""
    size = sum(shard.bytes for shard in manifest.shards)
    parts = f'{manifest.count("train")} images'
    if manifest.has_test:
        parts += f' to train on and {manifest.count("test")} to test on'
    return printable(
        f'{parts}, {len(manifest.class_names)} '
        f'{"labels" if manifest.multi_label else "classes"}, '
        f'{len(manifest.shards)} shards, {size / 2**20:,.1f} MiB'
    )
