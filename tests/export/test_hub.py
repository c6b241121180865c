"""Folders as the Hugging Face Hub has them: ours and back, timm's, broken ones."""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from flax_densenet import UserError, load_trained
from flax_densenet.export import formats, hub, model_card
from flax_densenet.weights import timm_config, weight_file
from flax_densenet.weights import trained as trained_lib
from helpers.runs import make_weights, write_images
from helpers.weight_files import (
    assert_same,
    state_dict,
    tiny,
    trained_of,
    write_safetensors,
)

FILES = ['README.md', 'config.json', 'model.safetensors']
TIMM = {
    'architecture': 'densenet121',
    'num_classes': 5,
    'model_args': {'growth_rate': 4, 'block_config': [2, 3], 'bn_size': 2},
    'pretrained_cfg': {
        'input_size': [3, 64, 64], 'crop_pct': 0.95, 'interpolation': 'bicubic',
        'crop_mode': 'center', 'mean': [0.5, 0.4, 0.3], 'std': [0.3, 0.2, 0.1],
    },
}  # fmt: skip


def write_timm(folder, config=TIMM, **fields):
    """A folder as timm's models on the Hub have it."""
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    write_safetensors(folder / 'model.safetensors', state_dict(**fields))
    return str(folder)


def changed(place, value, *, known=TIMM):
    """The config with one value changed, `a.b` for nested ones; None takes it out."""
    config = json.loads(json.dumps(known))
    *outer, name = place.split('.')
    inside = config
    for part in outer:
        inside = inside[part]
    inside[name] = value
    return config


def test_there_and_back(tmp_path):
    """All of what a file of ours keeps, and the folder's README as its card."""
    names = ['a|b', 'größe', 'x', '', '犬']
    module, variables = tiny(epsilon=1e-3)
    data = {'resize': 'stretch', 'crop_fraction': 0.9, 'interpolation': 'bicubic'}
    trained = trained_of(module, variables, class_names=names, data=data)
    folder, file = str(tmp_path / 'hub'), str(tmp_path / 'x.safetensors')
    formats.save(folder, trained, 'huggingface')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['hub']
    assert sorted(p.name for p in (tmp_path / 'hub').iterdir()) == FILES
    assert weight_file.is_weights(folder) and not weight_file.is_weights(str(tmp_path))
    found = weight_file.load(folder)
    formats.save(file, trained, 'safetensors')
    other = weight_file.load(file)
    assert_same(found.variables, other.variables)
    assert found.fields == other.fields and found.path == folder
    assert found.class_names == tuple(names)
    wanted = dict(resize='stretch', interpolation='bicubic', image_size=48, channels=3)
    assert wanted.items() <= found.preprocessing.items()
    assert found.preprocessing['mean'] == (0.5,) * 3
    loaded, before = trained_lib.load_trained(folder), trained_lib.load_trained(file)
    assert loaded.class_names == tuple(names)
    assert trained_lib.preparation_of(loaded.metadata) == trained_lib.preparation_of(
        trained.metadata
    )
    assert loaded.metadata['model'] == before.metadata['model']
    assert model_card.MARKER in (tmp_path / 'hub' / 'README.md').read_text()


def test_config_for_timm(tmp_path):
    formats.save(str(tmp_path / 'hub'), trained_of(*tiny()), 'huggingface')
    config = json.loads((tmp_path / 'hub' / 'config.json').read_text())
    assert config['architecture'] == 'densenet121'
    assert config['model_args'] == TIMM['model_args']
    assert (config['num_classes'], config['num_features']) == (5, 20)
    assert config['label_names'] == [f'class {n}' for n in range(5)]
    settings = config['pretrained_cfg']
    assert settings['first_conv'] == 'features.conv0'
    assert (settings['input_size'], settings['pool_size']) == ([3, 48, 48], [6, 6])
    assert (settings['crop_mode'], settings['crop_pct']) == ('center', 1.0)


def test_weights_of_timm(tmp_path):
    folder = write_timm(tmp_path / 'timm')
    found = weight_file.load(folder)
    assert (found.family, found.path, found.num_classes) == ('timm', folder, 5)
    assert_same(found.variables, tiny()[1])
    assert found.preprocessing == dict(
        image_size=64, resize='crop', crop_fraction=0.95, interpolation='bicubic',
        mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1), channels=3,
    )  # fmt: skip
    assert found.class_names is None
    write_timm(tmp_path / 'timm', changed('label_names', list('abcde')))
    assert weight_file.load(folder).class_names == tuple('abcde')
    write_timm(
        tmp_path / 'timm', changed('label_names', {str(n): f'n{n}' for n in range(5)})
    )
    loaded = trained_lib.load_trained(folder)
    assert loaded.class_names == ('n0', 'n1', 'n2', 'n3', 'n4')
    gaps = changed('label_names', {'0': 'x', '7': 'y'})
    assert weight_file.load(write_timm(tmp_path / 'timm', gaps)).class_names is None
    squash = changed('pretrained_cfg.crop_mode', 'squash')
    squash['pretrained_cfg']['crop_pct'] = 1.0
    found = weight_file.load(write_timm(tmp_path / 'timm', squash))
    assert found.preprocessing['resize'] == 'stretch'
    old = TIMM['pretrained_cfg'] | {
        'architecture': 'tv_densenet121.x',
        'model_args': TIMM['model_args'],
    }
    found = weight_file.load(write_timm(tmp_path / 'timm', old))
    assert found.preprocessing['crop_fraction'] == 0.95


