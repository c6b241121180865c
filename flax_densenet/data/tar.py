"""Reads images from tar files like webdataset's: `key.jpg` next to `key.cls`.

The headers are read once; images are then read at their offsets. Nothing is ever
extracted, so the names in a tar cannot do any harm.
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
import re
import tarfile
from collections.abc import Sequence

import numpy as np

from flax_densenet.data import images, listing, notes, parts, readers
from flax_densenet.errors import UserError, printable
from flax_densenet.system import paths, platforms

CLASSES_FILE = 'classes.txt'
_LABELS = ('cls', 'json')
# Fields of a sample's JSON that can hold the class.
_FIELDS = ('label', 'cls', 'class', 'class_name')
_END = 1024
_MAX_LABEL_BYTES, _MAX_CLASSES = 2**20, 100_000


@dataclasses.dataclass
class TarReader(readers.Reader):
    """Images in uncompressed tar files; labels int32 `[N]`."""

    tars: list[str]
    which: np.ndarray  # the tar of each image
    places: np.ndarray  # int64 [N, 2]: offset and bytes within it
    names: list[str]
    labels: np.ndarray
    root: str  # the folder that the tars are below

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        path = self.tars[self.which[index]]
        offset, size = self.places[index].tolist()
        try:
            with open(path, 'rb') as file:
                content = platforms.read_at(file, size, offset)
        except OSError as error:
            raise UserError(f'{path} cannot be read ({error.strerror})') from error
        if len(content) != size:
            raise UserError(f'{path} is cut short since it was listed; copy it again')
        return content

    def keys(self, indices):
        below = (self.name(i).removeprefix(self.root).lstrip('/') for i in indices)
        return [os.fsencode(name) for name in below]

    def name(self, index):
        return f'{self.tars[self.which[index]]}/{self.names[index]}'

    def stat(self, index):
        offset, size = self.places[index].tolist()
        status = readers.stat_file(self.tars[self.which[index]])
        return size, (offset, status.st_size, status.st_mtime_ns)


@dataclasses.dataclass(frozen=True)
class _Sample:
    name: str
    offset: int
    size: int
    label: int | str


def load(
    name: str, known_classes: Sequence[str] | None = None
) -> tuple[TarReader, list[str], int | None]:
    """Lists the images of one tar file, or of all tar files in a folder.

    Labels are numbers, whose names can be in `classes.txt`, one per line; or names.

    Args:
      name: a tar file, or a folder with `*.tar` or `{train,val}/*.tar`. Tars with
        `train` and `val` in their names are also the two parts.

    Returns:
      The reader, the class names, and the index of the first test image, or None if
      there is no test part.

    Raises:
      UserError: there are none, one is damaged, or a sample has no image or label.
    """
    field = f'data.source=tar:{name}'
    path = paths.resolve(name, 'data.source=tar:')
    by_part, aside = _find_tars(field, name, path)
    tars = [tar for inside in by_part for tar in inside]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        by_tar = list(pool.map(_scan, tars))
    first_test = sum(len(inside) for inside in by_tar[: len(by_part[0])])
    if len(by_part) > 1:
        _say_parts(field, path, by_part, aside, [len(inside) for inside in by_tar])
    which = np.repeat(np.arange(len(tars), dtype=np.int32), [len(s) for s in by_tar])
    samples = [sample for inside in by_tar for sample in inside]
    if len(by_part) == 1 and (order := _order_by_part(field, samples)):
        first_test = order.pop()
        samples, which = [samples[i] for i in order], which[order]
        by_part = [tars, tars]
    root = path if os.path.isdir(path) else os.path.dirname(path)
    place = root
    if not os.path.exists(os.path.join(root, CLASSES_FILE)) and tars:
        place = os.path.commonpath(list(map(os.path.dirname, tars)))
    labels, names = _number(field, [s.label for s in samples], place, known_classes)
    _check_classes(field, names, labels, first_test if len(by_part) > 1 else None)
    reader = TarReader(
        tars,
        which,
        np.array([(s.offset, s.size) for s in samples], np.int64).reshape(-1, 2),
        [sample.name for sample in samples],
        labels,
        root,
    )
    return reader, names, first_test if len(by_part) > 1 else None


def _find_tars(field, name, path):
    """The tar files of the training part and, if there is one, of the test part.

    Returns:
      They, and those of a test part that is set aside.
    """
    if not name or not os.path.exists(path):
        raise UserError(f'{field}: there is no such folder or tar file')
    if not os.path.isdir(path):
        return [[path]], []
    path = _below_single_folders(field, path)
    inside = parts.by_role(listing.class_folders(path))
    folders = {
        part: tars
        for part, (name, *_) in inside.items()
        if part in parts.USED and (tars := _tars_of(os.path.join(path, name)))
    }
    if len(folders) > 1 and parts.TRAIN in folders:
        if unclear := [p for p in folders if not parts.is_clear(p, inside[p])]:
            raise UserError(
                f'{field}: {" and ".join(inside[unclear[0]][:3])} all look like the '
                f'part {unclear[0]}; join them, or move all but one elsewhere'
            )
        used = [inside[part][0] for part in folders]
        left = [
            name
            for name in listing.class_folders(path)
            if name not in used and _tars_of(os.path.join(path, name))
        ]
        if left:
            notes.say(
                f'{field}: left out beside the parts: the folders {", ".join(left[:5])}'
            )
        return _choose(folders)
    tars = _tars_of(path)
    passed = notes.Passed()
    for entry in listing.scan(path):
        known = listing.is_hidden(entry.name) or entry.name == CLASSES_FILE
        if not known and entry.path not in tars and os.path.isfile(entry.path):
            passed.add_file(entry.name)
    if not tars:
        held = f' but {passed.files()}' if passed.endings else ''
        raise UserError(f'{field}: holds no .tar files (uncompressed ones){held}')
    if passed.line():
        notes.say(f'{field}: {passed.line()}')
    by_part = {}
    for tar in tars:
        by_part.setdefault(_role_of_tar(tar), []).append(tar)
    if parts.TRAIN not in by_part and {parts.VAL, parts.TEST} == set(by_part):
        raise UserError(
            f'{field}: its tars are called val and test, and none train; give the tars '
            'to train on, or one of the parts alone'
        )
    if parts.TRAIN not in by_part or not {parts.VAL, parts.TEST} & set(by_part):
        return [tars], []
    if None in by_part:
        raise UserError(
            f'{field}: some tars are called train, some val and some neither; put '
            'them into the folders train and val'
        )
    return _choose(by_part)


def _below_single_folders(field, path):
    """Goes down where a folder holds no tars, but one folder."""
    while True:
        inside = listing.class_folders(path)
        if len(inside) != 1 or _tars_of(path):
            return path
        path = os.path.join(path, inside[0])
        notes.say(f'{field}: holds one folder only, whose tars are taken: {path}')


def _role_of_tar(path):
    """The part that the words of a tar's name mean; None for none or several."""
    words = re.split(r'[^a-z]+', os.path.basename(path).lower())
    roles = {parts.role(word) for word in words if word} & set(parts.USED)
    return roles.pop() if len(roles) == 1 else None


