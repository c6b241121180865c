"""Reads the image of a DICOM file: its pixels, and how their values are displayed.

Only the elements that describe pixels are parsed. Nothing about the patient, the study
or the device is read, and errors do not quote values.
"""

import io
import logging
import struct
import zlib

import numpy as np
from PIL import Image

from flax_densenet import errors
from flax_densenet.data import dicom_display
from flax_densenet.errors import UserError

ENDINGS = ('.dcm', '.dicom', '.dic')
_MARK, _MARK_AT = b'DICM', 128
MARKED = _MARK_AT + len(_MARK)  # bytes up to the end of the magic number
_DEFLATED, _EXPLICIT = b'1.2.840.10008.1.2.1.99', b'1.2.840.10008.1.2.1\0\0\0'
_RLE, _EXTENDED = '1.2.840.10008.1.2.5', '1.2.840.10008.1.2.4.51'
_JP2 = b'\0\0\0\x0cjP  '  # the beginning of a file around a JPEG 2000 stream
# Not in our extra, since its license is the GPL.
_DECODERS = dict.fromkeys(
    ('1.2.840.10008.1.2.4.57', '1.2.840.10008.1.2.4.70'),
    'pylibjpeg pylibjpeg-libjpeg (licensed under the GPL)',
)
_MOST_HEADER = 2**16  # bytes of the group that names the transfer syntax
_MOST_INFLATED = 2**28
_NUMBERS = {8: np.uint8, 16: np.uint16, 32: np.uint32}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32}
_KEYWORDS = (
    'SamplesPerPixel',
    'PhotometricInterpretation',
    'NumberOfFrames',
    'Rows',
    'Columns',
    'BitsAllocated',
    'BitsStored',
    'HighBit',
    'PixelRepresentation',
    'PlanarConfiguration',
    'RescaleSlope',
    'RescaleIntercept',
    'ModalityLUTSequence',
    'VOILUTSequence',
    'WindowCenter',
    'WindowWidth',
    'VOILUTFunction',
    'LUTDescriptor',
    'LUTData',
    'RedPaletteColorLookupTableDescriptor',
    'GreenPaletteColorLookupTableDescriptor',
    'BluePaletteColorLookupTableDescriptor',
    'RedPaletteColorLookupTableData',
    'GreenPaletteColorLookupTableData',
    'BluePaletteColorLookupTableData',
    'PixelData',
)


def is_installed() -> bool:
    """Whether pydicom is installed; does not import it, which takes time."""
    return errors.is_installed('pydicom')


def has_mark(start: bytes) -> bool:
    """Whether a file whose first MARKED bytes are these is a DICOM file."""
    return start[_MARK_AT : _MARK_AT + 4] == _MARK


class DicomImage(Image.Image):
    """An open DICOM file, which is decoded when its pixels are needed.

    Gray images have the mode F, values in the modality's unit (such as Hounsfield
    units), and `info['display']`; others are RGB of 8 bits.
    """

    format = 'DICOM'
    format_description = 'DICOM'

    def __init__(self, file: str | bytes):
        """Reads the header.

        Raises: UserError: it is not a single image, or of an unsupported kind.
        """
        super().__init__()
        self._file: str | bytes | None = file
        _guard(self._open, _read(file, pixels=False))

    def _open(self, header):
        _check(header)
        self._size = int(header.Columns), int(header.Rows)
        self._mode = 'RGB'
        if str(header.PhotometricInterpretation).startswith('MONOCHROME'):
            self._mode = 'F'
            self.info['display'] = dicom_display.make(header)

    def load(self):
        """Decodes the pixels."""
        if self._file is not None:
            file, self._file = self._file, None
            array = _guard(_decode, _read(file, pixels=True))
            if array.shape[:2] != self._size[::-1]:
                raise dicom_display.refuse(
                    'the number of its pixels does not match its header'
                )
            self.im = Image.fromarray(array).im
        return super().load()


def _check(header):
    """Raises if a header does not describe a single image of a supported kind."""
    frames = int(header.get('NumberOfFrames') or 1)
    if not header.get('Rows') or not header.get('Columns'):
        raise UserError('is a DICOM file without an image')
    if frames > 1:
        raise UserError(
            f'is a DICOM file of {frames} frames (NumberOfFrames), but only single '
            'frames are read; save the frame that you need as a separate file'
        )
    if header.get('BitsAllocated') not in _NUMBERS:
        raise dicom_display.refuse(f'{header.get("BitsAllocated")} bits a value')
    if not 0 < (header.get('BitsStored') or 0) <= header.BitsAllocated:
        raise dicom_display.refuse('no valid BitsStored')
    if header.get('SamplesPerPixel') not in (1, 3):
        raise dicom_display.refuse('no valid SamplesPerPixel')
    if not header.get('PhotometricInterpretation'):
        raise dicom_display.refuse('no PhotometricInterpretation')
    if header.file_meta.TransferSyntaxUID == _EXTENDED and header.BitsStored > 8:
        raise dicom_display.refuse('JPEG Extended with 12 bits')


