"""Exported files: tried by the runtimes that they are for, or not handed out."""

import dataclasses
import re
import sys

import numpy as np
import pytest

from flax_densenet import create_model, init_variables, settings
from flax_densenet.data import dataset
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.errors import UserError
from flax_densenet.export import (
    formats,
    onnx_network,
    release,
    runtimes,
    sample_images,
    verify,
)
from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import transfer
from helpers.marks import exhaustive_after
from helpers.networks import compiled
from helpers.runs import make_weights, tiny_trained, write_images

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('flatbuffers')


@pytest.fixture(scope='module')
def trained():
    return tiny_trained(dataset.load_source('digits', image_size=16), seed=1)


@pytest.fixture(scope='module')
def samples(trained):
    made = settings.from_config({'data': {'source': 'digits', 'image_size': 16}})
    made = transfer.resolve(made, None)
    return sample_images.from_data(trained, 'here', made, thorough=True)


def run(path, trained, file_format, options, samples):
    shipped = release.Release(trained, None, file_format, options)
    return release.run(path, shipped, samples)


def test_samples(samples, trained):
    """Test images to compare on, other ones to calibrate with."""
    assert samples.images.shape == (360, 16, 16, 3)
    assert samples.calibration.shape == (256, 16, 16, 3)
    assert samples.where == '360 test images of digits'
    seen = {image.tobytes() for image in samples.images}
    new = [image for image in samples.calibration if image.tobytes() not in seen]
    assert len(new) > 250
    assert len(np.unique(samples.labels)) == 10
    few = sample_images.from_library(trained_lib.preparation_of(trained.metadata))
    assert few.images.shape == (6, 16, 16, 3) and few.labels is None


