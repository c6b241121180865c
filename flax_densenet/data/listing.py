"""Lists the image files in a folder, with any names, links and permissions.

Hidden files and folders, and those that operating systems create, are skipped. Links
are followed, but each folder is visited once; links to a parent folder are not
followed, since a class would then contain the images of all others.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from flax_densenet.data import dicom, image_formats, images, notes
from flax_densenet.errors import UserError
from flax_densenet.system import result_folders

_LEFT_BEHIND = (
    *('__MACOSX', '@eaDir', '#recycle', '$RECYCLE.BIN'),
    *('System Volume Information', 'lost+found'),
)
# Paths per task; a million futures would take a gigabyte.
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
    """Sorted paths of the image files in a folder and below, found by extension.

    Folders below it that hold results of this program are left out.

    Names that are not UTF-8 are decoded with `surrogateescape`, so they can be opened.

    Args: passed: counts skipped files.

    Raises:
      UserError: a folder cannot be read.
    """
    passed = passed or notes.Passed()
    seen, left, paths = _above(root), [root], []
    while left:
        folder = left.pop()
        identity = _identity(folder)
        if identity in seen:
            passed.links += 1
            continue
        seen.add(identity)
        inside, found = [], scan(folder)
        if folder != root and result_folders.is_result(entry.name for entry in found):
            passed.results.append(folder)
            continue
        for entry in found:
            if is_hidden(entry.name):
                continue
            if _is_folder(entry):
                inside.append(entry.path)
            # Dangling links and pipes are reported when the files are checked.
            elif is_image_file(entry.path):
                paths.append(entry.path)
                passed.nested += folder != root
            else:
                passed.add_file(entry.path)
        left += sorted(inside, reverse=True)
    return sorted(paths)


def is_image_name(name: str) -> bool:
    """Whether a file counts as an image by its extension."""
    return os.path.splitext(name)[1].lower() in images.EXTENSIONS


def is_image_file(path: str) -> bool:
    """Whether a file counts as an image: by extension, or DICOM without one.

    Scanners and archives name DICOM files by numbers, `IM0001` or `1.2.840.113619.2`.
    """
    if is_image_name(path):
        return True
    ending = os.path.splitext(path)[1]
    if (ending and not ending[1:].isdigit()) or not dicom.is_installed():
        return False
    try:
        return os.path.isfile(path) and dicom.has_mark(
            image_formats.read_start(path, dicom.MARKED)
        )
    except OSError:
        return False


def scan(folder: str) -> list[os.DirEntry]:
    """The content of a folder, with a `UserError` if it cannot be read."""
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
    """Whether a name is hidden or belongs to a file of the operating system."""
    return name.startswith('.') or name in _LEFT_BEHIND


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path):
    """A value that is the same for all paths of a folder."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    return status.st_dev, status.st_ino


def _above(root):
    """Identities of the parent folders of a path, and of the path it resolves to."""
    identities = set()
    for path in {os.path.abspath(root), os.path.realpath(root)}:
        while (parent := os.path.dirname(path)) != path:
            path = parent
            identities.add(_identity(path))
    return identities


def check_files(
    files: Sequence[str | bytes],
    bad_images: str,
    *,
    name: Callable[[int], str] | None = None,
    channels: int = 3,
) -> dict[int, str]:
    """Finds unreadable files: `{index: reason}`.

    Args:
      Args: files: paths, or a reader of their bytes.
      bad_images: `skip` decodes every file, so that training never sees a bad one.
        `error` only reads the first and last bytes of each file; other damage is found
        and reported when the image is decoded.
      name: function from an index to the file's name in messages; its path by default.
      channels: channels of the images, see `images.Preparation`.

    Raises:
      UserError: with `error`, for the first bad file.
    """
    skip, bad = bad_images == 'skip', {}
    name_of = name or files.__getitem__

    def check(start):
        reasons = []
        for index in range(start, min(start + _CHUNK, len(files))):
            reason = images.check_image(files[index], decode=skip, channels=channels)
            if reason:
                reasons.append((index, reason))
                if not skip:
                    break
        return reasons

    progress = tqdm(
        total=len(files),
        desc='checking images',
        unit=' images',
        leave=False,
        disable=None,
        delay=1,
    )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, progress:
        for reasons in pool.map(check, range(0, len(files), _CHUNK)):
            progress.update(min(_CHUNK, len(files) - progress.n))
            if reasons and not skip:
                pool.shutdown(cancel_futures=True)
                index, reason = reasons[0]
                raise UserError(
                    f'{name_of(index)} {reason}: fix or remove it, or set '
                    'data.bad_images=skip'
                )
            bad.update(reasons)
    return bad
