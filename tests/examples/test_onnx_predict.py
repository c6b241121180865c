"""examples/onnx_predict.py gets the pixels and the answers that this project gets."""

import ast
import importlib.util
import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flax_densenet.data import images
from helpers import lazy
from helpers.marks import slow_after
from helpers.paths import ROOT
from helpers.tiny_onnx import LABELS, SIZE, probabilities, write_onnx

sklearn_datasets = lazy.module('sklearn.datasets')

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
PATH = ROOT / 'examples' / 'onnx_predict.py'
PREPARATIONS = {
    'stretch': {'resize': 'stretch', 'crop_fraction': 0.5},
    'crop': {'resize': 'crop', 'crop_fraction': 0.875},
    'whole-crop': {'resize': 'crop', 'interpolation': 'bicubic'},
    'gray': {'resize': 'crop', 'crop_fraction': 0.9, 'channels': 1},
}


@pytest.fixture(scope='module')
def example():
    spec = importlib.util.spec_from_file_location('onnx_predict', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Files of every kind that needs care, by name."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 17, 4), np.uint8))
    large = small.convert('RGB').resize((419, 300), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        'photo.jpg': (large, {}),
        'turned.jpg': (large, {'exif': exif}),
        'tall.jpg': (large.rotate(90, expand=True), {}),
        'cmyk.jpg': (large.convert('CMYK'), {}),
        'gray.jpg': (large.convert('L'), {}),
        'clear.png': (small.resize((90, 61)), {}),
        'palette.gif': (large.quantize(16), {'transparency': 3}),
        'small.png': (small.convert('RGB'), {}),
        'strip.png': (large.resize((301, 41)), {}),
        'same.png': (large.resize((SIZE, SIZE)), {}),
    }
    for name, (image, options) in made.items():
        image.save(folder / name, **options)
    return {name: str(folder / name) for name in made}


@pytest.mark.parametrize('way', PREPARATIONS)
def test_pixels_are_ours(example, pictures, way, tmp_path):
    options = PREPARATIONS[way]
    model = write_onnx(tmp_path / 'model.onnx', **options)
    meta = onnxruntime.InferenceSession(model).get_modelmeta().custom_metadata_map
    for name, path in pictures.items():
        ours = images.load_image(path, images.Preparation(SIZE, **options))
        theirs = example.prepare(path, meta)
        assert theirs.dtype == np.uint8
        np.testing.assert_array_equal(theirs, ours[None], err_msg=name)


@pytest.mark.slow
def test_prints_the_likeliest_alone(pictures, tmp_path):
    """As a stranger runs it, and nothing of ours or of JAX is loaded."""
    model = write_onnx(tmp_path / 'model.onnx', resize='crop', crop_fraction=0.875)
    code = (
        'import runpy, sys\n'
        'try: runpy.run_path(sys.argv[0], run_name="__main__")\n'
        'finally: print(sorted({"jax", "flax", "flax_densenet"} & set(sys.modules)))'
    )
    files = [pictures['photo.jpg'], pictures['turned.jpg']]
    code = f'import sys; sys.argv = {[str(PATH), model, *files]}\n{code}'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, loaded = done.stdout.splitlines()
    assert ast.literal_eval(loaded) == []
    how = images.Preparation(SIZE, resize='crop', crop_fraction=0.875)
    for file, line in zip(files, lines, strict=True):
        shares = probabilities(model, images.load_image(file, how))
        best = np.argsort(-shares)[:5]
        told = ', '.join(f'{LABELS[i]} {shares[i]:.1%}' for i in best)
        assert line == f'{file}: {told}'


@pytest.mark.parametrize('several', [False, True])
def test_sets_and_unusual_images(example, pictures, several, tmp_path, capsys):
    """What the file has besides probabilities."""
    model = write_onnx(tmp_path / 'model.onnx')
    how = images.Preparation(SIZE)
    shares = probabilities(model, images.load_image(pictures['photo.jpg'], how))
    order = np.argsort(-shares)
    for number, (score, lowest) in enumerate(((1.7, shares[order[1]]), (0.9, 1.0))):
        made = onnx.load(model)
        tensor = onnx.numpy_helper.from_array(np.float32([score]))
        made.graph.node.append(
            onnx.helper.make_node('Constant', [], ['unusual'], value=tensor)
        )
        made.graph.output.append(
            onnx.helper.make_tensor_value_info('unusual', onnx.TensorProto.FLOAT, [1])
        )
        meta = {one.key: one.value for one in made.metadata_props}
        meta['multi_label'] = json.dumps(several)
        meta['set_thresholds'] = json.dumps({'0.9': [float(lowest)]})
        onnx.helper.set_model_props(made, meta)
        path = str(tmp_path / f'{number}.onnx')
        onnx.save(made, path)
        assert example.main(path, pictures['photo.jpg']) == 0
    first, second = capsys.readouterr().out.splitlines()
    best = f'{LABELS[order[0]]}, {LABELS[order[1]]}'
    assert first.endswith(f'; set for 90%: {best}; not like the training images (1.7)')
    alone = 'none' if several else LABELS[order[0]]
    assert second.endswith(f'; set for 90%: {alone}')


def test_unreadable_files_are_told_of(example, pictures, tmp_path, capsys):
    model = write_onnx(tmp_path / 'model.onnx')
    broken = tmp_path / 'broken.jpg'
    with open(pictures['photo.jpg'], 'rb') as file:
        broken.write_bytes(file.read()[:900])
    text = tmp_path / 'text.jpg'
    text.write_text('no image')
    files = [str(broken), str(text), str(tmp_path / 'none.jpg')]
    assert example.main(model, *files, pictures['photo.jpg']) == 1
    told = capsys.readouterr()
    assert told.out.startswith(pictures['photo.jpg']) and told.out.count('\n') == 1
    lines = told.err.splitlines()
    assert [line.split(':')[0] for line in lines] == files
    assert all('cannot be read' in line for line in lines)


def test_a_file_that_is_no_model(example, pictures, tmp_path):
    bare = write_onnx(tmp_path / 'bare.onnx', labels=['a'], **{'image_size': None})
    other = write_onnx(tmp_path / 'other.onnx', dtype='float')
    for model in (tmp_path / 'none.onnx', pictures['photo.jpg'], bare, other):
        said = example.main(str(model), pictures['photo.jpg'])
        assert (
            said.startswith(f'{model} is not an exported model (') and '\n' not in said
        )


def test_wrong_usage():
    done = subprocess.run(
        [sys.executable, PATH, 'model.onnx'], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == 'usage: python onnx_predict.py model.onnx photo.jpg ...\n'


@pytest.mark.parametrize('way', slow_after(1, PREPARATIONS))
def test_twenty_lines(way, tmp_path, monkeypatch, capsys):
    """As it stands in the file: few lines, no JAX, the same image but for a pixel."""
    options = PREPARATIONS[way]
    model = write_onnx(tmp_path / 'model.onnx', size=224, **options)
    path = PATH.with_name('onnx_in_20_lines.py')
    text = path.read_text()
    lines = text.split('"""')[2].splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 20 and 'jax' not in text
    for number, photograph in enumerate(sklearn_datasets.load_sample_images().images):
        file = str(tmp_path / f'{number}.png')
        Image.fromarray(photograph).save(file)
        monkeypatch.setattr(sys, 'argv', [str(path), model, file])
        left = runpy.run_path(str(path), run_name='__main__')
        ours = images.load_image(file, images.Preparation(224, **options))
        # Cropped a pixel further, or rounded twice: of 255 gray values.
        assert np.abs(left['batch'][0] - ours.astype(int)).mean() < 8
        shares = probabilities(model, left['batch'][0])
        best = ' '.join(f'{LABELS[i]} {shares[i]:.1%}' for i in np.argsort(-shares)[:3])
        assert capsys.readouterr().out == f'{file} {best}\n'
