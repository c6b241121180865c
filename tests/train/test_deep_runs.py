"""A run on images of 12 bits: what is kept, used again, exported and shown."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from flax_densenet import UserError
from flax_densenet import settings as settings_lib
from flax_densenet.data import images
from flax_densenet.export import formats, hub, onnx_int8, stablehlo
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.train import fit, prepare
from flax_densenet.weights import trained as trained_lib
from helpers import runs

WINDOW = (0, 4095)


def write(root, *, count=12, scale=1):
    """Discs of 60 levels of 4096 more or less than a gray that varies as much."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    disc = (x - 8) ** 2 + (y - 8) ** 2 < 20
    for name, step in (('down', -60), ('up', 60)):
        (root / name).mkdir(parents=True)
        for n in range(count):
            gray = 2000 + step * disc + rng.integers(-20, 21, disc.shape)
            picture = Image.fromarray((gray * scale).astype(np.uint16))
            picture.save(root / name / f'{n}.png')
    return root


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp('deep')
    config = runs.tiny_config(
        **{
            'data.source': f'folder:{write(root / "scans")}',
            'data.image_size': 8,
            'data.channels': 1,
            'data.batch_size': 8,
            'data.augment': 'crop_flip',
            'data.mixup': 0.2,
            'train.epochs': 1,
        }
    )
    fit.fit(config, str(root / 'run'))
    return root, config


@pytest.fixture(scope='module')
def model(run):
    return predictor_lib.Predictor(trained_lib.load_trained(str(run[0] / 'run')), 4)


@pytest.mark.slow
def test_what_is_saved(run, model):
    saved = json.loads((run[0] / 'run' / 'config.json').read_text())
    assert saved['data']['window'] == list(WINDOW)
    assert saved['data']['bit_depth'] == 16
    assert model.preparation.window == WINDOW and model.preparation.is_deep


@pytest.mark.slow
def test_files_arrays_and_pictures_give_the_same(run, model):
    path = str(run[0] / 'scans' / 'up' / '3.png')
    with Image.open(path) as picture:
        given = [
            path,
            pathlib.Path(path).read_bytes(),
            np.asarray(picture),
            picture.copy(),
        ]
    prepared = [model.load(one) for one in given]
    assert prepared[0].dtype == np.uint16 and np.ptp(prepared[0]) > 500
    for one in prepared[1:]:
        np.testing.assert_array_equal(one, prepared[0])
    explained = model.explain(path)[0]
    assert explained.overlay.dtype == np.uint8


@pytest.mark.slow
def test_a_run_resumes_and_is_started_from(run):
    root, config = run
    again = config | {'train': config['train'] | {'epochs': 2}}
    resumed = prepare.prepare(again, str(root / 'run'))
    assert resumed.settings.preparation.window == WINDOW
    # Of other data, which alone would give another window.
    other = write(root / 'brighter', scale=8)
    started = prepare.prepare(
        config
        | {
            'init_from': str(root / 'run'),
            'data': config['data'] | {'source': f'folder:{other}'},
        },
        str(root / 'new'),
    )
    assert started.settings.preparation.window == WINDOW
    assert started.settings.preparation.bit_depth == 16


@pytest.mark.slow
def test_exports_compute_the_same(run, model, tmp_path):
    trained, root = model.trained, run[0]
    batch = np.stack([model.load(str(p)) for p in sorted(root.glob('scans/*/1.png'))])
    expected = model.compute(batch)[0]
    onnxruntime = pytest.importorskip('onnxruntime')
    formats.save(str(tmp_path / 'x.onnx'), trained, 'onnx')
    session = onnxruntime.InferenceSession(str(tmp_path / 'x.onnx'))
    assert session.get_inputs()[0].type == 'tensor(uint16)'
    np.testing.assert_allclose(
        session.run(None, {'image': batch})[0], expected, atol=1e-5
    )
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about['window']) == list(WINDOW) and about['bit_depth'] == '16'
    formats.save(str(tmp_path / 'x.stablehlo'), trained, 'stablehlo')
    call, metadata = stablehlo.load(str(tmp_path / 'x.stablehlo'))
    np.testing.assert_allclose(call(batch), expected, atol=1e-5)
    assert metadata['data']['window'] == list(WINDOW)
    with pytest.raises(UserError, match='int8 is for images of 8 bits'):
        onnx_int8.check(trained.module, trained.metadata)


@pytest.mark.slow
def test_files_of_weights_keep_the_preparation(run, model, tmp_path):
    def write_weights(path, trained):
        formats.save(path, trained, 'safetensors')

    formats.save(str(tmp_path / 'x.safetensors'), model.trained, 'safetensors')
    hub.write(str(tmp_path / 'hub'), model.trained, write_weights)
    for name in ('x.safetensors', 'hub'):
        found = trained_lib.load_trained(str(tmp_path / name))
        assert trained_lib.preparation_of(found.metadata) == model.preparation
    assert '0 to 4095' in (tmp_path / 'hub' / 'README.md').read_text()


def test_runs_from_before_there_were_bit_depths_stay_as_they_are():
    saved = settings_lib.from_saved({'data': {'window': [0, 4095]}})
    preparation = prepare.with_bits(saved).preparation
    assert (preparation.window, preparation.bit_depth) == (WINDOW, 8)
    metadata = {'image_size': 8, 'mean': [0.5], 'data': {'window': None}}
    assert trained_lib.preparation_of(metadata) == images.Preparation(8, channels=1)
