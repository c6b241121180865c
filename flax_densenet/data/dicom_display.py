"""The display of a DICOM image's values: units, windows, tables, inversion.

A header is a data set of pydicom, but pydicom is not needed here.
"""

import dataclasses

import numpy as np

from flax_densenet.errors import UserError


@dataclasses.dataclass(frozen=True)
class Display:
    """How the values of a gray image become black to white, according to the file.

    Attributes:
      low, high: the values that become black and white without a window or table.
      window: center and width.
      function: function of the window: LINEAR, LINEAR_EXACT or SIGMOID.
      table: the VOI LUT: its first input, and its outputs from 0 to 1.
      inverted: the lowest value is white (MONOCHROME1).
    """

    low: float
    high: float
    window: tuple[float, float] | None = None
    function: str = 'LINEAR'
    table: tuple[int, np.ndarray] | None = None
    inverted: bool = False

    @property
    def is_stated(self) -> bool:
        """Whether the file has a window or a table."""
        return self.window is not None or self.table is not None

    def apply(
        self, values: np.ndarray, window: tuple[float, float] | None = None
    ) -> np.ndarray:
        """float32 from 0 (black) to 1 (white); a given window overrides the file's."""
        values = np.nan_to_num(values.astype(np.float32))
        if window is not None:
            shown = (values - window[0]) / (window[1] - window[0])
        elif self.table is not None:
            first, outputs = self.table
            place = np.clip(np.rint(values) - first, 0, len(outputs) - 1)
            shown = outputs[place.astype(np.int64)]
        elif self.window is not None:
            shown = self._by_window(values)
        else:
            shown = (values - self.low) / (self.high - self.low)
        shown = np.clip(shown, 0, 1).astype(np.float32)
        return 1 - shown if self.inverted else shown

    def _by_window(self, values):
        """The equations of the standard, part 3, C.11.2.1.2 and C.11.2.1.3."""
        center, width = self.window
        if self.function == 'SIGMOID':
            return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -50, 50)))
        if self.function == 'LINEAR_EXACT':
            return (values - center) / width + 0.5
        if width <= 1:  # a threshold
            return (values > center - 0.5).astype(np.float32)
        return (values - (center - 0.5)) / (width - 1) + 0.5


def refuse(why: str) -> UserError:
    """The error about a file of an unsupported kind."""
    return UserError(f'is a DICOM file of an unsupported kind ({why})')


def make(header) -> Display:
    """The display that a header of a gray image describes."""
    inverted = header.PhotometricInterpretation == 'MONOCHROME1'
    modality = find_table(header, 'ModalityLUTSequence')
    if modality is not None:
        low, high = 0.0, 2.0 ** modality[2] - 1
    else:
        slope, intercept = find_scale(header)
        stored, signed = int(header.BitsStored), bool(header.get('PixelRepresentation'))
        lowest = -(2 ** (stored - 1)) if signed else 0
        ends = (lowest, lowest + 2**stored - 1)
        low, high = sorted(end * slope + intercept for end in ends)
    window = tuple(
        _first_number(header.get(name)) for name in ('WindowCenter', 'WindowWidth')
    )
    table = find_table(header, 'VOILUTSequence')
    function = str(header.get('VOILUTFunction') or 'LINEAR').upper()
    stated = None not in window and np.isfinite(window).all() and window[1] > 0
    if stated and function not in ('LINEAR', 'LINEAR_EXACT', 'SIGMOID'):
        raise refuse('an unknown VOILUTFunction')
    if not low < high:
        raise refuse('no valid RescaleSlope')
    return Display(
        low,
        high,
        window if stated else None,
        function,
        table and (table[0], table[1] / (2.0 ** table[2] - 1)),
        inverted,
    )


def _first_number(value):
    """The first of several windows; None if there is none."""
    if value is None or value == '':
        return None
    if isinstance(value, list | tuple) or hasattr(value, '__iter__'):
        value = next(iter(value), None)
    return None if value is None else float(value)


def find_scale(header) -> tuple[float, float]:
    """Slope and intercept from stored values to the modality's unit."""
    slope = _first_number(header.get('RescaleSlope'))
    intercept = _first_number(header.get('RescaleIntercept'))
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    if not np.isfinite([slope, intercept]).all():
        raise refuse('no valid RescaleSlope')
    return slope, intercept


def find_table(header, name: str) -> tuple[int, np.ndarray, int] | None:
    """The first input, the outputs and their bits of a table in a sequence, or None."""
    items = header.get(name)
    if not items:
        return None
    count, first, bits = (int(number) for number in items[0].LUTDescriptor)
    count, signed = count or 2**16, header.get('PixelRepresentation')
    first -= 2**16 if signed and first >= 2**15 else 0
    content = items[0].LUTData
    if isinstance(content, bytes):
        kind = '<u2' if len(content) >= 2 * count else 'u1'
        content = np.frombuffer(content, kind)
    outputs = np.asarray(content, np.float64)[:count]
    if not 1 <= bits <= 16 or not len(outputs):
        raise ValueError
    return first, outputs, bits
