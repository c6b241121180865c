"""Recognizes the kind of an unsupported file, by its first bytes."""

import shlex

_CONVERT, _UNPACK = 'convert it to JPEG or PNG', 'unpack it'
_ARRAY = 'save its images as 16-bit PNG or TIFF'
_KINDS = (
    (b'%PDF', 'a PDF', _CONVERT),
    (b'%!PS', 'a PostScript file', _CONVERT),
    (b'8BPS', 'a Photoshop file', _CONVERT),
    (b'gimp xcf', 'a GIMP file', _CONVERT),
    (b'<svg', 'an SVG drawing', _CONVERT),
    (b'v/1\x01', 'an OpenEXR image', _CONVERT),
    (b'\xff\x0a', 'a JPEG XL image', _CONVERT),
    (b'\0\0\0\x0cJXL ', 'a JPEG XL image', _CONVERT),
    (b'FUJIFILMCCD-RAW', 'a raw photo', _CONVERT),
    (b'PK\3\4', 'a zip archive', _UNPACK),
    (b'\x1f\x8b', 'a gzip archive', _UNPACK),
    (b'7z\xbc\xaf', 'a 7z archive', _UNPACK),
    (b'Rar!', 'a rar archive', _UNPACK),
    (b'\x89HDF', 'an HDF5 file', _ARRAY),
    (b'\x93NUMPY', 'a NumPy array', _ARRAY),
    (b'SIMPLE  =', 'a FITS file', _ARRAY),
    (b'NRRD', 'an NRRD file', _ARRAY),
    (b'\x1aE\xdf\xa3', 'a video', 'extract its frames'),
    (b'<!DOCTYPE html', 'a web page', 'download the image itself'),
    (b'<html', 'a web page', 'download the image itself'),
    (b'version https://git-lfs', 'a pointer of Git LFS', 'run git lfs pull'),
)
# Brands after `ftyp`, of files made of boxes.
_HEIF = (b'heic', b'heix', b'hevc', b'heim', b'heis', b'mif1', b'msf1')
_AVIF = (b'avif', b'avis')
_VIDEO = (b'isom', b'iso2', b'mp41', b'mp42', b'avc1', b'M4V ', b'qt  ', b'3gp4')


def describe(start: bytes, formats: tuple[str, ...]) -> str | None:
    """Why a file that starts like this is not read, and what to do.

    Args:
      formats: the supported formats.
    """
    if start[4:8] == b'ftyp':
        brand = start[8:12]
        if brand in _HEIF and 'HEIF' not in formats:
            return "is a HEIC photo, which pip install 'flax_densenet[heic]' reads"
        if brand in _AVIF and 'AVIF' not in formats:
            return 'is an AVIF image, which this Pillow does not read; ' + _CONVERT
        if brand in _VIDEO:
            return 'is not an image but a video; extract its frames'
        if brand == b'crx ':
            return f'is not an image but a raw photo; {_CONVERT}'
    for mark, kind, remedy in _KINDS:
        if start.lower().startswith(mark.lower()):
            return f'is not an image but {kind}; {remedy}'
    return None


# How archives are unpacked, by the end of their names.
_COMMANDS = {
    '.tar.gz': 'tar xzf {0}',
    '.tgz': 'tar xzf {0}',
    '.tar.bz2': 'tar xjf {0}',
    '.tar.xz': 'tar xJf {0}',
    '.tar.zst': 'tar --zstd -xf {0}',
    '.tar': 'tar xf {0}',
    '.zip': 'unzip {0}',
    '.7z': '7z x {0}',
    '.rar': 'unrar x {0}',
}
_PACKED = {b'\x1f\x8b': 'gunzip', b'BZh': 'bunzip2', b'\xfd7zXZ': 'unxz'}
_PACKED[b'(\xb5/\xfd'] = 'unzstd'


def describe_archive(path: str) -> str:
    """What to do about an archive that is given as a folder; empty for others."""
    for ending, command in _COMMANDS.items():
        if path.lower().endswith(ending):
            command = command.format(shlex.quote(path))
            return f'is an archive; unpack it ({command}) and name the folder'
    return ''


def describe_compressed(path: str) -> str:
    """What to do about a compressed file, by its first bytes; empty for others."""
    try:
        with open(path, 'rb') as file:
            start = file.read(6)
    except OSError:
        return ''
    for mark, program in _PACKED.items():
        if start.startswith(mark):
            return f'is compressed; decompress it ({program} {shlex.quote(path)})'
    return ''
