"""Finds image files from names, folders, patterns, and a list on standard input.

Folders are listed one at a time, when they are needed, so a million files take no more
memory than a thousand.
"""

import functools
import glob
import itertools
import logging
import os
import stat
import sys
from collections.abc import Iterable, Iterator

from flax_densenet.data import images, listing, notes
from flax_densenet.errors import UserError, printable
from flax_densenet.system import paths, result_folders

_LOGGER = logging.getLogger(__name__)

STDIN = '-'


def check(patterns: Iterable[str]):
    """Checks that each pattern and folder has images, listing as little as possible.

    A missing file does not raise: it becomes a row with an error, like any file that
    cannot be read. Standard input is not read here.

    Raises:
      UserError: nothing matches, a folder cannot be listed, or `-` is given twice.
    """
    seen_stdin = False
    for pattern in patterns:
        if pattern == STDIN:
            if seen_stdin:
                raise UserError('--files=- is given twice; it can be read only once')
            seen_stdin = True
            continue
        _find_one(pattern)


def find(
    patterns: Iterable[str],
    *,
    leave_out: str | None = None,
    outputs: Iterable[str] = (),
) -> Iterator[str]:
    """Yields paths of image files in the order of the patterns, sorted by folder.

    Args:
      patterns: each is
        the name of a file;
        a folder, for all images in it and below, found by `images.EXTENSIONS`, without
        hidden files and folders and without `__MACOSX`;
        a pattern with `*`, `?`, `[...]` or `**` (folders of any depth), for all images
        that match. Hidden files only match an explicit dot, and folders that cannot be
        listed are skipped, as in a shell;
        or `-`, for names on standard input, one per line.
      leave_out: a folder to skip, because results are written there during the search.
      outputs: files to be written at the end, which must not be among the images.

    Raises:
      UserError: see `check`, or an image is one of the outputs; raised when the search
        reaches the pattern.
    """
    written = {_identity(path): path for path in outputs if os.path.isfile(path)}
    results = None if leave_out is None else os.path.realpath(leave_out) + os.sep
    for pattern in patterns:
        for path in _find_one(pattern):
            if written and _identity(path) in written:
                raise UserError(
                    f'{written[_identity(path)]}: the output would overwrite an image '
                    'to predict; name another file'
                )
            if results is None or not os.path.realpath(path).startswith(results):
                yield path


def count(patterns: Iterable[str]) -> int | None:
    """The number of files if all patterns are names; otherwise None."""
    patterns = list(patterns)
    return len(patterns) if all(_is_name(pattern) for pattern in patterns) else None


def _is_name(pattern):
    path = paths.expand(pattern)
    if pattern == STDIN or os.path.isdir(path):
        return False
    # A name with a bracket is a plain name if such a file exists.
    return os.path.lexists(path) or not glob.has_magic(path)


def _resolve(pattern):
    """Resolves a path; in a pattern, `$` can also stand for itself."""
    path = paths.expand(pattern)
    if glob.has_magic(path) and '://' not in path:
        return path
    return paths.resolve(pattern, '--files=')


def _find_one(pattern):
    if not pattern:
        raise UserError('--files= is empty; give a file, a folder or a pattern')
    if pattern == STDIN:
        return _from_stdin()
    path = _resolve(pattern)
    if os.path.isdir(path):
        return _from_folder(path, pattern)
    if _is_name(pattern):
        return iter([path])
    return _from_pattern(path, pattern)


def _from_stdin():
    """The names on standard input, read as bytes, whatever the locale."""
    lines = sys.stdin.buffer
    names = (os.fsdecode(line.rstrip(b'\r\n')) for line in lines)
    names = filter(None, names)
    return _at_least_one(names, '--files=-: there are no names on standard input')


def _from_pattern(path, pattern):
    names = _images_of_pattern(path, pattern)
    return _at_least_one(names, f'--files={pattern} matches no image; {_LOOKED_FOR}')


def _images_of_pattern(path, pattern):
    matched, passed = False, notes.Passed()
    for name in _expand(path):
        hidden = '__MACOSX' in name.split(os.sep)
        if hidden or not _is_file(functools.partial(os.stat, name)):
            continue
        if listing.is_image_file(name):
            matched = True
            yield name
        elif not os.path.isdir(name):
            passed.add_file(name)
    if matched:
        _tell(pattern, passed)


