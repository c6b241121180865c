"""Finds classes and parts in a folder of images: `PATH/[PART/]CLASS/*`."""

import dataclasses
import os
import unicodedata
from collections.abc import Sequence

import numpy as np

from flax_densenet.data import (
    cells,
    label_options,
    listing,
    mask_names,
    notes,
    parts,
    path_groups,
    readers,
)
from flax_densenet.errors import UserError, printable
from flax_densenet.system import paths as paths_lib
from flax_densenet.system import result_folders

_RESULTS_DEPTH = 2


@dataclasses.dataclass(frozen=True)
class Layout:
    """The folders that hold the classes.

    Attributes:
      train: the folder with the classes to train on.
      held_out: the folder of the images that are measured after each epoch; None if
        there is no such part.
      test: the folder of the images that are measured once at the end; None unless
        there are three parts.
      lines: messages about what was recognized or left out.
    """

    train: str
    held_out: str | None = None
    test: str | None = None
    lines: tuple[str, ...] = ()

    @property
    def parts(self) -> list[str]:
        """The folders of all existing parts, the training part first."""
        return [part for part in (self.train, self.held_out, self.test) if part]


def find(
    name: str,
    *,
    bad_images: str,
    options: label_options.Options | None = None,
    known_classes: Sequence[str] | None = None,
    channels: int = 3,
) -> readers.Listing:
    """Lists the images of `data.source=folder:NAME` by class.

    Args:
      options: its `groups`, and what the held-out part is for.
      known_classes: of a trained model, for which one class is enough.
      channels: of the images, see `images.Preparation`.

    Raises:
      UserError: there is no such folder, its folders are no classes, or a class has no
        image that can be read.
    """
    field = f'data.source=folder:{name}'
    options = options or label_options.Options()
    groups = options.groups
    root = paths_lib.resolve(name, 'data.source=folder:')
    layout = find_layout(field, root)
    names = _class_names(field, root, layout, 1 if known_classes else 2)
    passed = notes.Passed()
    paths, labels, ends = _list_files(field, layout, names, passed)
    bad = listing.check_files(paths, bad_images, channels=channels)
    good = np.array([i for i in range(len(paths)) if i not in bad], np.int64)
    train, *others = np.split(good, np.searchsorted(good, ends[:-1]))
    counts = np.bincount(labels[train], minlength=len(names))
    if not counts.all():
        raise UserError(
            f'{field}: no image of the folder {names[counts.argmin()]} can be read; '
            'fix them or remove the folder'
        )
    _add_stray_files(root, layout, names, passed)
    for line in (*layout.lines, *mask_names.describe(paths)):
        notes.say(f'{field}: {line}')
    if groups.startswith('column:'):
        raise UserError(f'data.groups={groups} needs a table, data.labels')
    below = [os.path.relpath(path, root) for path in paths]
    owners, grouped_by = path_groups.find(below, groups, field)
    if line := passed.line():
        is_split = not others and options.for_training and groups == 'auto'
        if passed.nested and owners is None and is_split:
            above = os.path.relpath(layout.train, root)
            line += path_groups.describe_subfolders(below, above)
        notes.say(f'{field}: {line}')
    if similar := parts.find_similar(names):
        notes.say(
            f'{field}: the classes {similar[0]!r} and {similar[1]!r} differ only in '
            'case or spaces; if they are one class, move the images into one folder'
        )
    if others:
        _say_parts(field, root, layout, [len(p) for p in (train, *others)], options)
    for folder, part in zip(layout.parts[1:], others, strict=True):
        _say_missing(field, _below(root, folder), names, labels[part])
    return readers.Listing(
        readers.FileReader(paths, labels, root),
        [printable(name) for name in names],
        train,
        others[-1] if others else None,
        tuple(f'{paths[i]} {reason}' for i, reason in bad.items()),
        owners,
        others[0] if len(others) == 2 else None,
        grouped_by,
    )


def _say_missing(field, part, names, labels):
    """The line about classes of which a part has no images."""
    missing = [name for label, name in enumerate(names) if not (labels == label).any()]
    if missing:
        notes.say(
            f'{field}: {part} has no images for {len(missing)} of {len(names)} classes '
            f'({_first(missing)})'
        )


def _say_parts(field, root, layout, counts, options):
    what = options.purposes(len(counts))
    pieces = [
        f'{count}{"" if place else " images"} in {_below(root, folder)}{purpose}'
        for place, (folder, count, purpose) in enumerate(
            zip(layout.parts, counts, what, strict=True)
        )
    ]
    notes.say(f'{field}: {", ".join(pieces)}')


def _below(root, folder):
    """A folder's path below the source's, for messages."""
    return os.path.relpath(folder, root)


def _first(names, most=5):
    return ', '.join(names[:most]) + (', ...' if len(names) > most else '')


