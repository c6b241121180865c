"""Which files are meant by names, folders, patterns and a list on standard input.

Nothing is listed before it is needed and no list outlives its folder, so a million
files take no more memory than a thousand.
"""

import functools
import glob
import itertools
import os
import stat
import sys
from collections.abc import Iterable, Iterator

from flax_densenet.data import images, notes
from flax_densenet.errors import UserError, printable
from flax_densenet.system import paths

STDIN = '-'


def check(patterns: Iterable[str]):
    """Raises where a pattern or a folder holds no image; lists no more than it must.

    A name that is not there passes: it becomes a row with its error, like any file
    that cannot be read. So does a list on standard input, which is not touched here.

    Raises:
      UserError: nothing matches, a folder cannot be listed, or `-` is given twice.
    """
    seen_stdin = False
    for pattern in patterns:
        if pattern == STDIN:
            if seen_stdin:
                raise UserError('--files=- is given twice; standard input ends once')
            seen_stdin = True
            continue
        _find_one(pattern)


def find(patterns: Iterable[str], *, leave_out: str | None = None) -> Iterator[str]:
    """Paths of image files, in the order of the patterns, sorted within a folder.

    Args:
      patterns: each one of
        a file's name, taken as it is;
        a folder: the images in it and below, by the names in `images.EXTENSIONS`,
        without hidden files and folders and without `__MACOSX`;
        a pattern with `*`, `?`, `[...]` or `**` (folders of any depth): the images
        that match, hidden ones only where the pattern itself names the dot; folders
        that cannot be listed are passed by, as a shell does;
        `-`: names on standard input, one a line.
      leave_out: a folder whose files are not returned, though they match: where
        results are written while the search goes on.

    Raises:
      UserError: as `check`, when the search comes to that pattern.
    """
    results = None if leave_out is None else os.path.realpath(leave_out) + os.sep
    for pattern in patterns:
        for path in _find_one(pattern):
            if results is None or not os.path.realpath(path).startswith(results):
                yield path


def count(patterns: Iterable[str]) -> int | None:
    """How many files the patterns mean, where their number alone tells it."""
    patterns = list(patterns)
    return len(patterns) if all(_is_name(pattern) for pattern in patterns) else None


def _is_name(pattern):
    path = paths.expand(pattern)
    if pattern == STDIN or os.path.isdir(path):
        return False
    # With a bracket in it, it is a name all the same where there is such a file.
    return os.path.lexists(path) or not glob.has_magic(path)


def _resolve(pattern):
    """What is expanded stands for itself; in a pattern `$` may too."""
    path = paths.expand(pattern)
    if glob.has_magic(path) and '://' not in path:
        return path
    return paths.resolve(pattern, '--files=')


def _find_one(pattern):
    if not pattern:
        raise UserError('--files= names nothing; give a file, a folder or a pattern')
    if pattern == STDIN:
        return _from_stdin()
    path = _resolve(pattern)
    if os.path.isdir(path):
        return _from_folder(path, pattern)
    if _is_name(pattern):
        return iter([path])
    return _from_pattern(path, pattern)


def _from_stdin():
    """Names as the bytes that they are, whatever the locale takes them for."""
    lines = sys.stdin.buffer
    names = (os.fsdecode(line.rstrip(b'\r\n')) for line in lines)
    names = filter(None, names)
    return _at_least_one(names, '--files=-: there is no name on standard input')


def _from_pattern(path, pattern):
    names = _images_of_pattern(path, pattern)
    return _at_least_one(names, f'--files={pattern} matches no image; {_LOOKED_FOR}')


def _images_of_pattern(path, pattern):
    found, passed = False, notes.Passed()
    for name in _expand(path):
        hidden = '__MACOSX' in name.split(os.sep)
        if hidden or not _is_file(functools.partial(os.stat, name)):
            continue
        if _is_image_name(name):
            found = True
            yield name
        elif not os.path.isdir(name):
            passed.add_file(name)
    if found:
        _tell(pattern, passed)


def _expand(path):
    """`glob.iglob`, but sorted within a folder and without going round in links.

    Of glob's own `**` a link to a folder above it makes forty copies of each file, two
    such links 2 ** 40.
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
        # Without a root, names are to start as the pattern does, not with ./
        cut = '' if root else os.curdir + os.sep
        below = _walk(root or os.curdir)
        for kind, found in itertools.chain([('folder', root)], below):
            if kind == 'folder':
                folder = glob.escape(found.removeprefix(cut))
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
    """Images below a folder; where there are any, tells at the end of other files."""
    found = False
    for kind, name in _walk(path):
        # What cannot be looked into becomes a row with the reason, as bad files do.
        if kind == 'unlisted' or (kind == 'file' and _is_image_name(name)):
            found = True
            yield name
        elif kind == 'file':
            passed.add_file(name)
    if found:
        _tell(pattern, passed)


def _tell(pattern, passed):
    """Not among the answers, which may be read by a program."""
    if passed.line():
        print(printable(f'--files={pattern}: {passed.line()}'), file=sys.stderr)


_LOOKED_FOR = (
    f'looked for names ending with {", ".join(sorted(images.EXTENSIONS))}; a file of '
    'another name can be given by itself'
)


def _at_least_one(names, message):
    """The names; a UserError where there are none. Looks at the first at once."""
    first = list(itertools.islice(names, 1))
    if not first:
        raise UserError(message)
    return itertools.chain(first, names)


def _walk(root):
    """What is below a folder, depth first and sorted: `(kind, path)`.

    Kinds are file, folder and unlisted: a folder that cannot be looked into. A link
    that leads back to a folder above it is not followed; hidden files and folders and
    `__MACOSX` are left out.
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
        elif entry.name != '__MACOSX' and _identity(entry.path) not in above:
            inside = _entries(entry.path)
            yield 'unlisted' if inside is None else 'folder', entry.path
            stack.append(iter(inside or ()))
            above.append(_identity(entry.path))


def _entries(folder):
    """Sorted, but for hidden ones; None where the folder cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith('.')]
    except OSError:
        return None
    return sorted(shown, key=lambda entry: entry.name)


def _identity(path):
    try:
        found = os.stat(path)
    except OSError:
        return path
    return found.st_dev, found.st_ino


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # behind a link that may not be followed
        return False


def _is_file(get_status):
    """False for folders, and for pipes and devices, which would wait for ever.

    True for what cannot be told, as a dead link: reading it then gives the reason.
    """
    try:
        return stat.S_ISREG(get_status().st_mode)
    except OSError:
        return True


def _is_image_name(name):
    return os.path.splitext(name)[1].lower() in images.EXTENSIONS
