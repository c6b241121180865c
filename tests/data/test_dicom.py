"""DICOM files: values, windows, tables, color, and what is refused."""

import glob
import io
import logging
import os

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import pixels as pixels_lib
from pydicom import uid

from flax_densenet import UserError
from flax_densenet.data import dataset, dicom, image_formats, images, listing, notes
from flax_densenet.data.packed import writer
from flax_densenet.inference import input_files
from helpers import dicoms

DEEP = images.Preparation(bit_depth=16)
CT = np.linspace(-1000, 2000, 20 * 24).reshape(20, 24).astype(np.int16)


def load(file, **fields):
    """As numbers from 0 to 1."""
    found = images.load_image(file, images.Preparation(bit_depth=16, **fields))
    return found[..., 0] / 65535


def as_pydicom_shows(file):
    """With pydicom's own functions; the ends of its range become 0 and 1."""
    header = pydicom.dcmread(io.BytesIO(file))
    values = pixels_lib.apply_modality_lut(header.pixel_array, header)
    shown = pixels_lib.apply_voi_lut(values, header).astype(float)
    if 'VOILUTSequence' in header:
        return shown / (2 ** header.VOILUTSequence[0].LUTDescriptor[2] - 1)
    slope, intercept = header.RescaleSlope, header.RescaleIntercept
    low, high = (end * slope + intercept for end in (-32768, 32767))
    return (shown - low) / (high - low)


@pytest.mark.parametrize(
    'tags',
    [
        dict(WindowCenter=40, WindowWidth=400),
        dict(WindowCenter=[40, 300], WindowWidth=[400, 1500]),
        dict(WindowCenter=40, WindowWidth=400, VOILUTFunction='LINEAR_EXACT'),
        dict(WindowCenter=40, WindowWidth=400, VOILUTFunction='SIGMOID'),
        dict(VOILUTSequence=dicoms.sequence(256, -100, 12, range(0, 4096, 16))),
    ],
    ids=['linear', 'several', 'exact', 'sigmoid', 'table'],
)
@pytest.mark.filterwarnings('ignore:Applying a VOI LUT')
def test_gray_is_shown_as_pydicom_does(tags):
    file = dicoms.make(CT, RescaleSlope=2, RescaleIntercept=-24, **tags)
    expected = as_pydicom_shows(file)
    assert expected.std() > 0.1
    np.testing.assert_allclose(load(file), expected, atol=2e-4)
    inverse = dicoms.make(
        CT,
        RescaleSlope=2,
        RescaleIntercept=-24,
        PhotometricInterpretation='MONOCHROME1',
        **tags,
    )
    np.testing.assert_allclose(load(inverse), 1 - expected, atol=2e-4)
    # A window of the user comes before the file's, in the modality's unit.
    shown = np.clip((CT * 2.0 - 24 + 500) / 1500, 0, 1)
    np.testing.assert_allclose(load(file, window=(-500, 1000)), shown, atol=2e-5)
    reduced = images.load_image(file, images.Preparation())[..., 0]
    np.testing.assert_allclose(reduced / 255, expected, atol=0.003)


def test_a_table_of_the_modality():
    stored = np.arange(64, dtype=np.uint8).reshape(8, 8)
    table = dicoms.sequence(32, 8, 16, np.arange(32) * 2000)
    file = dicoms.make(stored, ModalityLUTSequence=table)
    expected = np.clip(stored.astype(int) - 8, 0, 31) * 2000 / 65535
    np.testing.assert_allclose(load(file), expected, atol=1e-5)


def test_the_range_of_stored_bits_without_a_window():
    stored = np.arange(4096, step=8, dtype=np.uint16).reshape(16, 32)
    above = stored | 0xF000  # overlays, which are not part of the values
    file = dicoms.make(above, BitsStored=12, HighBit=11)
    np.testing.assert_allclose(load(file), stored / 4095, atol=1e-5)
    signed = (stored.astype(np.int16) - 2048) & 0x0FFF
    file = dicoms.make(
        signed.astype(np.int16), BitsStored=12, HighBit=11, PixelRepresentation=1
    )
    np.testing.assert_allclose(load(file), stored / 4095, atol=1e-5)


def test_color():
    rgb = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    np.testing.assert_array_equal(
        images.load_image(dicoms.make(rgb), images.Preparation()), rgb
    )
    np.testing.assert_array_equal(
        images.load_image(dicoms.make(rgb), DEEP), rgb * 257.0
    )
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1)).reshape(12, 10, 3)
    file = dicoms.make(planes, PlanarConfiguration=1)
    np.testing.assert_array_equal(images.load_image(file, images.Preparation()), rgb)
    ybr = pixels_lib.convert_color_space(rgb, 'RGB', 'YBR_FULL')
    file = dicoms.make(ybr, PhotometricInterpretation='YBR_FULL')
    found = images.load_image(file, images.Preparation())
    assert np.abs(found - rgb.astype(float)).max() <= 3
    deep = rgb.astype(np.uint16) * 257
    found = images.load_image(dicoms.make(deep), images.Preparation())
    np.testing.assert_array_equal(found, rgb)