def find_layout(field: str, root: str) -> Layout:
    """Recognizes the parts of a set in a folder; see `Layout`.

    Raises: UserError: the folders are neither classes nor one part of each kind.
    """
    lines: list[str] = []
    root, inside = _below_single_folders(root, lines)
    roles = parts.by_role(inside)
    chosen = {}
    for part, names in roles.items():
        chosen[part] = names[0]
    flat = {
        part: os.path.join(root, name)
        for part, name in chosen.items()
        if part != parts.TRAIN and _is_flat(os.path.join(root, name))
    }
    train = chosen.get(parts.TRAIN)
    if train is None:
        if len(roles) and sum(map(len, roles.values())) == len(inside) > 1:
            raise UserError(
                f'{field}: its folders ({_first(inside)}) look like parts of a set, '
                'not like classes, and none is called train; rename one to train, or '
                'rename the classes'
            )
        return _of_classes(field, root, inside, lines)
    others = [part for part in (parts.VAL, parts.TEST) if part in chosen]
    folder = _inner(os.path.join(root, train), lines)
    if not others:
        # A class of this name, unless its contents can only be classes.
        looks = len(listing.class_folders(folder)) > 1 and not _has_images(folder)
        if not looks or parts.OTHER not in chosen:
            if looks:
                raise UserError(
                    f'{field}: {train} holds folders like a training part, next to '
                    f'{_first([n for n in inside if n != train])}; give '
                    f'folder:{folder}, or rename it if it is a class'
                )
            return _of_classes(field, root, inside, lines)
    for part in (parts.TRAIN, *others):
        if not parts.is_clear(part, roles[part]):
            raise UserError(
                f'{field}: {" and ".join(roles[part][:3])} all look like the part '
                f'{part}; join them, or move all but one elsewhere'
            )
    if _is_flat(folder):
        raise UserError(
            f'{field}: {train} holds images but no folders of classes; make one for '
            'each class, or give a table of their classes as data.labels'
        )
    found = [part for part in others if part not in flat]
    held_out, more = (found[0] if found else None), found[1:]
    used = {train, *(chosen[part] for part in found)}
    for part in flat:
        if part in others:
            used.add(chosen[part])
            lines.append(
                f'{chosen[part]} is left out: its images are directly in it, not in '
                'class folders'
            )
    left = [name for name in inside if name not in used]
    if left:
        lines.append(f'left out besides the parts: the folders {_first(left)}')
    if held_out is None:
        lines.append(f'{train} is split into training and test images')
    _check_same_folders(field, folder, listing.class_folders(folder))
    _check_no_pieces(field, listing.class_folders(folder))
    return Layout(
        folder,
        held_out and _inner(os.path.join(root, chosen[held_out]), lines),
        _inner(os.path.join(root, chosen[more[0]]), lines) if more else None,
        tuple(lines),
    )


def _of_classes(field, root, inside, lines):
    """The layout of a folder that directly holds class folders."""
    _check_same_folders(field, root, inside)
    _check_no_set(field, root, inside)
    _check_no_pieces(field, inside)
    name = os.path.basename(os.path.abspath(root))
    if parts.role(name) is not None:
        above = os.path.dirname(os.path.abspath(root))
        beside = parts.by_role(listing.class_folders(above))
        other = [
            names[0]
            for part, names in beside.items()
            if part in parts.USED and name not in names
        ]
        if other and parts.role(name) == parts.TRAIN:
            lines.append(
                f'next to {name} there is {_first(other)}, which is not used; give '
                f'folder:{above} to use these parts'
            )
    return Layout(root, lines=tuple(lines))


def _check_same_folders(field, root, names):
    """Raises if all class folders contain the same folders, two or more."""
    if len(names) < 2:
        return
    inside = listing.class_folders(os.path.join(root, names[0]))
    if len(inside) < 2 or all(map(cells.is_owner, inside)):
        return
    for name in names[1:]:
        if listing.class_folders(os.path.join(root, name)) != inside:
            return
    what = 'parts' if any(map(parts.role, inside)) else 'folders'
    raise UserError(
        f'{field}: all of its folders ({_first(names)}) hold the same {what} '
        f'({_first(inside)}), so they are probably not the classes; give one of them '
        'as folder:PATH, lay parts out as PATH/train/CLASS and PATH/val/CLASS, or, if '
        'they are the classes, move their images up into them'
    )


def _check_no_pieces(field, names):
    """Raises if the folders are numbered pieces of a data set: `part_1`, `part_2`."""
    if len(names) > 1 and parts.are_pieces(names):
        raise UserError(
            f'{field}: its folders ({_first(names)}) look like pieces of a set, not '
            'like classes; make a folder for each class, give a table of the classes '
            'as data.labels, or rename the folders if they are the classes'
        )


def _check_no_set(field, root, names):
    """Raises if one folder holds parts like a complete data set, and others do not."""
    for name in names:
        inside = parts.by_role(listing.class_folders(os.path.join(root, name)))
        if parts.TRAIN in inside and {parts.VAL, parts.TEST} & set(inside):
            found = [inside[part][0] for part in parts.USED if part in inside]
            raise UserError(
                f'{field}: the folder {name} holds parts of a set ({_first(found)}), '
                'so it is probably not a class; give '
                f'folder:{os.path.join(root, name)}, or move its images up into it if '
                'it is a class'
            )