def test_pooling_that_blurs(tmp_path):
    """No array tells of it, the name does."""
    for name, blurs in (('densenetblur121d', True), ('densenet264d', False)):
        folder = write_timm(tmp_path / name, changed('architecture', name), stem='deep')
        assert weight_file.load(folder).module.blur_pool == blurs


def test_a_file_of_torch(tmp_path):
    reference = pathlib.Path(write_timm(tmp_path / 'timm'))
    torch = pytest.importorskip('torch')
    arrays = {k: torch.from_numpy(v.copy()) for k, v in state_dict().items()}
    torch.save(arrays, reference / 'pytorch_model.bin')
    (reference / 'model.safetensors').unlink()
    assert_same(weight_file.load(str(reference)).variables, tiny()[1])


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_half_precision(dtype, tmp_path):
    """Read as float32, from a file and from a folder."""
    arrays = {
        name: array if array.dtype == np.int64 else array.astype(dtype)
        for name, array in state_dict().items()
    }
    folder = pathlib.Path(write_timm(tmp_path / 'timm'))
    path = write_safetensors(folder / 'model.safetensors', arrays)
    expected = jax.tree.map(lambda x: x.astype(dtype).astype('f4'), tiny()[1])
    for place in (path, str(folder)):
        found = weight_file.load(place)
        assert_same(found.variables, expected)
        leaves = jax.tree.leaves(found.variables)
        assert {leaf.dtype for leaf in leaves} == {np.dtype('float32')}


def test_quantized_arrays(tmp_path):
    arrays = state_dict() | {'classifier.weight': np.ones((5, 20), np.int8)}
    path = write_safetensors(tmp_path / 'x', arrays)
    with pytest.raises(
        UserError, match='not of floating point: classifier.weight int8'
    ):
        weight_file.load(path)


def test_imported_weights_without_names(tmp_path):
    """Go out and come back without them."""
    trained = trained_lib.load_trained(write_timm(tmp_path / 'timm'))
    assert trained.class_names is None
    for form, name in (('huggingface', 'hub'), ('safetensors', 'x.safetensors')):
        formats.save(str(tmp_path / name), trained, form)
        found = weight_file.load(str(tmp_path / name))
        assert (found.class_names, found.num_classes) == (None, 5)
        assert found.preprocessing['crop_fraction'] == 0.95
        assert_same(found.variables, tiny()[1])


