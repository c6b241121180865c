"""examples/web: a picture that is dropped on the page gets the model's own answer."""

import base64
import contextlib
import io
import json
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageCms

from flax_densenet.data import images
from helpers import browsers
from helpers.paths import ROOT
from helpers.tiny_onnx import LABELS, SIZE, probabilities, write_onnx

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('playwright')
WEB = ROOT / 'examples' / 'web'
NODE = shutil.which('node')
pytestmark = [
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
ISOLATED = {
    'Cross-Origin-Opener-Policy': 'same-origin',
    'Cross-Origin-Embedder-Policy': 'require-corp',
}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """The page, without a model."""
    folder = tmp_path_factory.mktemp('web') / 'dist'
    command = [NODE, 'build.js', str(folder)]
    subprocess.run(command, cwd=WEB, check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture(scope='module')
def chromium():
    with browsers.launched() as browser:
        yield browser


@pytest.fixture
def opened(chromium, built, tmp_path):
    """Opens the page beside a model; afterwards nobody else was asked for anything."""

    @contextlib.contextmanager
    def open_page(model=None, *, headers=(), complaints=0, **options):
        folder = tmp_path / 'served'
        shutil.copytree(built, folder)
        if model:
            shutil.copy(model, folder / 'model.onnx')
        said, asked = [], []
        with (
            browsers.served(folder, dict(headers)) as server,
            contextlib.closing(chromium.new_context(**options)) as context,
        ):
            own = f'http://127.0.0.1:{server.server_port}/'
            context.on('request', lambda request: asked.append(request))
            tab = context.new_page()
            tab.set_default_timeout(30_000)
            tab.on('console', lambda message: said.append(message.text))
            tab.on('pageerror', lambda error: said.append(str(error)))
            tab.goto(own)
            tab.wait_for_selector('#status:empty', state='attached')
            yield tab
            assert tab.evaluate('document.documentElement.scrollWidth <= innerWidth')
        outside = [
            r.url for r in asked if not r.url.startswith((own, 'blob:', 'data:'))
        ]
        assert outside == []
        assert {line.split()[0] for line in server.asked} == {'GET'}
        assert len(said) == complaints, said

    return open_page


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


@pytest.fixture(scope='module')
def photo():
    """A photograph of 640 by 427 pixels, as its camera wrote it."""
    sklearn_datasets = pytest.importorskip('sklearn.datasets')
    folder = pathlib.Path(sklearn_datasets.__file__).parent / 'images'
    return folder / 'china.jpg'


def rotate(photo, path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).rotate(90, expand=True).save(path, exif=exif, quality=95)
    return path


def test_resizes_as_pillow(tmp_path):
    """To the bit: both rules and filters, larger and smaller, wide, gray.

    Not very tall ones, and to one level if the result is not square: there Pillow 13
    begins with the columns, older ones with rows.
    """
    rng = np.random.default_rng(0)
    cases, expected, bounds = [], [], []
    for height, width in ((90, 61), (61, 90), (20, 17), (32, 32), (33, 40), (33, 257)):
        pixels = rng.integers(0, 256, (height, width, 4), np.uint8)
        pixels[..., 3] = 255
        for way in (
            {'resize': 'stretch'},
            {'resize': 'stretch', 'interpolation': 'bicubic', 'channels': 1},
            {'resize': 'crop', 'crop_fraction': 0.875},
            {'resize': 'crop', 'crop_fraction': 0.95, 'interpolation': 'bicubic'},
            {'resize': 'crop', 'channels': 1},
            {'size': (SIZE, SIZE // 2), 'resize': 'crop', 'crop_fraction': 0.9},
            {'size': (SIZE // 2, SIZE), 'resize': 'stretch'},
        ):
            how = images.Preparation(**{'size': SIZE, **way})
            image = Image.fromarray(pixels).convert('RGB')
            expected.append(images.prepare_image(image, how).ravel().astype(int))
            bounds.append(how.shape[0] != how.shape[1])
            model = {
                'height': how.shape[0],
                'width': how.shape[1],
                'resize': how.resize,
                'cropFraction': how.crop_fraction,
                'interpolation': how.interpolation,
                'channels': how.channels,
            }
            size = {'width': width, 'height': height}
            cases.append([{'data': pixels.ravel().tolist()} | size, model])
    code = f"""
      import {{ prepare }} from '{(WEB / 'page' / 'prepare.js').as_uri()}';
      import {{ readFileSync }} from 'node:fs';
      const cases = JSON.parse(readFileSync(0));
      console.log(JSON.stringify(cases.map(([image, model]) =>
        [...prepare(image, model)])));
    """
    command = [NODE, '--input-type=module', '--eval', code]
    given = json.dumps(cases)
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for found, wanted, most in zip(
        json.loads(done.stdout), expected, bounds, strict=True
    ):
        assert len(found) == len(wanted) and np.abs(wanted - found).max() <= most


def test_the_same_pixels(opened, photo, tmp_path):
    """A picture of the model's own size: to a tenth of a point."""
    model = write_onnx(tmp_path / 'model.onnx', resize='crop', crop_fraction=0.875)
    path = tmp_path / 'same.png'
    Image.open(photo).resize((SIZE, SIZE)).save(path)
    image = images.load_image(path, images.Preparation(SIZE))
    with opened(model) as tab:
        drop(tab, path)
        np.testing.assert_array_equal(seen(tab), image)
        check(tab, model, image, SAME_BOUND)


@pytest.mark.parametrize('way', ['stretch', 'crop', 'bicubic', 'gray'])
def test_photographs(opened, photo, tmp_path, way):
    """As a PNG the pixels are ours, as a JPEG nearly, also of one on its side."""
    options = {
        'stretch': {'resize': 'stretch'},
        'crop': {'resize': 'crop', 'crop_fraction': 0.875},
        'bicubic': {'resize': 'crop', 'interpolation': 'bicubic'},
        'gray': {'resize': 'crop', 'channels': 1},
    }[way]
    model = write_onnx(tmp_path / 'model.onnx', **options)
    how = images.Preparation(SIZE, **options)
    png = tmp_path / 'photo.png'
    Image.open(photo).save(png)
    turned = rotate(photo, tmp_path / 'turned.jpg')
    with opened(model) as tab:
        for path in (png, photo, turned):
            image = images.load_image(path, how)
            drop(tab, path)
            off = np.abs(seen(tab).astype(int) - image)
            exact = path == png
            assert off.max() == 0 if exact else off.mean() < 1.5
            check(tab, model, image, SAME_BOUND if exact else JPEG_BOUND)
        assert tab.locator('#square').is_visible() == (way != 'stretch')


def test_clear_places_are_white(opened, photo, tmp_path):
    model = write_onnx(tmp_path / 'model.onnx')
    image = Image.open(photo).resize((SIZE, SIZE))
    image.putalpha(Image.linear_gradient('L').resize((SIZE, SIZE)))
    path = tmp_path / 'clear.png'
    image.save(path)
    ours = images.load_image(path, images.Preparation(SIZE)).astype(int)
    with opened(model) as tab:
        drop(tab, path)
        assert np.abs(seen(tab) - ours).max() <= 1


def test_color_profiles_stay_out(opened, photo, tmp_path):
    """One that swaps red and blue: no canvas of its own accord lets it be."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    for old, new in ((b'rXYZ', b'????'), (b'bXYZ', b'rXYZ'), (b'????', b'bXYZ')):
        assert profile.count(old) == 1
        profile = profile.replace(old, new)
    path = tmp_path / 'profile.png'
    Image.open(photo).resize((SIZE, SIZE)).save(path, icc_profile=profile)
    with opened(write_onnx(tmp_path / 'model.onnx')) as tab:
        drop(tab, path)
        image = images.load_image(path, images.Preparation(SIZE))
        np.testing.assert_array_equal(seen(tab), image)


def test_very_large(opened, photo, tmp_path):
    """More than 16 million pixels, which the canvas makes smaller first."""
    way = {'resize': 'crop', 'crop_fraction': 0.875}
    model = write_onnx(tmp_path / 'model.onnx', **way)
    path = tmp_path / 'large.jpg'
    Image.open(photo).resize((5001, 3337)).save(path)
    image = images.load_image(path, images.Preparation(SIZE, **way))
    with opened(model) as tab:
        drop(tab, path)
        assert np.abs(seen(tab).astype(int) - image).mean() < 1.5
        check(tab, model, image, JPEG_BOUND)


def test_several_labels(opened, photo, tmp_path):
    model = write_onnx(tmp_path / 'model.onnx', multi_label=True)
    with opened(model) as tab:
        drop(tab, photo)
        assert tab.text_content('#verdict') == 'What is in it'
        assert sum(shown(tab).values()) > 110


def test_threads_where_the_server_isolates_the_page(opened, photo, tmp_path):
    model = write_onnx(tmp_path / 'model.onnx')
    image = images.load_image(photo, images.Preparation(SIZE))
    with opened(model) as tab:
        assert ', 1 thread,' in tab.text_content('#facts')
    shutil.rmtree(tmp_path / 'served')
    with opened(model, headers=ISOLATED) as tab:
        threads = min(4, tab.evaluate('navigator.hardwareConcurrency'))
        assert f', {threads} thread' in tab.text_content('#facts')
        drop(tab, photo)
        check(tab, model, image, JPEG_BOUND)


def test_what_is_no_image(opened, photo, tmp_path):
    model = write_onnx(tmp_path / 'model.onnx')
    text = tmp_path / 'notes.jpg'
    text.write_text('no image')
    with opened(model) as tab:
        drop(tab, text)
        error = 'notes.jpg is not an image that this browser can read.'
        assert tab.text_content('#error') == error
        assert tab.locator('#result').is_hidden()
        drop(tab, photo)
        assert tab.locator('#error').is_hidden()
        assert tab.locator('#result').is_visible()


def test_without_a_model(opened, photo, tmp_path):
    """The page says what is missing, and takes a model that is dropped."""
    model = write_onnx(tmp_path / 'bees.onnx')
    with opened(complaints=1) as tab:  # the browser's own line on the missing file
        assert tab.text_content('#error').startswith('There is no model yet')
        drop(tab, photo)
        assert tab.locator('#error').is_visible()
        assert tab.locator('#result').is_hidden()
        assert tab.get_by_role('button').all_text_contents() == ['Choose a model']
        drop(tab, model)  # and the picture of before is classified
        assert tab.locator('#error').is_hidden()
        assert tab.get_by_role('button', name='Choose a picture').is_visible()
        assert 'bees.onnx' in tab.text_content('#facts')
        check(
            tab, model, images.load_image(photo, images.Preparation(SIZE)), JPEG_BOUND
        )


@pytest.mark.parametrize(
    ('made', 'reason'),
    [
        ({'dtype': 'float'}, 'its image is float32 [batch, 32, 32, 3], not uint8'),
        ({'image_size': 64}, 'not uint8 [batch, 64, 64, 3]'),
        ({'outputs': 4}, 'its probabilities are float32 [batch, 4] for 6 classes'),
        ({'resize': None}, 'says nothing of its resize'),
        ({'resize': 'fold'}, 'has a resize that cannot be used: fold'),
        ({'crop_fraction': 0}, 'has a crop_fraction that cannot be used: 0'),
    ],
)
def test_models_of_others(opened, photo, tmp_path, made, reason):
    """The reason is told in a line, and the model of before goes on."""
    good = write_onnx(tmp_path / 'model.onnx')
    other = write_onnx(tmp_path / 'other.onnx', **made)
    with opened(good) as tab:
        drop(tab, other)
        error = tab.text_content('#error')
        assert error.startswith('other.onnx') and reason in error
        assert '\n' not in error
        drop(tab, photo)
        assert tab.locator('#error').is_hidden()
        assert len(shown(tab)) == 5


def test_damaged_models(opened, photo, tmp_path):
    good = write_onnx(tmp_path / 'model.onnx')
    whole = pathlib.Path(good).read_bytes()
    cut, none = tmp_path / 'cut.onnx', tmp_path / 'none.onnx'
    cut.write_bytes(whole[: len(whole) // 2])
    none.write_bytes(photo.read_bytes())
    with opened(good) as tab:
        for path in (cut, none):
            drop(tab, path)
            error = f'{path.name} is not a whole .onnx file.'
            assert tab.text_content('#error') == error


def test_chosen_and_pasted(opened, photo, tmp_path):
    model = write_onnx(tmp_path / 'model.onnx')
    png = tmp_path / 'photo.png'
    Image.open(photo).transpose(Image.Transpose.ROTATE_180).save(png)
    with opened(model) as tab:
        with tab.expect_file_chooser() as chooser:
            tab.get_by_role('button', name='Choose a picture').click()
        chooser.value.set_files(photo)
        tab.wait_for_selector('#verdict:not(:empty)')
        chosen = shown(tab)
        transfer = make_transfer(tab, png)
        tab.evaluate(
            """(clipboardData) => document.dispatchEvent(
              new ClipboardEvent('paste', { clipboardData }))""",
            transfer,
        )
        tab.wait_for_selector('#status:empty', state='attached')
        assert shown(tab) != chosen
        image = images.load_image(png, images.Preparation(SIZE))
        check(tab, model, image, SAME_BOUND)


def test_the_page_itself_may_send_nothing(opened, tmp_path):
    """Its policy, which the browser holds, forbids other hosts."""
    model = write_onnx(tmp_path / 'model.onnx')
    with opened(model, complaints=2) as tab:
        failed = tab.evaluate(
            "fetch('http://127.0.0.2:9/', { method: 'POST', body: 'x' })"
            '.then(() => null, String)'
        )
        assert 'TypeError' in failed


@pytest.mark.parametrize('width', [1100, 320])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_schemes_and_widths(opened, photo, tmp_path, scheme, width):
    """`opened` looks for what is wider than the screen."""
    labels = ['a class with a very long name, or several', *LABELS[1:]]
    model = write_onnx(tmp_path / 'model.onnx', labels=labels)
    viewport = {'width': width, 'height': 800}
    with opened(model, color_scheme=scheme, viewport=viewport) as tab:
        drop(tab, photo)
        tab.click('summary')
        colors = tab.evaluate(
            "['backgroundColor', 'color'].map((one) => "
            'getComputedStyle(document.body)[one])'
        )
        bright = [sum(map(int, c[4:-1].split(','))) > 384 for c in colors]
        assert bright == ([True, False] if scheme == 'light' else [False, True])
