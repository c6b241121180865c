"""examples/web: what its tests need, and what its page shows."""

import base64
import io
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers import browsers
from helpers.paths import ROOT
from helpers.tiny_onnx import LABELS, probabilities

WEB = ROOT / 'examples' / 'web'
NODE = shutil.which('node')
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE is None, reason='node is not installed'),
    pytest.mark.skipif(browsers.CHROMIUM is None, reason='chromium is not installed'),
    pytest.mark.skipif(
        not (WEB / 'node_modules' / 'onnxruntime-web').exists(),
        reason='onnxruntime-web is not installed: npm install in examples/web',
    ),
]
# A JPEG is decoded by another program than here, and in full, where images.py reads a
# large one at a fraction of its size: so much may a probability differ, in points.
JPEG_BOUND = 0.5
# Of the same pixels: half a digit of what is shown, and another build of onnxruntime.
SAME_BOUND = 0.1


def make_transfer(tab, *paths):
    """Files as a drop or the clipboard brings them; the page is told to wait."""
    files = []
    for path in map(pathlib.Path, paths):
        files.append([path.name, base64.b64encode(path.read_bytes()).decode()])
    return tab.evaluate_handle(
        """(files) => {
          const transfer = new DataTransfer();
          for (const [name, text] of files) {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            transfer.items.add(new File([bytes], name));
          }
          document.getElementById('status').textContent = 'given';
          return transfer;
        }""",
        files,
    )


def drop(tab, *paths):
    """Lets files fall onto the page, and waits until it has nothing more to do."""
    transfer = make_transfer(tab, *paths)
    tab.dispatch_event('main', 'drop', {'dataTransfer': transfer})
    tab.wait_for_selector('#status:empty', state='attached')


def seen(tab):
    """What the page shows that the model gets, uint8 `[S, S, 3]`."""
    url = tab.evaluate("document.getElementById('seen').toDataURL()")
    png = io.BytesIO(base64.b64decode(url.partition(',')[2]))
    return np.asarray(Image.open(png).convert('RGB'))


def shown(tab):
    """Classes and percentages, in the order of the page."""
    names = tab.locator('#classes .name').all_text_contents()
    shares = tab.locator('#classes .share').all_text_contents()
    return {
        name: float(share.removesuffix('\xa0%'))
        for name, share in zip(names, shares, strict=True)
    }


def check(tab, model, image, bound):
    """The page names the classes of `probabilities`, to some points."""
    right = 100 * probabilities(model, image)
    found = shown(tab)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert len(found) == 5
    best = LABELS[right.argmax()]
    assert next(iter(found)) == best
    assert tab.text_content('#verdict') == f'Most likely {best}, {found[best]:.1f}\xa0%'
    for name, share in found.items():
        assert abs(share - right[LABELS.index(name)]) <= bound
    # The test can tell: another picture gets other numbers.
    other = 100 * probabilities(model, image[::-1, ::-1].copy())
    assert np.abs(other - right).max() > 2 * JPEG_BOUND