@pytest.mark.parametrize(
    ('place', 'value', 'message'),
    [
        ('architecture', None, 'architecture is missing'),
        ('architecture', 'resnet50.a1_in1k', "architecture is 'resnet50.a1_in1k'"),
        ('architecture', ['densenet121'], r"architecture is \['densenet121'\]"),
        ('architecture', 'BC-L999999999k999999999', 'architecture is'),
        ('model_args', None, 'growth_rate=32, .*; .* it have growth_rate=4, .*belong'),
        ('architecture', 'densenetblur121d', "stem_type='deep'; .* stem_type=''"),
        ('architecture', 'rdnet_tiny', 'growth_rates=.* growth_rates=.none'),
        ('model_args.growth_rate', 1e999, 'growth_rate=inf; .* growth_rate=4'),
        ('model_args.global_pool', 'max', "global_pool is 'max'; .* avg"),
        ('model_args.act_layer', 'silu', "act_layer is 'silu'; .* nothing"),
        ('model_args', [1], r'model_args is \[1\]'),
        ('num_classes', 10, 'num_classes=10; .* num_classes=5: use files'),
        ('num_classes', -1, 'num_classes is -1'),
        ('num_classes', True, 'num_classes is True'),
        ('label_names', ['a'], '1 label_names for num_classes=5'),
        ('label_names', [1, 2, 3, 4, 5], 'label_names is .* a list of strings'),
        ('label_names', 'abcde', "label_names is 'abcde'"),
        ('pretrained_cfg', 'x', "pretrained_cfg is 'x'; .* an object"),
        ('pretrained_cfg.interpolation', 'lanczos', 'expects bilinear or bicubic'),
        ('pretrained_cfg.interpolation', ['a'], r"interpolation is \['a'\]"),
        ('pretrained_cfg.input_size', [3, 64], r'expects \[CHANNELS, HEIGHT, WI'),
        ('pretrained_cfg.input_size', [0, 64, 64], 'input_size is'),
        ('pretrained_cfg.input_size', [4, 64, 64], 'a number for each of 4 channels'),
        ('pretrained_cfg.input_size', [3, 64, 0], 'input_size is'),
        ('pretrained_cfg.input_size', [3, 10**9, 10**9], 'input_size is'),
        ('pretrained_cfg.crop_pct', 0, 'crop_pct is 0; .* a share'),
        ('pretrained_cfg.crop_mode', 'border', "crop_mode is 'border'; .* center or"),
        ('pretrained_cfg.crop_mode', 'squash', 'crop_pct is 0.95; .* squash'),
        ('pretrained_cfg.std', [0.1, 0, 0.1], 'std is'),
        ('pretrained_cfg.std', [], 'std is'),
        ('pretrained_cfg.mean', [0.5], 'mean is .* each of 3 channels'),
        ('pretrained_cfg.mean', [1e999] * 3, 'mean is'),
        ('flax_densenet', 'x', 'its metadata is not that of a trained model'),
        ('flax_densenet', {'model': {}}, r'\(model is \{\}\)'),
    ],
)
def test_wrong_configs(place, value, message, tmp_path):
    folder = write_timm(tmp_path / 'timm', changed(place, value))
    with pytest.raises(UserError, match=message) as caught:
        weight_file.load(folder)
    assert str(tmp_path) in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'config.json is not valid JSON'),
        ('{"architecture": ', 'config.json is not valid JSON'),
        ('\udcff', 'config.json is not valid JSON'),
        ('[' * 100_000, 'config.json is not valid JSON'),
        ('[]', 'config.json is not a JSON object'),
        ('{}', 'architecture is missing'),
        (
            '{"architectures": ["ResNet"], "model_type": "resnet"}',
            'architecture is mis',
        ),
    ],
)
def test_texts_that_are_no_configs(text, message, tmp_path):
    folder = write_timm(tmp_path / 'timm')
    path = tmp_path / 'timm' / 'config.json'
    path.write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(UserError, match=message) as caught:
        weight_file.load(folder)
    assert '\n' not in str(caught.value)
    # The weights alone do without it.
    assert weight_file.load(folder + '/model.safetensors').family == 'torchvision'


def test_folders_that_are_not_whole(tmp_path):
    folder = pathlib.Path(write_timm(tmp_path / 'timm'))
    path = folder / 'model.safetensors'
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n')
    with pytest.raises(UserError, match='a Git LFS pointer .* git lfs pull'):
        weight_file.load(str(folder))
    path.unlink()
    with pytest.raises(UserError, match='no model.safetensors or pytorch_model.bin'):
        load_trained(folder)
    (folder / 'config.json').unlink()
    with pytest.raises(UserError, match='holds no checkpoint'):
        load_trained(folder)


def test_a_run_is_no_such_folder(tmp_path):
    """It has a config.json too, from its start on."""
    for name in ('config.json', 'environment.json'):
        (tmp_path / name).write_text('{"model": {}}')
    assert not weight_file.is_weights(str(tmp_path))
    with pytest.raises(UserError, match='holds no checkpoint'):
        trained_lib.load_trained(str(tmp_path))
    (tmp_path / 'environment.json').unlink()
    (tmp_path / 'checkpoints' / '12').mkdir(parents=True)
    assert not weight_file.is_weights(str(tmp_path))


@pytest.mark.parametrize(
    ('place', 'value', 'message'),
    [
        (
            'label_names',
            list('vwxyz'),
            "label_names=.*'v'.* under flax_densenet it say",
        ),
        ('num_classes', 4, '5 label_names for num_classes=4'),
        ('pretrained_cfg.mean', [0.1, 0.2, 0.3], 'mean=.*make both the same'),
        ('pretrained_cfg.crop_pct', 0.9, 'crop_fraction=0.9; .* crop_fraction=1'),
        ('pretrained_cfg.input_size', [3, 50, 50], 'image_size=50; .* image_size=48'),
        ('flax_densenet', {'model': {'variant': 'L40k12'}}, 'class_names is missing'),
        (
            'flax_densenet.class_names',
            ['a'],
            '1 classes, but its classifier has 5',
        ),
        ('flax_densenet.model.growth_rate', 8, 'does not fit'),
        ('flax_densenet.image_size', 'x', 'image_size is'),
    ],
)
def test_a_config_of_ours_that_was_changed(place, value, message, tmp_path):
    folder = tmp_path / 'hub'
    formats.save(str(folder), trained_of(*tiny()), 'huggingface')
    config = json.loads((folder / 'config.json').read_text())
    config = changed(place, value, known=config)
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        weight_file.load(str(folder))
    assert '\n' not in str(caught.value)


