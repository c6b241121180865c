"""Arguments of wrong types and values: one line each, and paths as in the commands."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import flax_densenet
from flax_densenet.errors import UserError
from flax_densenet.evaluation import array_data
from flax_densenet.inference import image_arguments
from helpers.shared import DIGITS

IMAGES = np.zeros((4, 8, 8, 3), np.uint8)
LABELS = np.zeros(4, int)


@pytest.fixture(scope='module')
def model(digits_run):
    return flax_densenet.load(digits_run.workdir, batch_size=8)


def refused(call, *arguments, **named):
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_paths_are_those_of_the_commands(model, tmp_path, monkeypatch):
    """`~` is the home folder; a bucket is refused, and nothing is made."""
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = DIGITS | {'train': {'epochs': 1, 'report': False, 'tensorboard': False}}
    assert flax_densenet.train(config, '~/run').workdir == str(tmp_path / 'run')
    assert (tmp_path / 'run' / 'checkpoints').exists()
    line = refused(flax_densenet.train, config, 'gs://x/y')
    assert line.startswith('workdir=gs://x/y: gs:// is not supported; use a local')
    line = refused(flax_densenet.export, model, 's3://x/y.onnx')
    assert line.startswith('file=s3://x/y.onnx: s3:// is not supported; use a local')
    line = refused(flax_densenet.export, model, '~/none/o.safetensors')
    assert f'there is no folder {tmp_path}/none' in line
    assert [path.name for path in tmp_path.iterdir()] == ['run']


@pytest.mark.parametrize(
    ('config', 'line'),
    [
        ('cifar', "config='cifar' is not a config; give get_config(NAME), or a map"),
        (None, 'config=None is not a config; give get_config'),
        (
            {'data': {'mean': (123.0, 116.0, 103.0)}},
            'data.mean=(123.0,116.0,103.0) is ',
        ),
        ({'data': {'mean': (float('nan'),) * 3}}, 'must be finite numbers'),
        ({'data': {'mean': 'abc'}}, "data.mean='abc' must be values in brackets"),
    ],
)
def test_train(config, line, tmp_path):
    assert line in refused(flax_densenet.train, config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('path', 'named', 'line'),
    [
        ('', {}, "path='' is empty; give the folder of a run or weights"),
        (None, {}, 'path: None is not a path; give the folder'),
        ('RUN', {'batch_size': 2.5}, 'batch_size=2.5 must be a whole number'),
        ('RUN', {'batch_size': '8'}, "batch_size='8' must be a whole number"),
        ('RUN', {'batch_size': 0}, 'batch_size=0 must be at least 1'),
        ('RUN', {'class_names': 5}, 'class_names=5 must be a list of names'),
        ('RUN', {'data': 5}, 'data=5 must be a mapping'),
        ('RUN', {'data': {'crop_fraction': '0.9'}}, "data.crop_fraction='0.9' must be"),
        ('RUN', {'data': {'std': 58}}, 'data.std=58 must be values in brackets'),
        (
            'RUN',
            {'data': {'channels': '3'}},
            "data.channels='3' must be a whole number",
        ),
        ('RUN', {'data': {'resize': 5}}, 'data.resize=5 must be text'),
    ],
)
def test_load(digits_run, path, named, line):
    path = digits_run.workdir if path == 'RUN' else path
    assert line in refused(flax_densenet.load, path, **named)


@pytest.mark.parametrize(
    ('files', 'line'),
    [
        (None, 'files=None: give file names, the bytes of files, Pillow images or arr'),
        (5, 'files=5: give file names'),
        ([None], 'image 0 is None; give file names'),
        (np.zeros((2, 16, 16, 4), np.uint8), 'image 0 has 4 channels; give [H, W], ['),
        (np.zeros((3, 16, 16), np.uint8), 'image 0 has 16 channels; give [H, W]'),
    ],
)
def test_predict(model, files, line):
    assert line in refused(model.predict, files)


def test_arrays_of_other_libraries():
    """Arrays of JAX are images, columns of names are lists of files."""
    pixels = jnp.full((8, 8, 3), 7, jnp.uint8)
    (found,) = image_arguments.as_list(pixels)
    assert isinstance(found, np.ndarray) and (found == 7).all()
    assert image_arguments.as_list(np.array(['a.jpg', 'b.jpg'])) == ['a.jpg', 'b.jpg']


def test_predict_takes_arrays_of_jax(model):
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    own, one, listed = (
        model.predict(images)[0].probabilities
        for images in (pixels, jnp.array(pixels), [jnp.array(pixels)])
    )
    np.testing.assert_array_equal(own, one)
    np.testing.assert_array_equal(own, listed)


@pytest.mark.parametrize(
    ('data', 'named', 'line'),
    [
        (
            None,
            {'labels': 'none.csv'},
            "labels='none.csv' needs data: the folder of th",
        ),
        ((IMAGES, LABELS), {'labels': 'none.csv'}, "labels='none.csv' needs data"),
        ([IMAGES, LABELS], {}, 'data: an object of type list; give a folder, a data s'),
        ((IMAGES, LABELS, 1), {}, 'or a tuple of two arrays: (images, labels)'),
        (
            (IMAGES, LABELS),
            {'batch_size': '8'},
            "batch_size='8' must be a whole number",
        ),
        (
            (np.zeros((4, 3, 16, 16), np.uint8), LABELS),
            {},
            'images: [4, 3, 16, 16]; give [N, H, W, 3] or [N, H, W, 1]',
        ),
        ((np.zeros((4, 16, 16, 2), np.uint8), LABELS), {}, 'images: [4, 16, 16, 2]; g'),
        ((np.zeros((4, 16, 16, 4), np.uint8), LABELS), {}, 'images: [4, 16, 16, 4]; g'),
        ((IMAGES, ['a'] * 4), {}, 'labels: an array of <U1; give numbers'),
    ],
)
def test_evaluate(model, data, named, line):
    assert line in refused(flax_densenet.evaluate, model, data, **named)


def test_arrays_of_networks_with_four_channels(model):
    """Four channels are right for a network that keeps them, and three are not."""
    import dataclasses

    preparation = dataclasses.replace(model.preparation, channels=4)
    how = {'classes': 10, 'multi_label': False, 'preparation': preparation}
    four = np.zeros((4, 8, 8, 4), np.uint8)
    assert len(array_data.make_examples(four, LABELS, **how)) == 4
    line = refused(array_data.make_examples, IMAGES, LABELS, **how)
    assert line == 'images: [4, 8, 8, 3]; give [N, H, W, 4]'
    image_arguments.check_array(four[0], preparation)


def test_other_functions(model, tmp_path):
    call = refused
    assert 'model: None is not a path; give the' in call(flax_densenet.evaluate, None)
    line = call(flax_densenet.export, 'x.onnx', model)
    assert line.startswith('file: an object of type Predictor is not a path; give the')
    line = call(flax_densenet.export, model, tmp_path / 'x.onnx', images=5)
    assert line == 'images: 5; give files, folders or patterns'
    line = call(flax_densenet.export, model, tmp_path / 'x.onnx', images=[None])
    assert line.startswith('images: None is not a path')
    assert 'name: None is not a path; give the name' in call(
        flax_densenet.get_config, None
    )
    assert call(flax_densenet.list_weights, 5) == 'pattern=5 must be text'
    line = call(flax_densenet.create_model, weights=5)
    assert line == 'weights: 5 is not a path; give a name, a file or a folder'
    line = call(flax_densenet.create_model, 'densenet121', num_classes='10')
    assert 'num_classes' in line
    line = call(flax_densenet.init_variables, None, 0)
    assert line == 'model: an object of type NoneType; give that of create_model'
    line = call(flax_densenet.init_variables, model.trained.module, 'x')
    assert line == "seed='x' must be a whole number"
    assert call(flax_densenet.list_models, 5) == 'pattern=5 must be text'


def test_export_never_replaces_its_model(digits_run, model, monkeypatch, tmp_path):
    file = tmp_path / 'x.safetensors'
    file.write_bytes(b'weights')
    monkeypatch.setattr(model, 'path', str(file))
    line = refused(flax_densenet.export, model, pathlib.Path(file))
    assert line == f'file={file} is the model itself; name another file'
    assert file.read_bytes() == b'weights'
