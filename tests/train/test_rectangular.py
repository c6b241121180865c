"""Runs on images that are not square, and all that is made of them."""

import importlib.util
import json

import numpy as np
import pytest

import flax_densenet
from flax_densenet import UserError
from flax_densenet.checkpoints import reader
from flax_densenet.export import formats
from flax_densenet.train import fit, resume
from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import weight_file
from helpers.paths import ROOT
from helpers.runs import tiny_config, train_with_pages, write_images
from helpers.servers import ask, from_data_url, running

SIZE = (16, 8)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rectangular') / 'photos'
    return write_images(folder, {'ants': 10, 'bees': 10}, size=(20, 44))


def config_of(photos, **fields):
    return tiny_config(
        **{
            'data.source': f'folder:{photos}',
            'data.image_size': SIZE,
            'data.resize': 'crop',
            'data.batch_size': 8,
            'data.augment': 'crop_flip',
            'data.size_schedule': ((1.0, (8, 4)),),
            'model.block_sizes': (1, 1),
            'train.epochs': 1,
            'train.report': True,
            **fields,
        }
    )


@pytest.fixture(scope='module')
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    train_with_pages(config_of(photos), folder)
    return folder


@pytest.mark.slow
def test_metadata_and_resuming(run, photos, capfd):
    step = reader.find_latest(str(run))
    metadata = reader.load_json(str(run), step, 'metadata')
    assert metadata['image_size'] == metadata['data']['image_size'] == list(SIZE)
    assert '16×8 (height × width)' in (run / 'report.html').read_text()
    settings = flax_densenet.settings.from_config(config_of(photos))
    changes = resume.find_changes(str(run), settings)
    assert not [name for name in changes if 'size' in name]
    with pytest.raises(UserError, match=r'image_size=\[16, 8\], not \[8, 16\]'):
        fit.fit(config_of(photos, **{'data.image_size': SIZE[::-1]}), str(run))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_prediction_maps_and_server(run, photos):
    model = flax_densenet.load(run)
    file = photos / 'bees' / '000.jpg'
    assert model.load(str(file)).shape == (*SIZE, 3)
    (one,) = model.explain(file)
    assert np.asarray(one.image).shape == (*SIZE, 3)
    assert flax_densenet.evaluate(model, photos).metrics['count'] == 4
    with running(trained_lib.load_trained(str(run))) as port:
        assert ask(port, '/model').json['image_size'] == list(SIZE)
        told = ask(port, '/predict?explain=1', file.read_bytes()).json
    assert from_data_url(told['overlay']).shape == (*SIZE, 3)
    shares = {p['class']: p['probability'] for p in told['predictions']}
    assert shares['bees'] == pytest.approx(model.predict(file)[0].probabilities[1])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['m.safetensors', 'folder'])
def test_files_keep_the_size(run, name, tmp_path):
    path = str(tmp_path / name)
    trained = trained_lib.load_trained(str(run))
    formats.save(path, trained, 'huggingface' if name == 'folder' else 'safetensors')
    assert weight_file.load(path).preprocessing['image_size'] == SIZE
    if name == 'folder':
        config = json.loads((tmp_path / name / 'config.json').read_text())
        cfg = config['pretrained_cfg']
        assert cfg['input_size'] == [3, 16, 8] and cfg['pool_size'] == [8, 4]
        assert (
            '16 x 8 pixels (height x width)'
            in (tmp_path / name / 'README.md').read_text()
        )


@pytest.mark.exhaustive
@pytest.mark.slow
def test_onnx_and_stablehlo(run, photos, tmp_path):
    for name in ('m.onnx', 'm.stablehlo'):
        done = flax_densenet.export(run, tmp_path / name, images=str(photos / 'ants'))
        assert any('difference' in fact for fact in done.facts.values())
    place = ROOT / 'examples' / 'onnx_predict.py'
    spec = importlib.util.spec_from_file_location('onnx_predict', place)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / 'm.onnx'))
    meta = session.get_modelmeta().custom_metadata_map
    assert meta['image_size'] == '16,8'
    file = str(photos / 'ants' / '001.jpg')
    ours = flax_densenet.load(run).load(file)
    assert (example.prepare(file, meta)[0] == ours).all()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'data.image_size': (16, 1)}, 'images of 16x1 are too small'),
        (
            {'data.size_schedule': ((0.5, 8),)},
            r'data.size_schedule=.*: data.image_size=\(16,8\) is not square',
        ),
        ({'data.size_schedule': ((0.5, (8, 1)),)}, 'images of 8x1 are too small'),
        ({'data.size_schedule': ((0.5, (8, 0)),)}, 'data.size_schedule='),
    ],
)
def test_errors(photos, fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fit.fit(config_of(photos, **fields), str(tmp_path / 'run'))
