"""examples/web: a picture that is dropped on the page gets the model's own answer."""

import json
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageCms

from flax_densenet.data import images
from helpers.marks import exhaustive_after
from helpers.tiny_onnx import LABELS, SIZE, write_onnx
from helpers.web_example import (
    JPEG_BOUND,
    MARKS,
    NODE,
    SAME_BOUND,
    WEB,
    check,
    drop,
    make_transfer,
    seen,
    shown,
)

for name in ('onnx', 'onnxruntime', 'playwright'):
    pytest.importorskip(name)
pytestmark = MARKS
ISOLATED = {
    'Cross-Origin-Opener-Policy': 'same-origin',
    'Cross-Origin-Embedder-Policy': 'require-corp',
}


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


@pytest.mark.parametrize(
    'way', exhaustive_after(2, ['crop', 'gray', 'stretch', 'bicubic'])
)
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
        assert tab.get_by_role('button', name='Choose pictures').is_visible()
        assert 'bees.onnx' in tab.text_content('#facts')
        check(
            tab, model, images.load_image(photo, images.Preparation(SIZE)), JPEG_BOUND
        )


@pytest.mark.parametrize(
    ('made', 'reason'),
    exhaustive_after(
        2,
        [
            ({'dtype': 'float'}, 'its image is float32 [batch, 32, 32, 3], not uint8'),
            ({'resize': 'fold'}, 'has a resize that cannot be used: fold'),
            ({'image_size': 64}, 'not uint8 [batch, 64, 64, 3]'),
            ({'outputs': 4}, 'its probabilities are float32 [batch, 4] for 6 classes'),
            ({'resize': None}, 'says nothing of its resize'),
            ({'crop_fraction': 0}, 'has a crop_fraction that cannot be used: 0'),
        ],
    ),
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
            tab.get_by_role('button', name='Choose pictures').click()
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


@pytest.mark.parametrize(
    ('scheme', 'width'),
    exhaustive_after(
        2, [('light', 1100), ('dark', 320), ('light', 320), ('dark', 1100)]
    ),
)
def test_schemes_and_widths(opened, photo, tmp_path, scheme, width):
    """`opened` looks for what is wider than the screen."""
    labels = ['a class with a very long name, or several', *LABELS[1:]]
    model = write_onnx(tmp_path / 'model.onnx', labels=labels)
    viewport = {'width': width, 'height': 800}
    with opened(model, color_scheme=scheme, viewport=viewport) as tab:
        drop(tab, photo)
        drop(tab, photo, photo)
        tab.locator('#rows button').first.click()
        tab.wait_for_selector('#result:visible')
        tab.click('summary')
        colors = tab.evaluate(
            "['backgroundColor', 'color'].map((one) => "
            'getComputedStyle(document.body)[one])'
        )
        bright = [sum(map(int, c[4:-1].split(','))) > 384 for c in colors]
        assert bright == ([True, False] if scheme == 'light' else [False, True])
