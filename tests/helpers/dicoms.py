"""Small DICOM files."""

import io
import zlib

import numpy as np
import pydicom
from pydicom import dataset, encaps, uid

PATIENT = 'Invented^Patient^Name'


def make(pixels: np.ndarray, *, syntax=uid.ExplicitVRLittleEndian, frame=None, **tags):
    """The bytes of a DICOM file.

    Args:
      pixels: integers `[H, W]` or `[H, W, 3]`.
      frame: the encoded pixels, for compressed transfer syntaxes.
      tags: other elements, which can replace the default ones; None removes one.
    """
    made = dataset.Dataset()
    made.PatientName = PATIENT
    made.PatientID = 'invented-id'
    made.SOPClassUID = uid.SecondaryCaptureImageStorage
    made.SOPInstanceUID = uid.generate_uid()
    bits = 8 * pixels.dtype.itemsize
    made.Rows, made.Columns = pixels.shape[:2]
    made.BitsAllocated = made.BitsStored = bits
    made.HighBit, made.PixelRepresentation = bits - 1, int(pixels.dtype.kind == 'i')
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, 'MONOCHROME2'
    if pixels.ndim == 3:
        made.SamplesPerPixel, made.PhotometricInterpretation = 3, 'RGB'
        made.PlanarConfiguration = 0
    raw = pixels.astype(pixels.dtype.newbyteorder('<')).tobytes()
    made.PixelData = raw + b'\0' * (len(raw) % 2)
    if frame is not None:
        made.PixelData = encaps.encapsulate([frame])
    for name, value in tags.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    made['PixelData'].VR = 'OB' if bits == 8 or frame is not None else 'OW'
    made['PixelData'].is_undefined_length = frame is not None
    made.file_meta = dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    out = io.BytesIO()
    pydicom.dcmwrite(out, made, enforce_file_format=True)
    return out.getvalue()


def deflate(file: bytes) -> bytes:
    """Converts an explicit little endian file to the deflated transfer syntax."""
    name = str(uid.ExplicitVRLittleEndian).encode() + b'\0'
    place = file.index(name) - 4
    end = file.index(b'\x08\0\x16\0', place)
    deflated = str(uid.DeflatedExplicitVRLittleEndian).encode()
    head = file[: place + 2] + len(deflated).to_bytes(2, 'little') + deflated
    rest = file[place + 4 + len(name) : end]
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return head + rest + packer.compress(file[end:]) + packer.flush()


def sequence(count, first, bits, values):
    """A table for `ModalityLUTSequence` or `VOILUTSequence`."""
    item = dataset.Dataset()
    item.LUTDescriptor = [count, first, bits]
    item['LUTDescriptor'].VR = 'SS' if first < 0 else 'US'
    item.LUTData = np.asarray(values, '<u2').tobytes()
    item['LUTData'].VR = 'OW'
    return [item]


def run_lengths(pixels: np.ndarray) -> bytes:
    """An RLE frame of unsigned integers, with runs of literal bytes."""
    planes = pixels.astype(pixels.dtype.newbyteorder('>'))
    planes = planes.reshape(planes.size, 1).view(np.uint8)
    channels = pixels.shape[-1] if pixels.ndim == 3 else 1
    segments = []
    for channel in range(channels):
        for byte in range(pixels.dtype.itemsize):
            raw = planes[channel::channels, byte].tobytes()
            parts = (raw[n : n + 128] for n in range(0, len(raw), 128))
            one = b''.join(bytes([len(part) - 1]) + part for part in parts)
            segments.append(one + b'\0' * (len(one) % 2))
    places = np.cumsum([64, *map(len, segments)])[:-1]
    header = np.zeros(16, '<u4')
    header[: 1 + len(segments)] = [len(segments), *places]
    return header.tobytes() + b''.join(segments)