def keep_pixels(file: str | bytes) -> bytes:
    """A DICOM file with only the elements that describe pixels, for packs.

    Raises:
      UserError: it cannot be read.
    """
    return _guard(_write, _read(file, pixels=True))


def _write(dataset):
    from pydicom import dataset as dataset_lib
    from pydicom import uid

    made = dataset_lib.Dataset()
    for element in dataset:
        if element.VR == 'SQ':
            for item in element.value:
                for inside in [x for x in item if x.keyword not in _KEYWORDS]:
                    del item[inside.tag]
        made.add(element)
    syntax = dataset.file_meta.TransferSyntaxUID
    made.file_meta = dataset_lib.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = (
        uid.ExplicitVRLittleEndian if syntax == _DEFLATED.decode() else syntax
    )
    made.SOPClassUID = uid.SecondaryCaptureImageStorage
    made.SOPInstanceUID = '2.25.0'  # constant, so that packs are reproducible
    out = io.BytesIO()
    dataset_lib.Dataset.save_as(made, out, enforce_file_format=True)
    return out.getvalue()


def _guard(function, *arguments):
    """Calls pydicom; its errors have no common base class and quote the file."""
    try:
        return function(*arguments)
    except (UserError, OSError):
        raise
    except Exception as error:  # of any kind, from pydicom and its decoders
        raise UserError(
            f'is a DICOM file that cannot be decoded ({type(error).__name__})'
        ) from None


def _read(file, *, pixels):
    """The elements of `_KEYWORDS`, without or with the pixels."""
    opened = _inflate(file)
    return _guard(_parse, _import_pydicom(), opened, pixels)


def _import_pydicom():
    try:
        import pydicom
    except ImportError:
        raise UserError(
            "is a DICOM file, which pip install 'flax_densenet[medical]' reads"
        ) from None
    logger = logging.getLogger('pydicom')
    if logger.level == logging.NOTSET:  # pydicom logs elements, with tracebacks
        logger.setLevel(logging.CRITICAL)
    return pydicom


def _parse(pydicom, opened, pixels):
    return pydicom.dcmread(
        opened, specific_tags=list(_KEYWORDS), stop_before_pixels=not pixels
    )


def _inflate(file):
    """The path or a file in memory; a deflated file is inflated up to a limit."""
    if isinstance(file, bytes):
        start = file[:_MOST_HEADER]
    else:
        with open(file, 'rb') as opened:
            start = opened.read(_MOST_HEADER)
    syntax, end = _find_syntax(start)
    if syntax.rstrip(b'\0 ') != _DEFLATED:
        return io.BytesIO(file) if isinstance(file, bytes) else file
    if not isinstance(file, bytes):
        with open(file, 'rb') as opened:
            file = opened.read()
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(file[end:], _MOST_INFLATED)
    except zlib.error:
        raise UserError('is a DICOM file that cannot be decoded (deflate)') from None
    if inflater.unconsumed_tail:
        raise UserError(
            f'is a deflated DICOM file of more than {_MOST_INFLATED // 2**20} MiB'
        )
    return io.BytesIO(start[:end].replace(_DEFLATED, _EXPLICIT) + content)


def _find_syntax(start):
    """The transfer syntax, and the offset of the elements after its group.

    Raises:
      UserError: it is missing where the standard requires it.
    """
    place, syntax = _MARK_AT + 4, b''
    while start[place : place + 2] == b'\2\0' and place + 12 <= len(start):
        element, kind = start[place + 2 : place + 4], start[place + 4 : place + 6]
        if kind in (b'OB', b'OW', b'UN', b'UT', b'SQ'):
            size = struct.unpack_from('<I', start, place + 8)[0]
            place += 12
        else:
            size = struct.unpack_from('<H', start, place + 6)[0]
            place += 8
        if element == b'\x10\0':
            syntax = start[place : place + size]
        place += size
    if not syntax or place > len(start) or not syntax[:4] == b'1.2.':
        raise dicom_display.refuse('no valid transfer syntax')
    return syntax, place


def _decode(dataset):
    """float32 `[H, W]` in the modality's unit, or uint8 `[H, W, 3]`."""
    from pydicom import pixels

    if 'PixelData' not in dataset:
        raise UserError('is a DICOM file without an image')
    syntax = dataset.file_meta.TransferSyntaxUID
    photometric = str(dataset.PhotometricInterpretation)
    if syntax == _RLE:
        values = _decode_rle(dataset)
        if photometric.startswith('YBR'):
            values = pixels.convert_color_space(values, photometric, 'RGB')
    else:
        if syntax.is_compressed and syntax != _DEFLATED.decode():
            _check_frame(dataset)
        values, _ = _decoder(pixels, syntax).as_array(dataset, index=0, raw=False)
    if photometric == 'PALETTE COLOR':
        values = pixels.apply_color_lut(values, dataset)
        bits = 8 * values.dtype.itemsize
    else:
        values = _stored_bits(values, dataset)
        bits = int(dataset.BitsStored)
    if photometric.startswith('MONOCHROME'):
        if values.ndim != 2:
            raise dicom_display.refuse('gray with several samples a pixel')
        return _to_unit(values, dataset)
    if values.ndim != 3 or values.shape[-1] != 3:
        raise dicom_display.refuse('color without three samples a pixel')
    if bits == 8:
        return values.astype(np.uint8)
    if bits <= 16:
        shown = np.rint(np.arange(2**bits) * (255 / (2**bits - 1))).astype(np.uint8)
        return shown[np.clip(values, 0, 2**bits - 1)]
    shown = values.astype(np.float32) * np.float32(255 / (2**bits - 1))
    return np.clip(np.rint(shown), 0, 255).astype(np.uint8)