def test_names_may_be_changed_in_both_places(tmp_path):
    """The folder's metadata comes before the file's own."""
    folder = tmp_path / 'hub'
    formats.save(str(folder), trained_of(*tiny()), 'huggingface')
    text = (folder / 'config.json').read_text()
    (folder / 'config.json').write_text(text.replace('class 3', 'wasps'))
    assert weight_file.load(str(folder)).class_names[3] == 'wasps'


def test_what_is_there_already(tmp_path):
    """Ours is replaced as a whole, whatever else there is stays."""
    trained = trained_of(*tiny())
    out = tmp_path / 'hub'
    out.mkdir()
    formats.save(str(out), trained, 'huggingface')  # over an empty one
    (out / 'config.json').write_text((out / 'config.json').read_text() + '\n')
    formats.save(str(out) + '/', trained, 'huggingface')
    assert not (out / 'config.json').read_text().endswith('\n\n')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['hub']
    (out / 'notes.txt').write_text('mine')
    with pytest.raises(
        UserError, match='holds notes.txt, which an export would remove'
    ):
        formats.save(str(out), trained, 'huggingface')
    (out / 'notes.txt').unlink()
    (out / 'README.md').write_text('my own words')
    with pytest.raises(UserError, match='README.md exists and was not written by'):
        formats.save(str(out), trained, 'huggingface')
    write_timm(tmp_path / 'timm')
    with pytest.raises(UserError, match='was not exported by this program'):
        formats.save(str(tmp_path / 'timm'), trained, 'huggingface')
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'link').symlink_to(out)
    for name in ('file', 'link'):
        with pytest.raises(UserError, match='exists and is not a folder'):
            formats.save(str(tmp_path / name), trained, 'huggingface')
    assert sorted(p.name for p in out.iterdir()) == FILES


def test_an_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    trained = trained_of(*tiny())
    out = tmp_path / 'hub'
    formats.save(str(out), trained, 'huggingface')
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    other = trained_of(*tiny(growth_rate=6, stem_features=12))

    def fail(*_, **__):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patched:
        patched.setattr(model_card, 'render', fail)
        with pytest.raises(UserError, match='hub cannot be written .No space left'):
            formats.save(str(out), other, 'huggingface')
    rename, calls = hub.os.rename, []

    def second_fails(*places):
        calls.append(places)
        if len(calls) == 2:
            fail()
        rename(*places)

    with monkeypatch.context() as patched:
        patched.setattr(hub.os, 'rename', second_fails)
        with pytest.raises(UserError, match='No space left'):
            formats.save(str(out), other, 'huggingface')
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ['hub']


def test_what_would_be_uploaded(tmp_path, monkeypatch):
    """The three files, by huggingface_hub itself, which is kept from the network."""
    pytest.importorskip('huggingface_hub')
    from huggingface_hub import hf_api

    api = hf_api.HfApi()
    formats.save(str(tmp_path / 'hub'), trained_of(*tiny()), 'huggingface')
    sent = {}

    def create_commit(*, repo_id, operations, **_):
        sent[repo_id] = sorted(o.path_in_repo for o in operations)
        raise InterruptedError

    monkeypatch.setattr(api, 'create_commit', create_commit)
    # The one way in several commits, and what asks the Hub whether the header is right.
    monkeypatch.setattr(hf_api, 'is_xet_available', lambda: False, raising=False)
    monkeypatch.setattr(api, '_validate_yaml', lambda **_: None, raising=False)
    with pytest.raises(InterruptedError):
        api.upload_folder(repo_id='somebody/birds', folder_path=tmp_path / 'hub')
    assert sent == {'somebody/birds': FILES}


def test_prediction(tmp_path):
    """The same from the folder as from the file that it was made of."""
    file = make_weights(tmp_path / 'x.safetensors')
    formats.save(str(tmp_path / 'hub'), trained_lib.load_trained(file), 'huggingface')
    write_images(tmp_path / 'photos', {'a': 2})
    photos = sorted((tmp_path / 'photos' / 'a').iterdir())
    one, other = (
        load_trained(path, batch_size=4).predict(photos)
        for path in (file, tmp_path / 'hub')
    )
    assert [p.label for p in one] == [p.label for p in other]
    assert [p.probability for p in one] == [p.probability for p in other]
    shutil.rmtree(tmp_path / 'photos')


def test_a_config_that_says_little(tmp_path):
    """What it leaves open is as timm has it."""
    settings = timm_config.preprocessing_of('x', {})
    assert settings['interpolation'] == 'bicubic'
    assert settings['crop_fraction'] == 0.875
