"""Reads images from tar files like webdataset's: `key.jpg` next to `key.cls`.

The headers are read once; images are then read at their offsets. Nothing is ever
extracted, so the names in a tar cannot do any harm.
"""

import concurrent.futures
import dataclasses
import os
import re
from collections.abc import Sequence

import numpy as np

from flax_densenet.data import (
    group_columns,
    group_names,
    label_options,
    listing,
    notes,
    other_files,
    parts,
    readers,
    subgroup_columns,
    tar_samples,
)
from flax_densenet.errors import UserError, printable
from flax_densenet.system import paths, platforms

CLASSES_FILE = 'classes.txt'


@dataclasses.dataclass
class TarReader(readers.Reader):
    """Images in uncompressed tar files; labels int32 `[N]`."""

    tars: list[str]
    which: np.ndarray  # the tar file of each image
    places: np.ndarray  # int64 [N, 2]: offset and bytes within it
    names: list[str]
    labels: np.ndarray
    root: str  # the folder that contains the tar files
    grouped_by: str = ''  # the field of the samples' JSON, if any

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
            raise UserError(f'{path} was truncated after it was listed; copy it again')
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


def load(
    name: str,
    known_classes: Sequence[str] | None = None,
    *,
    options: label_options.Options | None = None,
) -> tuple[TarReader, list[str], list[int]]:
    """Lists the images of one tar file, or of all tar files in a folder.

    Labels are numbers, with names in `classes.txt` (optional, one per line), or names.

    Args:
      name: a tar file, or a folder with `*.tar` or `{train,val,test}/*.tar`. Tars with
        `train`, `val` and `test` in their names are also the parts.
      options: its `groups`, where `column:NAME` is a field of the samples' JSON, and
        what the held-out part is for.

    Returns:
      Returns: The reader, the class names, and the end index of each part.

    Raises:
      UserError: there are no tar files, one is damaged, or a sample has no image or
        label.
    """
    field = f'data.source=tar:{name}'
    options = options or label_options.Options()
    groups = options.groups
    path = paths.resolve(name, 'data.source=tar:')
    by_part = _find_tars(field, name, path)
    tars = [tar for inside in by_part for tar in inside]
    column = groups.removeprefix('column:') if groups.startswith('column:') else None
    with concurrent.futures.ThreadPoolExecutor() as pool:
        by_tar = list(pool.map(lambda tar: tar_samples.scan(tar, column), tars))
    sizes = [len(inside) for inside in by_tar]
    ends = np.cumsum(sizes)[np.cumsum([len(inside) for inside in by_part]) - 1].tolist()
    if len(by_part) > 1:
        _say_parts(field, path, by_part, np.diff([0, *ends]), options)
    which = np.repeat(np.arange(len(tars), dtype=np.int32), sizes)
    samples = [sample for inside in by_tar for sample in inside]
    if len(by_part) == 1 and (order := _order_by_part(field, samples, options)):
        order, ends = order
        samples, which = [samples[i] for i in order], which[order]
    root = path if os.path.isdir(path) else os.path.dirname(path)
    place = root
    if not os.path.exists(os.path.join(root, CLASSES_FILE)) and tars:
        place = os.path.commonpath(list(map(os.path.dirname, tars)))
    labels, names = _number(field, [s.label for s in samples], place, known_classes)
    _check_classes(field, names, labels, ends[0] if len(ends) > 1 else None)
    reader = TarReader(
        tars,
        which,
        np.array([(s.offset, s.size) for s in samples], np.int64).reshape(-1, 2),
        [sample.name for sample in samples],
        labels,
        root,
    )
    if groups == 'auto' or column is not None:
        reader.groups, reader.grouped_by = _find_groups(field, samples, column)
    _add_subgroups(field, reader, samples, options.subgroups)
    return reader, names, ends


def _add_subgroups(field, reader, samples, setting):
    """Fields of the samples' JSON that divide the images."""
    if setting.startswith('path:'):
        return
    known = dict.fromkeys(name for sample in samples for name in sample.fields)
    if setting != 'auto' and not known:  # `sources.load` says what is needed
        return
    wanted = subgroup_columns.candidates(list(known), setting)
    columns = {name: [one.fields.get(name, '') for one in samples] for name in wanted}
    line = subgroup_columns.add_of_columns(reader, setting, columns, field)
    if line:
        notes.say(line)


