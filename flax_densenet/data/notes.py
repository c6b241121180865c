"""Messages of the loaders while they list a source: one line for each guess."""

import collections
import contextlib
import logging
import os

from flax_densenet.data import dicom, images
from flax_densenet.errors import list_first, printable

_LOGGER = logging.getLogger(__name__)

_REMEDIES = {
    "pip install 'flax_densenet[heic]' reads them": '.heic .heif .hif .heics',
    "pip install 'flax_densenet[medical]' reads them": ' '.join(dicom.ENDINGS),
    'convert them to JPEG or PNG': (
        '.psd .svg .xcf .ai .eps .pdf .emf .wmf .exr .hdr .jxl .jxr '
        '.djvu .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .raw'
    ),
    'convert them to 16-bit PNG or TIFF': (
        '.nii .mha .mhd .nrrd .npy .npz .mat .fits .fit .czi .nd2 .svs '
        '.ndpi .mrxs .lif .h5 .hdf5'
    ),
    'extract their frames': '.mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg',
    'unpack them': '.zip .tar .gz .tgz .bz2 .xz .7z .rar',
}
_NO_ENDING = 'no ending'
_REMEDY_OF = {
    ending: remedy
    for remedy, endings in _REMEDIES.items()
    for ending in endings.split()
} | {_NO_ENDING: 'give them the ending of their format'}


_said: set[str] | None = None  # lines that are not repeated


def say(line: str):
    """Prints a line about the data, with any characters in names."""
    if _said is not None:
        if line in _said:
            return
        _said.add(line)
    _LOGGER.info(printable(line))


@contextlib.contextmanager
def once():
    """Prints each line only once, even if the data is listed several times."""
    global _said
    before, _said = _said, set() if _said is None else _said
    try:
        yield
    finally:
        _said = before


class Passed:
    """Counts the files that a search for images skips.

    Attributes:
      endings: files by extension.
      links: links that lead nowhere or back to a listed folder.
      nested: images in folders below the searched folder.
      beside: images next to the class folders, which have no class.
      unnamed: images that a table does not name.
      results: folders with results of this program.

    Args:
      read: a file that is read, such as the table of labels, and is not counted.
    """

    def __init__(self, read: str = ''):
        self._read = os.path.realpath(read) if read else ''
        self.endings: collections.Counter[str] = collections.Counter()
        self.links = self.nested = self.beside = self.unnamed = 0
        self.results: list[str] = []

    def add_file(self, path: str):
        """Counts a file whose name is not that of an image."""
        name = os.path.basename(path)
        if (
            name == os.path.basename(self._read)
            and os.path.realpath(path) == self._read
        ):
            return
        self.endings[os.path.splitext(name)[1].lower() or _NO_ENDING] += 1

    def join(self, other: 'Passed'):
        """Adds the counts of another object."""
        self.endings.update(other.endings)
        self.links += other.links
        self.nested += other.nested
        self.beside += other.beside
        self.results += other.results

    def files(self, most: int = 12) -> str:
        """The files by extension, such as `20 .heic, 3 .txt (.heic: ...)`.

        Files that can be converted to images come first.
        """
        found = sorted(
            self.endings.items(),
            key=lambda item: (item[0] not in _REMEDY_OF, -item[1], item[0]),
        )
        most = max(most, sum(ending in _REMEDY_OF for ending in self.endings))
        pieces = [f'{count} {ending}' for ending, count in found[:most]]
        if len(found) > most:
            rest = sum(count for _, count in found[most:])
            pieces.append(f'{rest} with {len(found) - most} other extensions')
        remedies: dict[str, list[str]] = {}
        for ending, _ in found[:most]:
            if ending in _REMEDY_OF:
                remedies.setdefault(_REMEDY_OF[ending], []).append(ending)
        told = '; '.join(f'{", ".join(e)}: {r}' for r, e in remedies.items())
        return ', '.join(pieces) + (f' ({told})' if told else '')

    def line(self) -> str:
        """One line about all counts; empty if there are none."""
        parts = []
        if self.endings:
            parts.append(f'skipped {self.files()}')
        if self.beside:
            parts.append(f'{self.beside} images are not in a class folder')
        if self.unnamed:
            parts.append(f'{self.unnamed} images are not in the table')
        if self.results:
            parts.append(
                f'left out {list_first(self.results)}, with results of this program'
            )
        if self.links:
            parts.append(f'ignored {self.links} links that lead nowhere or back')
        if self.nested:
            parts.append(
                f'{self.nested} images are in subfolders of class folders and belong '
                'to these classes'
            )
        return '; '.join(parts)


def read_endings() -> str:
    """The extensions of image files."""
    return ', '.join(sorted(images.EXTENSIONS))