@pytest.mark.parametrize(
    'file_format, ending, precision',
    [
        ('onnx', '.onnx', 'float32'),
        pytest.param('stablehlo', '.stablehlo', 'float32', marks=pytest.mark.slow),
        *exhaustive_after(
            0,
            [
                ('onnx', '.onnx', 'bfloat16'),
                ('safetensors', '.safetensors', 'float16'),
                ('huggingface', '', 'bfloat16'),
            ],
        ),
    ],
)
def test_release(file_format, ending, precision, trained, samples, tmp_path):
    path = tmp_path / f'x{ending}'
    options = formats.Options(precision=precision)
    facts = dict(run(str(path), trained, file_format, options, samples))
    runtime = formats.FORMATS[file_format].runtimes[0]
    assert '360 test images of digits' in facts[runtime]
    assert ('accuracy' in facts) == (precision != 'float32')
    if precision != 'float32':
        before, after = facts['accuracy'].split('before')
        away = abs(float(before.split()[0]) - float(after.split()[1]))
        assert away <= 1  # points; nobody trained it
    assert precision in facts['precision'] and float(facts['size'].split()[0]) > 0
    folder = path if file_format == 'huggingface' else tmp_path
    name = 'README.md' if file_format == 'huggingface' else 'MODEL_CARD.md'
    assert '360 test images of digits' in (folder / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize('inputs', exhaustive_after(1, onnx_network.INPUTS))
@pytest.mark.parametrize('file_format', exhaustive_after(1, ['onnx', 'stablehlo']))
def test_code_of_cards(file_format, inputs, trained, tmp_path, monkeypatch, capsys):
    """As it stands on the card, beside the file and a photograph."""
    few = sample_images.from_library(trained_lib.preparation_of(trained.metadata))
    options = formats.Options(inputs)
    run(str(tmp_path / f'x.{file_format}'), trained, file_format, options, few)
    text = (tmp_path / 'MODEL_CARD.md').read_text()
    code = '\n'.join(re.findall(r'```python\n(.*?)```', text, re.S))
    assert 'session.run' in code or 'deserialize' in code
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, {'.': 1})
    (tmp_path / '000.jpg').rename('photo.jpg')
    found = {}
    exec(compile(code, 'MODEL_CARD.md', 'exec'), found)
    said = capsys.readouterr().out
    wanted = verify.compute(trained, found['pixels'][None], inputs)
    assert found['pixels'].shape == (16, 16, 3)
    shown = re.findall(r'\[\[.*\]\]', said, re.S)[0]
    shown = np.array(shown.replace('[', ' ').replace(']', ' ').split(), float)
    np.testing.assert_allclose(shown, wanted[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    'file_format', exhaustive_after(1, ['onnx', 'stablehlo', 'safetensors'])
)
def test_trained_in_bfloat16(file_format, trained, samples, tmp_path):
    """Its files compute in float32, and are held to that."""
    module = trained.module.clone(dtype='bfloat16')
    fields = trained.metadata['model'] | {'dtype': 'bfloat16'}
    metadata = trained.metadata | {'model': fields}
    half = dataclasses.replace(trained, module=module, metadata=metadata)
    path = str(tmp_path / f'x.{file_format}')
    facts = dict(run(path, half, file_format, formats.Options(), samples))
    assert facts['precision'] == 'float32'


@pytest.mark.slow
def test_card(trained, samples, tmp_path):
    """Beside the file; one that somebody edited to stay is not replaced."""
    path, beside = tmp_path / 'x.onnx', tmp_path / 'MODEL_CARD.md'
    for _ in range(2):
        run(str(path), trained, 'onnx', formats.Options(license='mit'), samples)
    text = beside.read_text()
    assert 'largest difference' in text and 'x.onnx' in text and 'mit' in text.lower()
    beside.write_text('mine')
    path.unlink()
    with pytest.raises(UserError, match='MODEL_CARD.md exists and was not'):
        run(str(path), trained, 'onnx', formats.Options(), samples)
    assert beside.read_text() == 'mine' and not path.exists()


@pytest.mark.slow
def test_integers(trained, samples, tmp_path):
    path = str(tmp_path / 'x.onnx')
    options = formats.Options(precision='int8')
    facts = dict(run(path, trained, 'onnx', options, samples))
    assert facts['precision'] == 'int8, computed in integers'
    assert 'before' in facts['accuracy']


@pytest.mark.slow
def test_a_wrong_file_is_not_handed_out(trained, samples, tmp_path, monkeypatch):
    """What was there stays."""
    path = tmp_path / 'x.onnx'
    path.write_text('of before')

    def make_another(module, variables, metadata, **options):
        variables = init_variables(module, 5)
        return make(module, variables, metadata, **options)

    make = onnx_network.make
    monkeypatch.setattr(onnx_network, 'make', make_another)
    with pytest.raises(UserError, match='nothing was exported: in onnxruntime it diff'):
        run(str(path), trained, 'onnx', formats.Options(), samples)
    assert path.read_text() == 'of before' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_a_model_without_numbers(trained, samples, tmp_path):
    """A comparison with NaN proves nothing."""
    bias = trained.variables['params']['classifier']['bias']
    params = trained.variables['params'] | {
        'classifier': trained.variables['params']['classifier']
        | {'bias': bias * np.nan}
    }
    broken = dataclasses.replace(
        trained, variables=trained.variables | {'params': params}
    )
    with pytest.raises(UserError, match='nothing was exported'):
        run(str(tmp_path / 'x.onnx'), broken, 'onnx', formats.Options(), samples)
    found = np.zeros((2, 10), np.float32)
    with pytest.raises(UserError, match='it differs from the model by nan'):
        verify._compare('onnxruntime', found, found * np.nan, 'images', 'float32')


@pytest.mark.slow
def test_a_file_that_does_not_run(trained, samples, tmp_path, monkeypatch):
    def write(path, trained, options):
        with open(path, 'w') as file:
            file.write('not a model')

    broken = formats.Format(write, ('.onnx',), runtimes=('onnxruntime',))
    monkeypatch.setitem(formats.FORMATS, 'onnx', broken)
    with pytest.raises(UserError, match='onnxruntime cannot run it .*INVALID_PROTOBUF'):
        run(str(tmp_path / 'x.onnx'), trained, 'onnx', formats.Options(), samples)
    assert not list(tmp_path.iterdir())


def test_a_runtime_is_needed(trained, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, 'is_installed', lambda name: False)
    with pytest.raises(UserError, match='pip install onnxruntime'):
        run(str(tmp_path / 'x.onnx'), trained, 'onnx', formats.Options(), samples)
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(UserError, match=r'needs onnx: pip install .flax_densenet\[exp'):
        formats.save(str(tmp_path / 'x.onnx'), trained, 'onnx')
    assert not list(tmp_path.iterdir())


SMALL = dict(block_sizes=(1, 2, 1, 1))
RDNET = dict(
    block_sizes=(1, 2),
    growth_rates=(8, 16),
    halvings=(1,),
    squeeze_blocks=(2,),
    stem_features=16,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    'file_format, ending, variant, fields',
    exhaustive_after(
        3,
        [
            ('torch', '.pth', 'densenet121', SMALL),
            ('huggingface', '', 'densenet121', SMALL),
            ('keras', '.keras', 'densenet121', SMALL),
            ('torch', '.pth', 'densenetblur121d', SMALL),
            ('torch', '.pt', 'rdnet_tiny', RDNET),
            ('safetensors', '.safetensors', 'L40k12', dict(block_sizes=(2, 2))),
            ('keras', '.weights.h5', 'densenet121', SMALL),
            ('onnx', '.onnx', 'rdnet_tiny', RDNET),
        ],
    ),
)
def test_runtimes_of_others(file_format, ending, variant, fields, tmp_path):
    """torch, Keras and OpenVINO, which are where the peers are."""
    names = formats.FORMATS[file_format].runtimes
    if not runtimes.is_installed(names[-1]):
        pytest.skip(f'{names[-1]} is not installed')
    module = create_model(variant, num_classes=5, **fields)
    metadata = {
        'model': {'variant': variant, **fields},
        'class_names': list('abcde'),
        'image_size': 64,
        'mean': [0.5] * 3,
        'std': [0.2] * 3,
        'data': {},
    }
    mesh = mesh_lib.make_mesh()
    variables = init_variables(module, 0)
    trained = trained_lib.Trained(module, variables, metadata, {}, None, mesh)
    few = sample_images.from_library(trained_lib.preparation_of(metadata))
    path = str(tmp_path / f'x{ending}')
    for precision in ('float32', 'bfloat16') if ending == '.pth' else ('float32',):
        options = formats.Options(precision=precision)
        facts = dict(run(path, trained, file_format, options, few))
        assert all('largest difference' in facts[name] for name in names)


def test_mistakes(tmp_path, trained):
    for options, said in (
        (formats.Options('pixels'), r'--inputs=pixels: --format=onnx has images, norm'),
        (formats.Options(precision='int4'), r'--precision=int4: .* bfloat16, int8'),
    ):
        with pytest.raises(UserError, match=said):
            formats.check_format('x.onnx', 'onnx', options)
    shipped = release.Release(trained, None, 'onnx', formats.Options())
    with pytest.raises(UserError, match='there is no folder .*/none; make it first'):
        shipped.check(str(tmp_path / 'none' / 'x.onnx'))
    with pytest.raises(UserError, match='--inputs=images: --format=torch has normal'):
        formats.check_format('x.pth', 'torch', formats.Options('images'))
    (tmp_path / 'a.jpg').write_text('no image')
    preparation = trained_lib.preparation_of(trained.metadata)
    with pytest.raises(UserError, match=r'--files: .*a\.jpg'):
        sample_images.from_files([str(tmp_path / 'a.jpg')], preparation)


@pytest.mark.slow
def test_logits_and_probabilities(trained, samples):
    logits = verify.compute(trained, samples.images[:20], 'normalized')
    given = verify.as_inputs(samples.images[:20], trained, 'normalized', nchw=False)
    wanted = compiled(trained.module)(trained.variables, given)
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)
    found = verify.compute(trained, samples.images[:20], 'images')
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)


def test_of_files(tmp_path):
    path = make_weights(tmp_path / 'x.safetensors')
    trained = trained_lib.load_trained(path)
    write_images(tmp_path / 'photos', {'a': 3})
    preparation = trained_lib.preparation_of(trained.metadata)
    found = sample_images.from_files([str(tmp_path / 'photos')], preparation)
    assert found.images.shape == (3, 12, 12, 3)
    assert found.where == '3 images of photos'  # cards say it, too