def jpeg(image, kind='JPEG', **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_compressed_transfer_syntaxes():
    smooth = np.add.outer(np.arange(32), 2 * np.arange(40)).astype(np.uint8)
    color = np.stack([smooth, smooth[::-1], 255 - smooth], -1)
    for frame, syntax, stored, atol in (
        (dicoms.run_lengths(smooth), uid.RLELossless, smooth, 0),
        (dicoms.run_lengths(CT.view(np.uint16)), uid.RLELossless, CT, 0),
        (dicoms.run_lengths(color), uid.RLELossless, color, 0),
        (jpeg(Image.fromarray(smooth), quality=95), uid.JPEGBaseline8Bit, smooth, 4),
        (
            jpeg(Image.fromarray(smooth), 'JPEG2000', no_jp2=True),
            *(uid.JPEG2000Lossless, smooth, 0),
        ),
    ):
        file = dicoms.make(stored, syntax=syntax, frame=frame)
        found = images.load_image(file, DEEP)
        expected = images.load_image(dicoms.make(stored), DEEP)
        assert expected.std() > 100
        assert np.abs(found - expected.astype(float)).max() <= atol * 257, syntax.name


def test_a_deflated_file(monkeypatch):
    plain = dicoms.make(CT)
    file = dicoms.deflate(plain)
    np.testing.assert_array_equal(load(file), load(plain))
    monkeypatch.setattr(dicom, '_MOST_INFLATED', 1000)
    with pytest.raises(UserError, match='deflated DICOM file of more than'):
        load(file)


@pytest.mark.parametrize(
    ('tags', 'reason'),
    [
        (dict(NumberOfFrames=3), r'of 3 frames \(NumberOfFrames\)'),
        (dict(Rows=0), 'without an image'),
        (dict(Rows=60_000, Columns=60_000), '3.6e\\+03 million pixels'),
        (dict(Rows=2000), 'cannot be decoded'),
        (dict(BitsAllocated=1), '1 bits a value'),
        (dict(BitsStored=20), 'BitsStored'),
        (dict(SamplesPerPixel=2), 'SamplesPerPixel'),
        (dict(RescaleSlope=0), 'RescaleSlope'),
        (dict(VOILUTFunction='X', WindowCenter=1, WindowWidth=2), 'VOILUTFunction'),
        (dict(PixelData=b''), 'cannot be decoded'),
    ],
)
def test_what_is_refused(tags, reason, tmp_path):
    (tmp_path / 'x.dcm').write_bytes(dicoms.make(CT, **tags))
    for file in (str(tmp_path / 'x.dcm'), (tmp_path / 'x.dcm').read_bytes()):
        with pytest.raises(UserError, match=reason) as caught:
            images.load_image(file, DEEP)
        assert dicoms.PATIENT not in str(caught.value)


def test_compressed_images_of_another_size_are_not_decoded():
    """The header's size was checked, not that of what the decoder would make."""
    small = np.zeros((8, 8), np.uint8)
    for kind, syntax in (
        ('JPEG', uid.JPEGBaseline8Bit),
        ('JPEG2000', uid.JPEG2000Lossless),
    ):
        frame = jpeg(Image.new('L', (4000, 9)), kind)
        with pytest.raises(UserError, match='not of the size in its header'):
            images.load_image(dicoms.make(small, syntax=syntax, frame=frame), DEEP)
    lossless = uid.JPEGLosslessSV1
    frame = jpeg(Image.new('L', (8, 8)))
    with pytest.raises(UserError, match=r'JPEG Lossless.*pip install pylibjpeg'):
        images.load_image(dicoms.make(small, syntax=lossless, frame=frame), DEEP)


def test_files_that_come_with_pydicom():
    """Each is read, or refused in a line."""
    folder = os.path.join(os.path.dirname(pydicom.__file__), 'data', 'test_files')
    files = sorted(glob.glob(f'{folder}/*.dcm'))
    read = 0
    for path in files:
        reason = images.check_image(path, decode=True)
        read += reason is None
        assert reason is None or '\n' not in reason
    assert len(files) > 40 and read > len(files) / 2


def write_classes(folder, **tags):
    for number, name in enumerate('ab'):
        (folder / name).mkdir()
        for n in range(4):
            values = CT + np.int16(100 * n + 400 * number)
            (folder / name / f'{n}.dcm').write_bytes(dicoms.make(values, **tags))
    return f'folder:{folder}'


def test_folders_of_files_with_and_without_windows(tmp_path, capsys):
    (tmp_path / 'with').mkdir()
    (tmp_path / 'without').mkdir()
    source = write_classes(tmp_path / 'with', WindowCenter=40, WindowWidth=400)
    found = dataset.load_source(source, image_size=8).train
    assert found.preparation.window is None and found.preparation.bit_depth == 16
    assert 'by the window of each file' in capsys.readouterr().out
    source = write_classes(tmp_path / 'without')
    found = dataset.load_source(source, image_size=8).train
    low, high = found.preparation.window
    assert -1100 < low < -900 and 2300 < high < 2800
    assert 'data.window=(' in capsys.readouterr().out
    assert found[0]['image'].dtype == np.uint16 and np.ptp(found[0]['image']) > 20_000


def test_files_without_endings(tmp_path, monkeypatch):
    """As scanners and archives name them; other files need an ending."""
    files = {name: dicoms.make(CT) for name in ('IM0001', '1.2.840.113619.2', 'x.txt')}
    files['photo'] = dicoms.make(CT)[128:]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    passed = notes.Passed()
    found = listing.image_files(str(tmp_path), passed)
    assert [os.path.basename(path) for path in found] == ['1.2.840.113619.2', 'IM0001']
    assert passed.endings == {'.txt': 1, 'no ending': 1}
    assert sorted(input_files.find([str(tmp_path)])) == found
    monkeypatch.setattr(dicom, 'is_installed', lambda: False)
    assert not listing.image_files(str(tmp_path))


def test_nothing_of_the_patient_is_told(tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    file = dicoms.make(CT)
    (tmp_path / 'x.dcm').write_bytes(file)
    with image_formats.open_file(str(tmp_path / 'x.dcm')) as image:
        image.load()
        assert 'Invented' not in repr(vars(image))
    for place in range(300, len(file) - 900, 7):  # damaged headers
        broken = file[:place] + b'\xff' + file[place + 1 :]
        reason = images.check_image(broken, decode=True) or ''
        assert 'Invented' not in reason and 'invented' not in reason
    out = capsys.readouterr()
    assert 'nvented' not in caplog.text + out.out + out.err


def test_packs_hold_pixels_alone(tmp_path):
    table = dicoms.sequence(256, -100, 12, range(0, 4096, 16))
    table[0].LUTExplanation = dicoms.PATIENT
    for name, tags in (('a', dict(VOILUTSequence=table)), ('b', dict(WindowWidth=90))):
        (tmp_path / 'in' / name).mkdir(parents=True)
        for n in range(3):
            file = dicoms.make(CT + np.int16(n), WindowCenter=n, **tags)
            assert dicoms.PATIENT.encode() in file
            (tmp_path / 'in' / name / f'{n}.dcm').write_bytes(file)
    writer.pack(f'folder:{tmp_path / "in"}', str(tmp_path / 'out'))
    for path in (tmp_path / 'out').rglob('*'):
        assert not path.is_file() or b'nvented' not in path.read_bytes()
    before, after = (
        dataset.load_source(f'{kind}:{tmp_path / folder}', image_size=8)
        for kind, folder in (('folder', 'in'), ('packed', 'out'))
    )
    assert after.train.preparation == before.train.preparation
    assert len(after.train) > 3
    for one, other in zip(before.train, after.train, strict=True):
        np.testing.assert_array_equal(one['image'], other['image'])
    plain = dicoms.make(CT)
    for file in (plain, dicoms.deflate(plain)):
        np.testing.assert_array_equal(load(dicom.keep_pixels(file)), load(plain))


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'pydicom', None)
    with pytest.raises(UserError, match=r"pip install 'flax_densenet\[medical\]'"):
        images.load_image(dicoms.make(CT), DEEP)
    passed = notes.Passed()
    passed.add_file('x.dcm')
    assert 'flax_densenet[medical]' in passed.line()


@pytest.mark.parametrize('size', [0, 1, 7])
def test_boxes_that_lead_nowhere(size):
    """pydicom would step over a box without a length forever."""
    start = b'\0\0\0\x0cjP  \r\n\x87\n'
    box = size.to_bytes(4, 'big') + b'free'
    with pytest.raises(UserError, match='damaged JPEG 2000 image'):
        dicom._check_boxes(start + box + bytes(20))
    dicom._check_boxes(start + (8).to_bytes(4, 'big') + b'free' + bytes(4) + b'jp2c')
    dicom._check_boxes(b'\xff\x4f\xff\x51' + bytes(20))
