"""examples/web: many pictures at once, and the camera."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from flax_densenet.data import images
from helpers import browsers
from helpers.marks import exhaustive_after
from helpers.tiny_onnx import LABELS, SIZE, probabilities, write_onnx
from helpers.web_example import JPEG_BOUND, MARKS, drop, shown

for name in ('onnx', 'onnxruntime', 'playwright'):
    pytest.importorskip(name)
pytestmark = MARKS


def test_many_at_once(opened, photo, tmp_path):
    """A row for each, in the order given; one that is no image stops nothing."""
    labels = ['ants, red', *LABELS[1:]]
    model = write_onnx(tmp_path / 'model.onnx', labels=labels)
    turned, text = tmp_path / 'a "b", c.png', tmp_path / 'notes.jpg'
    Image.open(photo).transpose(Image.Transpose.ROTATE_180).save(turned)
    text.write_text('no image')
    paths = [turned, text, photo]
    with opened(model) as tab:
        drop(tab, *paths)
        assert tab.text_content('#many-title') == '3 pictures'
        assert tab.locator('#error').is_hidden() and tab.locator('#result').is_hidden()
        rows = tab.locator('#rows tr')
        cells = [rows.nth(n).locator('td').all_text_contents() for n in range(3)]
        assert [row[0] for row in cells] == [path.name for path in paths]
        assert cells[1][1] == 'notes.jpg is not an image that this browser can read.'
        with tab.expect_download() as saved:
            tab.get_by_role('button', name='Download CSV').click()
        assert saved.value.suggested_filename == 'predictions.csv'
        with open(saved.value.path(), encoding='utf-8-sig', newline='') as file:
            lines = list(csv.DictReader(file))
        assert [line['file'] for line in lines] == [path.name for path in paths]
        assert lines[1]['class'] == '' and lines[1]['error'] == cells[1][1]
        for place in (0, 2):
            image = images.load_image(paths[place], images.Preparation(SIZE))
            right = probabilities(model, image)
            found = [float(lines[place][f'probability_{label}']) for label in labels]
            np.testing.assert_allclose(found, right, atol=JPEG_BOUND / 100)
            best = labels[int(right.argmax())]
            assert lines[place]['class'] == cells[place][1] == best
            share = float(cells[place][2].removesuffix('\xa0%'))
            assert abs(share - 100 * right.max()) <= JPEG_BOUND
        # A row opens its picture; another picture alone takes the table away.
        tab.get_by_role('button', name='china.jpg').click()
        tab.wait_for_selector('#result:visible')
        assert tab.locator('#many').is_visible()
        drop(tab, photo)
        assert tab.locator('#many').is_hidden()


_WAIT_FOR_END = """
async (track) => {
  for (let turn = 0; turn < 3000 && track.readyState !== 'ended'; turn++) {
    await new Promise((done) => setTimeout(done, 20));
  }
  return track.readyState;
}
"""


def test_the_camera(opened, tmp_path):
    """Its stream is judged as it runs; a picture of it stays, and it is let go."""
    model = write_onnx(tmp_path / 'model.onnx')
    with opened(model) as tab:
        button = tab.get_by_role('button', name='Use the camera')
        for name in ('Close', 'Take a picture'):
            button.click()
            tab.wait_for_selector('#live:text-matches("^[a-z]+, [0-9]")')
            track = tab.evaluate_handle(
                "document.getElementById('video').srcObject.getTracks()[0]"
            )
            tab.get_by_role('button', name=name).click()
            assert tab.evaluate(_WAIT_FOR_END, track) == 'ended'
            assert tab.locator('#viewfinder').is_hidden()
            if name == 'Close':
                assert tab.locator('#result').is_hidden()
        tab.wait_for_selector('#result:visible')
        width = tab.evaluate("document.getElementById('picture').naturalWidth")
        assert width >= 320 and len(shown(tab)) == 5


def test_no_button_without_a_camera(opened, tmp_path):
    none = 'navigator.mediaDevices.enumerateDevices = async () => []'
    with opened(write_onnx(tmp_path / 'model.onnx'), script=none) as tab:
        assert tab.get_by_role('button', name='Choose pictures').is_visible()
        assert tab.locator('#camera').is_hidden()


@pytest.mark.skipif(
    not browsers.AXE.exists(),
    reason='axe-core is not installed: npm install in examples/web',
)
@pytest.mark.parametrize('scheme', exhaustive_after(1, ['dark', 'light']))
def test_accessible(opened, photo, tmp_path, scheme):
    model = write_onnx(tmp_path / 'model.onnx')
    other = tmp_path / 'other.jpg'
    shutil.copy(photo, other)
    notes = tmp_path / 'notes.jpg'
    notes.write_text('no image')
    with opened(model, color_scheme=scheme) as tab:
        drop(tab, photo, other, notes)
        tab.get_by_role('button', name='other.jpg').click()
        tab.wait_for_selector('#result:visible')
        assert browsers.violations(tab) == []
        tab.get_by_role('button', name='Use the camera').click()
        tab.wait_for_selector('#shoot:enabled')
        assert browsers.violations(tab) == []
        tab.keyboard.press('Escape')
        tab.wait_for_selector('#viewfinder', state='hidden')