def _below_single_folders(root, lines):
    """Descends while a folder contains only one folder of folders."""
    while True:
        inside = [
            name for name in listing.class_folders(root) if not _is_run(root, name)
        ]
        gone = set(listing.class_folders(root)) - set(inside)
        if gone:
            lines.append(
                f'left out: {_first(sorted(gone))}, with results of this program'
            )
        if len(inside) != 1 or _has_images(root):
            return root, inside
        below = os.path.join(root, inside[0])
        deeper = listing.class_folders(below)
        if len(deeper) < 2 and not (
            len(deeper) == 1 and listing.class_folders(os.path.join(below, deeper[0]))
        ):
            return root, inside
        lines.append(f'holds only one folder; its folders are used: {below}')
        root = below


def _inner(folder, lines):
    """The folder with the classes of a part, such as `seg_train/seg_train`."""
    while True:
        inside = listing.class_folders(folder)
        if len(inside) != 1 or _has_images(folder):
            return folder
        below = os.path.join(folder, inside[0])
        same = parts.plain_case(inside[0]) == parts.plain_case(os.path.basename(folder))
        if not same and len(listing.class_folders(below)) < 2:
            return folder
        lines.append(f'the classes of {folder} are in {below}')
        folder = below


def _has_images(folder):
    """Whether images are directly in a folder."""
    return any(
        not listing.is_hidden(entry.name) and listing.is_image_file(entry.path)
        for entry in listing.entries(folder)
    )


def _is_flat(folder):
    """Whether a part holds images, but no folders of images."""
    folder = _inner(folder, [])
    inside = listing.class_folders(folder)
    if len(inside) == 1 and not _has_images(folder):
        # test/images/*.jpg
        return parts.role(f'{inside[0]}train') == parts.TRAIN and bool(
            listing.image_files(folder)
        )
    return not inside and _has_images(folder)


def _is_run(root, name):
    """Whether a folder holds results of this program: a run, runs or a pack."""
    level = [os.path.join(root, name)]
    if result_folders.is_part_of_run(level[0]):
        return True
    for depth in range(_RESULTS_DEPTH + 1):
        if any(map(result_folders.has_results, level)):
            return True
        if depth == _RESULTS_DEPTH or any(map(_has_images, level)):
            return False
        level = [os.path.join(f, n) for f in level for n in listing.class_folders(f)]
    return False


def _class_names(field, root, layout, least):
    """The class folders of the training part."""
    names = [
        name
        for name in listing.class_folders(layout.train)
        if not _is_run(layout.train, name)
    ]
    if len(names) < least:
        found = f'only one class ({names[0]})' if names else 'no class folders'
        remedy = 'make a folder of images for each of at least two classes'
        if least == 1:
            remedy = 'put the images into folders that are named after their classes'
        raise UserError(f'{field}: has {found}; {remedy}')
    for part in layout.parts[1:]:
        _compare_classes(field, root, layout.train, names, part)
    return names


def _compare_classes(field, root, train, names, part):
    """Raises if a part has a class that the training part lacks."""
    extra = sorted(set(listing.class_folders(part)) - set(names))
    extra = [name for name in extra if not _is_run(part, name)]
    if not extra:
        return
    train, test = _below(root, train), _below(root, part)
    plain = {parts.plain_case(name): name for name in names}
    similar = plain.get(parts.plain_case(extra[0]))
    if similar is not None:
        one, other = (unicodedata.normalize('NFC', n) for n in (similar, extra[0]))
        how = ' in another Unicode form' if one == other else ''
        raise UserError(
            f'{field}: class {extra[0]!r} of {test} is written {similar!r} in {train}'
            f'{how}; rename one of the folders'
        )
    raise UserError(
        f'{field}: class {extra[0]} is in {test} but not in {train}; add it '
        'there or remove it'
    )


def _list_files(field, layout, names, passed):
    """Paths, labels int32 `[N]`, and the end index of each part."""
    paths, labels, ends = [], [], []
    for part in layout.parts:
        before = len(paths)
        for label, name in enumerate(names):
            folder = os.path.join(part, name)
            if part is not layout.train and not os.path.isdir(folder):
                continue  # a class without test images
            here = notes.Passed()
            files = listing.image_files(folder, here)
            passed.join(here)
            if not files and part is layout.train:
                held = f' but {here.files()}' if here.endings else ''
                raise UserError(
                    f'{field}: the folder {name} holds no images{held}; add some or '
                    'remove it'
                    + (f' (formats: {notes.read_endings()})' if held else '')
                )
            paths += files
            labels.append(np.full(len(files), label, np.int32))
        if len(paths) == before:
            name = os.path.basename(part)
            raise UserError(f'{field}: the folder {name} holds no images')
        ends.append(len(paths))
    return paths, np.concatenate(labels), ends


def _add_stray_files(root, layout, names, passed):
    """Counts the files next to the folders of classes and parts."""
    for folder in {root, *layout.parts}:
        for entry in listing.scan(folder):
            if listing.is_hidden(entry.name) or not os.path.isfile(entry.path):
                continue
            if listing.is_image_file(entry.path):
                passed.beside += 1
            else:
                passed.add_file(entry.name)
