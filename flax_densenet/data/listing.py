"""Which image files a folder holds, whatever its names, links and rights are.

Hidden files and folders, and those that systems leave behind, are no images. Links are
followed, each folder once; links to a folder above are not, since a class would then
hold the images of all others.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from flax_densenet.data import images, notes
from flax_densenet.errors import UserError

_LEFT_BEHIND = (
    *('__MACOSX', '@eaDir', '#recycle', '$RECYCLE.BIN'),
    *('System Volume Information', 'lost+found'),
)
# Paths that a thread checks at a time: a million futures would take a gigabyte.
_CHUNK = 256


def class_folders(root: str) -> list[str]:
    """Names of the folders in a folder, sorted.

    Raises:
      UserError: the folder cannot be read.
    """
    above = _above(root) | {_identity(root)}
    return sorted(
        entry.name
        for entry in scan(root)
        if _is_folder(entry)
        and not is_hidden(entry.name)
        and not (entry.is_symlink() and _identity(entry.path) in above)
    )


def image_files(root: str, passed: notes.Passed | None = None) -> list[str]:
    """Paths of the image files in a folder and below, by their extension, sorted.

    Names that are not UTF-8 come as Python's `surrogateescape` has them, with which
    they can be opened.

    Args:
      passed: counts what is passed over.

    Raises:
      UserError: a folder cannot be read.
    """
    passed = passed or notes.Passed()
    seen, left, found = _above(root), [root], []
    while left:
        folder = left.pop()
        identity = _identity(folder)
        if identity in seen:
            passed.links += 1
            continue
        seen.add(identity)
        inside = []
        for entry in scan(folder):
            if is_hidden(entry.name):
                continue
            if _is_folder(entry):
                inside.append(entry.path)
            # A link to nowhere or a pipe is found to be bad when files are checked.
            elif is_image_name(entry.name):
                found.append(entry.path)
                passed.nested += folder != root
            else:
                passed.add_file(entry.name)
        left += sorted(inside, reverse=True)
    return sorted(found)


def is_image_name(name: str) -> bool:
    """Whether a file is taken for an image by the ending of its name."""
    return os.path.splitext(name)[1].lower() in images.EXTENSIONS


def scan(folder: str) -> list[os.DirEntry]:
    """What a folder holds, with a `UserError` if it cannot be read."""
    return list(entries(folder))


def entries(folder: str) -> Iterator[os.DirEntry]:
    """`scan` without a list, so that a search can end early."""
    try:
        with os.scandir(folder) as found:
            yield from found
    except OSError as error:
        raise UserError(
            f'{folder}: the folder cannot be read ({error.strerror}); make it readable '
            'or move it away'
        ) from error


def is_hidden(name: str) -> bool:
    """Whether a name is hidden or one of those that systems leave behind."""
    return name.startswith('.') or name in _LEFT_BEHIND


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path):
    """What is the same for all paths of a folder."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    return found.st_dev, found.st_ino


def _above(root):
    """The identities of the folders that hold a folder, by its path and its target."""
    found = set()
    for path in {os.path.abspath(root), os.path.realpath(root)}:
        while (parent := os.path.dirname(path)) != path:
            path = parent
            found.add(_identity(path))
    return found


def check_files(
    files: Sequence[str | bytes],
    bad_images: str,
    *,
    name: Callable[[int], str] | None = None,
) -> dict[int, str]:
    """`{index: reason}` of the bad files.

    Args:
      files: paths, or a reader of their bytes.
      name: of the file at an index, for the message; its path by default.
      bad_images: `skip` decodes every file, so that training never meets a bad one;
        `error` looks at each file's first and last bytes, and what that does not find
        is met, and named, when the image is decoded.

    Raises:
      UserError: with `error`, of the first bad file.
    """
    skip, bad = bad_images == 'skip', {}
    name = name or files.__getitem__

    def check(start):
        found = []
        for index in range(start, min(start + _CHUNK, len(files))):
            reason = images.check_image(files[index], decode=skip)
            if reason:
                found.append((index, reason))
                if not skip:
                    break
        return found

    progress = tqdm(
        total=len(files),
        desc='checking images',
        unit=' images',
        leave=False,
        disable=None,
        delay=1,
    )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, progress:
        for found in pool.map(check, range(0, len(files), _CHUNK)):
            progress.update(_CHUNK)
            if found and not skip:
                pool.shutdown(cancel_futures=True)
                index, reason = found[0]
                raise UserError(
                    f'{name(index)} {reason}: fix or remove it, or set '
                    'data.bad_images=skip'
                )
            bad.update(found)
    return bad
