"""Image files with 16 or more bits, which Pillow cannot write."""

import struct
import zlib

import numpy as np


def png(array: np.ndarray) -> bytes:
    """A 16-bit PNG from uint16 `[H, W, C]`: gray, gray and alpha, RGB or RGBA."""
    height, width, channels = array.shape
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in array)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack('>IIBBBBB', width, height, 16, kind, 0, 0, 0)
    parts = ((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data))
        + name
        + data
        + struct.pack('>I', zlib.crc32(name + data))
        for name, data in parts
    )


def tiff(array: np.ndarray, *, order='<', planar=1, packed=False, white_is_0=False):
    """The bytes of a TIFF with one strip (or plane), from `[H, W, C]` of any dtype.

    Args:
      order: `<` (Intel) or `>` (Motorola).
      planar: 2 stores a plane for each channel.
      packed: compressed with deflate.
    """
    height, width, channels = array.shape
    kind, size = array.dtype.kind, array.dtype.itemsize
    planes = np.moveaxis(array, -1, 0) if planar == 2 else [array]
    data = [plane.astype(f'{order}{kind}{size}').tobytes() for plane in planes]
    data = [zlib.compress(one) for one in data] if packed else data
    body, places = b'', []
    for one in data:
        places.append(8 + len(body))
        body += one + b'\0' * (len(one) % 2)
    each = {'u': 1, 'i': 2, 'f': 3}[kind]
    photometric = 2 if channels >= 3 else int(not white_is_0)
    entries = {
        **{256: [width], 257: [height], 258: [8 * size] * channels},
        **{259: [8 if packed else 1], 262: [photometric], 277: [channels]},
        **{278: [height], 284: [planar], 339: [each] * channels},
        **({338: [2]} if channels == 4 else {}),
        **{273: places, 279: [len(one) for one in data]},
    }
    extra, listed = b'', b''
    for tag, values in sorted(entries.items()):
        long = tag in (273, 279)
        raw = struct.pack(f'{order}{len(values)}{"I" if long else "H"}', *values)
        if len(raw) > 4:
            place = 8 + len(body) + len(extra)
            extra += raw
            raw = struct.pack(f'{order}I', place)
        head = struct.pack(f'{order}HHI', tag, 4 if long else 3, len(values))
        listed += head + raw.ljust(4, b'\0')
    mark = b'II*\0' if order == '<' else b'MM\0*'
    start = struct.pack(f'{order}I', 8 + len(body) + len(extra))
    count = struct.pack(f'{order}H', len(entries))
    return mark + start + body + extra + count + listed + bytes(4)