def _find_groups(field, samples, column):
    """Groups int64 `[N]` from a field of the samples' JSON, or None, and their origin.

    Args:
      column: the field that the user named, or None.
    """
    name, lines = column, []
    if column is None:
        chosen = group_columns.choose(_shared_fields(samples), has_labels=True)
        name, lines = chosen.name, chosen.notes
    if name is None or any(name not in sample.fields for sample in samples):
        if column is None:
            _say(field, lines)
            return None, ''
        raise UserError(
            f'data.groups=column:{column}: {field} has images without the field '
            f'{column} in their JSON, {samples[0].name} or others'
        )
    found = [sample.fields[name] for sample in samples]
    groups, more = group_names.number(found, f'the field {name}', name)
    if len(set(groups.tolist())) > 1:
        _say(field, [*lines, *more])
        return groups, f'the field {name}'
    if column is None:
        _say(field, [f'all images have the same {name}, so it groups none'])
        return None, ''
    raise UserError(
        f'data.groups=column:{column}: all images are of one group, which cannot be '
        'split; name another field or set data.groups=none'
    )


def _shared_fields(samples):
    """The cells of the fields that all samples have."""
    names = [
        n for n in (samples[0].fields if samples else ()) if group_columns.is_group(n)
    ]
    return {
        name: [sample.fields[name] for sample in samples]
        for name in names
        if all(name in sample.fields for sample in samples)
    }


def _say(field, lines):
    for line in lines:
        notes.say(f'{field}: {line}')


def _find_tars(field, name, path):
    """The tar files of each existing part, the training part first."""
    if not name or not os.path.exists(path):
        raise UserError(f'{field}: there is no such folder or tar file')
    if not os.path.isdir(path):
        if what := other_files.describe_compressed(path):
            raise UserError(f'{field} {what} and name the .tar file')
        return [[path]]
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
                f'{field}: left out besides the parts: the folders '
                f'{", ".join(left[:5])}'
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
            f'{field}: its tars are called val and test, and none train; give the '
            'training tars, or a single part'
        )
    if parts.TRAIN not in by_part or not {parts.VAL, parts.TEST} & set(by_part):
        return [tars]
    if None in by_part:
        raise UserError(
            f'{field}: some tars are called train, some val and some neither; put '
            'them into the folders train and val'
        )
    return _choose(by_part)


def _below_single_folders(field, path):
    """Descends while a folder contains no tar files, but one folder."""
    while True:
        inside = listing.class_folders(path)
        if len(inside) != 1 or _tars_of(path):
            return path
        path = os.path.join(path, inside[0])
        notes.say(f'{field}: holds only one folder; its tars are used: {path}')


def _role_of_tar(path):
    """The part named by the words in a tar's name; None for none or several."""
    words = re.split(r'[^a-z]+', os.path.basename(path).lower())
    roles = {parts.role(word) for word in words if word} & set(parts.USED)
    return roles.pop() if len(roles) == 1 else None


def _choose(by_part):
    """The tar files of each part, in the order of use."""
    return [by_part[part] for part in parts.USED if part in by_part]


def _say_parts(field, root, by_part, counts, options):
    """The line about the parts and their numbers of images."""
    shown = [
        os.path.relpath(tars[0], root) + (', ...' if len(tars) > 1 else '')
        for tars in by_part
    ]
    what = ['to train on', 'choose the best epoch', 'are measured once, at the end']
    if len(by_part) == 2 and not options.held_out_chooses:
        del what[1]
    pieces = [
        f'{count} {purpose} ({place})'
        for count, purpose, place in zip(counts, what, shown, strict=False)
    ]
    pieces[0] = pieces[0].replace(' to train', ' images to train', 1)
    notes.say(f'{field}: {", ".join(pieces)}')


def _check_classes(field, names, labels, first_test):
    """Reports classes that differ only in spelling or are only in the test part."""
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
            f'{similar[1]!r} in others; use one spelling'
        )
    if missing:
        notes.say(
            f'{field}: warning: {len(missing)} classes have no image to train on, so '
            f'they cannot be learned: {", ".join(missing[:5])}'
        )


def _order_by_part(field, samples, options):
    """The order of samples in folders called train, val and test, and the parts' ends.

    None if the folders within the tar files are not parts.
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
    used = [part for part in parts.USED if part in roles]
    by_part = [
        [i for i, top in enumerate(tops) if role_of[top[0]] == part] for part in used
    ]
    order = [i for inside in by_part for i in inside]
    what = options.purposes(len(used))
    names = (
        'images' if what[0] else f'images of {used[0]}',
        *(f'of {n}' for n in used[1:]),
    )
    pieces = [
        f'{len(inside)} {name}{purpose}'
        for inside, name, purpose in zip(by_part, names, what, strict=True)
    ]
    aside = len(samples) - len(order)
    notes.say(
        f'{field}: the folders within are parts: {", ".join(pieces)}'
        + (f'; {aside} of other parts are left out' if aside else '')
    )
    return order, np.cumsum([len(inside) for inside in by_part]).tolist()


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


def _number(field, labels, root, known_classes=None):
    """Labels int32 `[N]` and the class names."""
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