def _choose(by_part):
    """The tars to train on and those that choose; and a test part set aside."""
    held_out, aside = by_part.get(parts.VAL), by_part.get(parts.TEST, [])
    if held_out is None:
        held_out, aside = aside, []
    return [by_part[parts.TRAIN], held_out], aside


def _say_parts(field, root, by_part, aside, counts):
    """The line about the parts and their numbers of images.

    Args:
      counts: images of each tar of both parts.
    """
    train = len(by_part[0])
    shown = [
        os.path.relpath(tars[0], root) + (', ...' if len(tars) > 1 else '')
        for tars in (*by_part, aside)
        if tars
    ]
    line = (
        f'{field}: {sum(counts[:train])} images to train on ({shown[0]}), '
        f'{sum(counts[train:])} choose the best epoch ({shown[1]})'
    )
    if aside:
        line += (
            f', {len(aside)} tars of test are set aside ({shown[2]}; to measure them: '
            'eval --config.data.source=tar:PATH)'
        )
    notes.say(line)


def _check_classes(field, names, labels, first_test):
    """Reports classes that differ in spelling only or are in the test part only."""
    similar = parts.find_similar(names)
    if first_test is None:
        if similar:
            notes.say(
                f'{field}: the classes {similar[0]!r} and {similar[1]!r} differ only '
                'in case or spaces'
            )
        return
    missing = [names[i] for i in np.setdiff1d(labels[first_test:], labels[:first_test])]
    if similar and set(similar) & set(missing):
        raise UserError(
            f'{field}: the class is written {similar[0]!r} in some tars and '
            f'{similar[1]!r} in others; write it alike'
        )
    if missing:
        notes.say(
            f'{field}: warning: {len(missing)} classes have no image to train on, so '
            f'they cannot be learned: {", ".join(missing[:5])}'
        )


