"""What the data's loaders tell while they list a source: one line for each guess."""

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
    """Prints a line about the data, whatever the names in it hold."""
    if _said is not None:
        if line in _said:
            return
        _said.add(line)
    _LOGGER.info(printable(line))


@contextlib.contextmanager
def once():
    """Prints each line a single time, however often the data is looked through."""
    global _said
    before, _said = _said, set() if _said is None else _said
    try:
        yield
    finally:
        _said = before


class Passed:
    """Counts what a search for images passes over.

    Attributes:
      endings: files by the ending of their names.
      links: links that lead nowhere or back to a folder that was listed.
      nested: images in folders below the folder that was searched.
      beside: images beside the folders of classes, which are of no class.
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
        """Counts a file that is no image by its name."""
        name = os.path.basename(path)
        if (
            name == os.path.basename(self._read)
            and os.path.realpath(path) == self._read
        ):
            return
        self.endings[os.path.splitext(name)[1].lower() or _NO_ENDING] += 1

    def join(self, other: 'Passed'):
        """Adds what another one counted."""
        self.endings.update(other.endings)
        self.links += other.links
        self.nested += other.nested
        self.beside += other.beside
        self.results += other.results

    def files(self, most: int = 12) -> str:
        """The files by ending, as `20 .heic, 3 .txt (.heic: ...)`.

        Those that can become images first, however many endings they have.
        """
        found = sorted(
            self.endings.items(),
            key=lambda item: (item[0] not in _REMEDY_OF, -item[1], item[0]),
        )
        most = max(most, sum(ending in _REMEDY_OF for ending in self.endings))
        pieces = [f'{count} {ending}' for ending, count in found[:most]]
        if len(found) > most:
            rest = sum(count for _, count in found[most:])
            pieces.append(f'{rest} of {len(found) - most} other endings')
        remedies: dict[str, list[str]] = {}
        for ending, _ in found[:most]:
            if ending in _REMEDY_OF:
                remedies.setdefault(_REMEDY_OF[ending], []).append(ending)
        told = '; '.join(f'{", ".join(e)}: {r}' for r, e in remedies.items())
        return ', '.join(pieces) + (f' ({told})' if told else '')

    def line(self) -> str:
        """One line about everything that was counted; empty if there was nothing."""
        parts = []
        if self.endings:
            parts.append(f'passed over {self.files()}')
        if self.beside:
            parts.append(f'{self.beside} images lie in no folder of a class')
        if self.unnamed:
            parts.append(f'{self.unnamed} images are not in the table')
        if self.results:
            parts.append(
                f'left out {list_first(self.results)}, with results of this program'
            )
        if self.links:
            parts.append(f'not followed {self.links} links that lead nowhere or back')
        if self.nested:
            parts.append(
                f'{self.nested} images are in folders below those of the classes and '
                'count as theirs'
            )
        return '; '.join(parts)


def read_endings() -> str:
    """The endings of names that are taken for images."""
    return ', '.join(sorted(images.EXTENSIONS))