def _decoder(pixels, syntax):
    try:
        decoder = pixels.get_decoder(syntax)
    except NotImplementedError:
        raise dicom_display.refuse(f'transfer syntax {syntax.name}') from None
    if not decoder.is_available:
        package = _DECODERS.get(str(syntax), "'flax_densenet[medical]'")
        raise UserError(
            f'is a DICOM file compressed as {syntax.name.split(",")[0]}, which '
            f'pip install {package} reads'
        )
    return decoder


def _stored_bits(values, dataset):
    """Values without unused bits, and with their sign."""
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if stored == allocated or values.dtype.itemsize * 8 != allocated:
        return values
    high = dataset.get('HighBit')
    high = stored - 1 if high is None else int(high)
    if not stored - 1 <= high < allocated:
        raise dicom_display.refuse('no valid HighBit')
    signed = dataset.get('PixelRepresentation')
    values = values.view((_SIGNED if signed else _NUMBERS)[allocated])
    return (values << (allocated - 1 - high)) >> (allocated - stored)


def _to_unit(values, dataset):
    table = dicom_display.find_table(dataset, 'ModalityLUTSequence')
    if table is not None:
        first, outputs, _ = table
        place = np.clip(values.astype(np.int64) - first, 0, len(outputs) - 1)
        return outputs[place].astype(np.float32)
    slope, intercept = dicom_display.find_scale(dataset)
    if (slope, intercept) == (1, 0):
        return values.astype(np.float32)
    values = values.astype(np.float32)
    values *= slope
    values += intercept
    return values


def _check_frame(dataset):
    """Raises if compressed pixels do not have the checked size."""
    from pydicom import encaps

    frame = encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    _check_boxes(frame)
    found = _jpeg_shape(frame) or _jpeg2000_shape(frame)
    wanted = (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel)
    if found != tuple(map(int, wanted)):
        raise UserError(
            'is a DICOM file whose compressed image is not of the size in its header'
        )


def _check_boxes(frame):
    """Raises for boxes of a JP2 file that do not lead to the next one.

    pydicom would step over a box of length 0 forever.
    """
    place = 12
    while frame.startswith(_JP2) and place < len(frame):
        if frame[place + 4 : place + 8] == b'jp2c':
            return
        size = int.from_bytes(frame[place : place + 4], 'big')
        if size < 8:
            raise UserError('is a DICOM file with a damaged JPEG 2000 image')
        place += size


def _jpeg_shape(frame):
    """Height, width and samples of a JPEG or JPEG-LS stream, or None."""
    place = 2
    while frame[:2] == b'\xff\xd8' and place + 10 <= len(frame):
        if frame[place] != 0xFF:
            return None
        marker, (size,) = frame[place + 1], struct.unpack_from('>H', frame, place + 2)
        if marker == 0xFF:  # fill bytes
            place += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (196, 200, 204)):
            return struct.unpack_from('>HHB', frame, place + 5)
        place += 2 + size
    return None


def _jpeg2000_shape(frame):
    """Height, width and samples of a JPEG 2000 stream, or None."""
    place = frame.find(b'\xff\x4f\xff\x51')
    if place < 0 or place + 42 > len(frame):
        return None
    right, bottom, left, top = struct.unpack_from('>4I', frame, place + 8)
    return bottom - top, right - left, struct.unpack_from('>H', frame, place + 40)[0]


def _decode_rle(dataset):
    """Decodes run lengths; Pillow's decoder never writes beyond the image."""
    from pydicom import encaps

    frame = encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    rows, columns, samples = (
        int(dataset[name].value) for name in ('Rows', 'Columns', 'SamplesPerPixel')
    )
    each = int(dataset.BitsAllocated) // 8
    count, *offsets = struct.unpack_from('<16I', frame)
    if count != samples * each or count > 15:
        raise dicom_display.refuse('another number of RLE segments')
    ends = [*offsets[1:count], len(frame)]
    planes = [
        np.asarray(
            Image.frombytes('L', (rows * columns, 1), frame[start:end], 'packbits', 'L')
        ).reshape(rows, columns)
        for start, end in zip(offsets[:count], ends, strict=True)
    ]
    # The highest byte of each sample comes first.
    signed = dataset.get('PixelRepresentation')
    kind = np.dtype((_SIGNED if signed else _NUMBERS)[8 * each]).newbyteorder('>')
    bands = [
        np.stack(planes[n : n + each], -1).view(kind)[..., 0]
        for n in range(0, count, each)
    ]
    values = bands[0] if samples == 1 else np.stack(bands, -1)
    return values.astype(kind.newbyteorder('='))