def _order_by_part(field, samples):
    """Of samples in folders called train and val: their order, then the first of val.

    None where the folders within the tars are no parts.
    """
    tops = [sample.name.removeprefix('./').split('/') for sample in samples]
    names = {top[0] for top in tops if len(top) > 1}
    if len(names) == 1 and all(len(top) > 2 for top in tops):
        tops = [top[1:] for top in tops]
        names = {top[0] for top in tops}
    roles = parts.by_role(names)
    role_of = {name: part for part, same in roles.items() for name in same}
    if parts.TRAIN not in roles or not {parts.VAL, parts.TEST} & set(roles):
        return None
    if any(len(top) < 2 or top[0] not in role_of for top in tops):
        return None
    held_out = parts.VAL if parts.VAL in roles else parts.TEST
    order = [i for i, top in enumerate(tops) if role_of[top[0]] == parts.TRAIN]
    first_test = len(order)
    order += [i for i, top in enumerate(tops) if role_of[top[0]] == held_out]
    aside = len(samples) - len(order)
    notes.say(
        f'{field}: the folders within are parts: {first_test} images to train on, '
        f'{len(order) - first_test} of {held_out}, which chooses the best epoch'
        + (f'; {aside} of other parts are set aside' if aside else '')
    )
    return [*order, first_test]


def _tars_of(folder):
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f'{folder} cannot be read ({error.strerror})') from error
    return [
        os.path.join(folder, name)
        for name in sorted(names)
        if name.lower().endswith('.tar') and not name.startswith('.')
    ]


def _scan(path) -> list[_Sample]:
    """The samples of a tar, in its order."""
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
            return [_sample(path, file, key, inside) for key, inside in samples.items()]
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
        raise UserError(f'{path} is cut short within {member.name}; copy it again')
    key, _, kind = base.partition('.')
    key, kind = f'{folder}/{key}' if folder else key, kind.lower()
    if kind in samples[key]:
        raise UserError(f'{path}: {member.name} appears twice; remove one')
    samples[key][kind] = member


def _sample(path, file, key, inside) -> _Sample:
    kinds = [kind for kind in inside if f'.{kind}' in images.EXTENSIONS]
    if len(kinds) != 1:
        raise UserError(
            f'{path}: {key} has {len(kinds)} images ({", ".join(inside)}); each key '
            'needs one, as key.jpg'
        )
    kind = next((kind for kind in _LABELS if kind in inside), None)
    if kind is None:
        hint = ''
        if '/' in key:
            hint = '; a tar of class folders is read unpacked, as folder:PATH'
        raise UserError(
            f'{path}: {key} has no label; add {key}.cls or {key}.json{hint}'
        )
    member = inside[kind]
    if member.size > _MAX_LABEL_BYTES:
        raise UserError(f'{path}: {member.name} is too large to be a label')
    content = platforms.read_at(file, member.size, member.offset_data)
    image = inside[kinds[0]]
    label = _label(path, member.name, kind, content)
    return _Sample(image.name, image.offset_data, image.size, label)


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
    if type(label) is int and 0 <= label < _MAX_CLASSES:
        return label
    if isinstance(label, str) and label:
        return label
    raise UserError(
        f'{path}: {name} names no class; give a number from 0 to '
        f'{_MAX_CLASSES - 1} or a name'
        + (f' in its field {_FIELDS[0]}' if kind == 'json' else '')
    )


def _number(field, labels, root, known_classes=None):
    """Labels int32 `[N]` and the classes' names."""
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        raise UserError(f'{field}: some labels are numbers, some are names; use one')
    if kinds == {str}:
        names = sorted(set(labels))
        number = {name: place for place, name in enumerate(names)}
        labels = [number[label] for label in labels]
    else:
        names = _read_names(field, root, max(labels, default=-1) + 1)
    if len(names) < (1 if known_classes else 2):
        raise UserError(f'{field}: has {len(names)} classes; at least two are needed')
    return np.array(labels, np.int32), [printable(name) for name in names]


def _read_names(field, root, count):
    """The names in `classes.txt`; without the file, the numbers."""
    path = os.path.join(root, CLASSES_FILE)
    if not os.path.exists(path):
        return [str(number) for number in range(count)]
    try:
        with open(path, encoding='utf-8') as file:
            names = [line.strip() for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read ({error})') from error
    if len(names) < count or len(set(names)) != len(names):
        raise UserError(
            f'{field}: {path} has {len(set(names))} different names, the labels go up '
            f'to {count - 1}; give a name for each class, from 0 on'
        )
    return names