def _expand(path):
    """`glob.iglob`, but sorted by folder, and without following loops of links.

    With glob's own `**`, a link to a parent folder makes forty copies of each file, and
    two such links make 2 ** 40.
    """
    parts = path.split(os.sep)
    if '**' not in parts:
        head, name = os.path.split(path)
        for folder in _expand(head) if glob.has_magic(head) else [head]:
            yield from sorted(glob.iglob(os.path.join(glob.escape(folder), name)))
        return
    place = parts.index('**')
    head, tail = os.sep.join(parts[:place]), parts[place + 1 :]
    if path.startswith(os.sep) and place == 1:
        head = os.sep
    for root in _expand(head) if glob.has_magic(head) else [head]:
        if not os.path.isdir(root or os.curdir):
            continue
        # Without a root, names start like the pattern, not with ./
        cut = '' if root else os.curdir + os.sep
        below = _walk(root or os.curdir)
        for kind, child in itertools.chain([('folder', root)], below):
            if kind == 'folder':
                folder = glob.escape(child.removeprefix(cut))
                yield from _expand(os.path.join(folder, *tail or ['*']))


def _from_folder(path, pattern):
    try:
        os.scandir(path).close()
    except OSError as error:
        raise UserError(
            f'--files={pattern}: the folder cannot be listed ({error.strerror})'
        ) from error
    passed = notes.Passed()
    names = _images_below(path, pattern, passed)
    first = list(itertools.islice(names, 1))
    if not first:
        held = f' but {passed.files()}' if passed.endings else ''
        raise UserError(f'--files={pattern} holds no image{held}; {_LOOKED_FOR}')
    return itertools.chain(first, names)


def _images_below(path, pattern, passed):
    """Yields images below a folder, then reports the files that were skipped."""
    matched = False
    for kind, name in _walk(path):
        # Folders that cannot be listed become rows with an error, like bad files.
        if kind == 'unlisted' or (kind == 'file' and listing.is_image_file(name)):
            matched = True
            yield name
        elif kind == 'file':
            passed.add_file(name)
        elif kind == 'results':
            passed.results.append(name)
    if matched:
        _tell(pattern, passed)


def _tell(pattern, passed):
    """Logs skipped files; not in the output, which a program may read."""
    if passed.line():
        _LOGGER.warning('%s', printable(f'--files={pattern}: {passed.line()}'))


_LOOKED_FOR = (
    f'looked for names ending with {", ".join(sorted(images.EXTENSIONS))}; '
    'give files with other names explicitly'
)


def _at_least_one(names, message):
    """The names; reads the first one, and raises `UserError` if there is none."""
    first = list(itertools.islice(names, 1))
    if not first:
        raise UserError(message)
    return itertools.chain(first, names)


def _walk(root):
    """Yields `(kind, path)` of everything below a folder, depth first and sorted.

    A kind is `file`, `folder`, `unlisted` (a folder that cannot be listed) or `results`
    (a folder of this program, which is not searched for images). Hidden files and
    folders, `__MACOSX`, and links to parent folders are skipped.
    """
    stack, above = [iter(_entries(root) or ())], [_identity(root)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            above.pop()
        elif not _is_folder(entry):
            if _is_file(entry.stat):
                yield 'file', entry.path
        elif result_folders.has_results(entry.path):
            yield 'results', entry.path
        elif entry.name != '__MACOSX' and _identity(entry.path) not in above:
            inside = _entries(entry.path)
            yield 'unlisted' if inside is None else 'folder', entry.path
            stack.append(iter(inside or ()))
            above.append(_identity(entry.path))


def _entries(folder):
    """Sorted entries without hidden ones; None if the folder cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith('.')]
    except OSError:
        return None
    return sorted(shown, key=lambda entry: entry.name)


def _identity(path):
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link that must not be followed
        return False


def _is_file(get_status):
    """False for folders, pipes and devices; the latter two would block forever.

    True if it is unknown, such as for a dead link: reading it then gives the reason.
    """
    try:
        return stat.S_ISREG(get_status().st_mode)
    except OSError:
        return True
