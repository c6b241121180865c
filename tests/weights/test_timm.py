"""Beside the real timm: RDNet, and the DenseNets that torchvision does not have."""

import importlib.util

import jax
import numpy as np
import pytest

from flax_densenet import VARIANTS, create_model
from flax_densenet.errors import UserError
from flax_densenet.export import formats
from flax_densenet.models import layers
from flax_densenet.weights import torch_names, weight_file
from flax_densenet.weights import trained as trained_lib
from helpers.marks import exhaustive_after

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def timm():
    if importlib.util.find_spec('timm') is None:
        pytest.skip('timm is not installed')
    from benchmarks import torch_models

    torch_models.import_torchvision()  # timm imports it
    import timm

    return timm


def shake(model):
    """Random values for all that begins at 0, at 1 or too small to be seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, leaf in [*model.named_parameters(), *model.named_buffers()]:
            if leaf.ndim == 1:
                low, high = (
                    (-0.3, 0.3) if name.endswith(('bias', 'mean')) else (0.5, 1.5)
                )
                values = torch.rand(leaf.shape, generator=generator)
                leaf.copy_(values * (high - low) + low)
    return model.eval()


SMALL = dict(
    growth_rates=(8, 16, 8, 8),
    num_blocks_list=(1, 2, 2, 1),
    block_type=('Block', 'BlockESE', 'Block', 'BlockESE'),
    is_downsample_block=(None, True, False, True),
    num_init_features=12,
    num_classes=7,
)


def small(timm, **fields):
    torch.manual_seed(0)
    return shake(timm.models.rdnet.RDNet(**SMALL | fields))


def assert_same_function(model, module, variables, size=(64, 77)):
    """Features and logits equal to 1e-4 of their spread, or better."""
    images = np.random.default_rng(1).standard_normal((2, *size, 3)).astype('f4')
    with torch.inference_mode():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        features = model.forward_features(x).permute(0, 2, 3, 1).numpy()
        pooled = model.forward_head(model.forward_features(x), pre_logits=True).numpy()
        logits = model(x).numpy()

    @jax.jit
    def run(variables, images):
        maps = module.apply(variables, images, method='features')
        pooled = module.apply(variables, maps, method='pool')
        return maps, pooled, module.apply(variables, images)

    maps, found, ours = run(variables, images)
    if 'norm5' in variables['params']:
        maps = np.maximum(maps, 0)  # timm's norm5 has its ReLU
    for one, other in ((maps, features), (found, pooled), (ours, logits)):
        assert one.shape == other.shape
        assert np.abs(one - other).max() < 1e-4 * other.std()


def trained_of(found):
    metadata = {
        'model': found.fields,
        'class_names': [str(n) for n in range(found.num_classes)],
        'image_size': 64,
        'mean': [0.5] * 3,
        'std': [0.5] * 3,
        'data': {'mean': [0.5] * 3},
    }
    return trained_lib.Trained(found.module, found.variables, metadata, {}, 0, None)


def assert_exported(found, model, tmp_path):
    """timm's state dict comes out as it went in, by both formats."""
    state = {k: v for k, v in model.state_dict().items() if 'num_batches' not in k}
    for form, name in (('torch', 'b.pth'), ('safetensors', 'b.safetensors')):
        path = str(tmp_path / name)
        formats.save(path, trained_of(found), form)
        read = torch.load
        if form == 'safetensors':
            read = pytest.importorskip('safetensors.torch').load_file
        exported = read(path)
        assert exported.keys() == model.state_dict().keys()
        assert all(torch.equal(exported[key], state[key]) for key in state)
        model.load_state_dict(exported, strict=True)
        again = weight_file.load(path)
        assert again.module == found.module
        jax.tree.map(np.testing.assert_array_equal, again.variables, found.variables)


@pytest.mark.parametrize('prefix', exhaustive_after(1, ['module.', '', 'nv']))
def test_small_rdnet(prefix, timm, tmp_path):
    """In and out again; with the names of the paper's authors' files too."""
    model = small(timm)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    if prefix == 'nv':
        state = {
            'model': {
                key.replace('stem.', 'stem.stem.', 1): value
                for key, value in model.state_dict().items()
            }
        }
    torch.save(state, tmp_path / 'a.pth')
    found = weight_file.load(str(tmp_path / 'a.pth'))
    assert (found.family, found.num_classes) == ('rdnet', 7)
    assert found.fields == {
        'variant': 'rdnet_tiny', 'growth_rates': (8, 16, 8, 8), 'bottleneck': 4,
        'block_sizes': (1, 2, 2, 1), 'halvings': (1, 3), 'squeeze_blocks': (2, 4),
        'compression': 0.5, 'patch_size': 4, 'stem_features': 12,
    }  # fmt: skip
    assert_same_function(model, found.module, found.variables)
    if not prefix:
        assert_exported(found, model, tmp_path)


def test_other_rdnets(timm, tmp_path):
    """Without classifier, without layer scale, of other ratios and stems."""
    model = small(timm, num_classes=0, ls_init_value=0, bottleneck_width_ratio=2.0,
                  transition_compression_ratio=0.75)  # fmt: skip
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    found = weight_file.load(str(tmp_path / 'a.pth'))
    assert (found.num_classes, found.module.layer_scale) == (0, 0)
    assert found.module.bottleneck == 2
    assert_same_function(model, found.module, found.variables)
    for fields in ({'stem_type': 'overlap'}, {'head_norm_first': True}):
        torch.save(small(timm, **fields).state_dict(), tmp_path / 'b.pth')
        with pytest.raises(UserError, match='does not fit an RDNet of .*unexpected: '):
            weight_file.load(str(tmp_path / 'b.pth'))


def test_drop_path_rates(timm):
    model = timm.create_model('rdnet_tiny', drop_path_rate=0.3)
    theirs = [
        getattr(module, 'drop_prob', None)
        for name, module in model.named_modules()
        if name.endswith('drop_path')
    ]
    ours = layers.drop_path_rates(
        0.3, create_model('rdnet_tiny', num_classes=1).block_sizes
    )
    np.testing.assert_allclose(np.ravel(ours), theirs, rtol=1e-6)


@pytest.mark.parametrize('blur', exhaustive_after(1, [True, False]))
def test_deep_stem(blur, timm, tmp_path):
    torch.manual_seed(0)
    aa_layer = timm.layers.BlurPool2d if blur else None
    model = timm.models.densenet.DenseNet(
        growth_rate=8, block_config=(2, 2), stem_type='deep', aa_layer=aa_layer,
        num_classes=5,
    )  # fmt: skip
    shake(model)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    found = weight_file.load(str(tmp_path / 'a.pth'))
    assert (found.family, found.module.stem) == ('timm', 'deep')
    for fast in (True, False):
        module = found.module.clone(blur_pool=blur, fast=fast)
        assert_same_function(model, module, found.variables)
        with pytest.raises(AssertionError):
            other = module.clone(blur_pool=not blur)
            assert_same_function(model, other, found.variables)
    assert_exported(found, model, tmp_path)


def test_every_name_of_timm(timm):
    """Is a variant; with a tag of weights one line says what to write."""
    names = timm.list_models(['*densenet*', '*rdnet*'])
    assert len(names) == 10
    assert not [name for name in names if name not in VARIANTS]
    tagged = timm.list_models(['*densenet*', '*rdnet*'], pretrained=True)
    assert 'densenetblur121d.ra_in1k' in tagged
    for name in tagged:
        base = name.split('.')[0]
        with pytest.raises(UserError, match=f'use model.variant={base}, with --config'):
            create_model(name, num_classes=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', ['rdnet_tiny', 'densenetblur121d'])
def test_full_size(name, timm, tmp_path):
    torch.manual_seed(0)
    model = shake(timm.create_model(name))
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    found = weight_file.load(str(tmp_path / 'a.pth'))
    assert found.fields == {'variant': name}
    crop = found.preprocessing['crop_fraction']
    assert crop == pytest.approx(model.pretrained_cfg['crop_pct'])
    assert found.preprocessing['interpolation'] == 'bicubic'
    assert_same_function(model, found.module, found.variables, size=(32, 45))
    arrays = formats.torch_arrays(found.module, found.variables)
    state = model.state_dict()
    assert arrays.keys() == state.keys()
    assert all(np.array_equal(arrays[key], state[key].numpy()) for key in state)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    'name', ['rdnet_small', 'rdnet_base', 'rdnet_large', 'densenet264d']
)
def test_shapes_of_the_large(name, timm):
    """Each array of timm's is one of ours, of the same shape."""
    from flax import traverse_util

    from flax_densenet.models import initialization
    from flax_densenet.weights import rdnet_names

    with torch.device('meta'):
        theirs = timm.create_model(name).state_dict()
    module = create_model(name, num_classes=1000)
    shapes = traverse_util.flatten_dict(initialization.variable_shapes(module), sep='/')
    key = rdnet_names.torch_key if 'rdnet' in name else torch_names.torch_key
    layouts = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
    ours = {
        key(place): tuple(leaf.shape[axis] for axis in layouts[leaf.ndim])
        for place, leaf in shapes.items()
    }
    theirs = {k: tuple(v.shape) for k, v in theirs.items() if 'num_batches' not in k}
    assert ours == theirs


HUB_NETWORKS = {
    'densenet': dict(variant='densenet121', growth_rate=4, block_sizes=(2, 3),
                     stem_features=8, bottleneck=2),
    'gray': dict(variant='densenet121', growth_rate=4, block_sizes=(2, 3),
                 stem_features=8),
    'blur': dict(variant='densenetblur121d', growth_rate=8, block_sizes=(2, 2),
                 stem_features=16),
    'deep': dict(variant='densenet264d', growth_rate=8, block_sizes=(2, 2),
                 stem_features=16, epsilon=1e-3),
    'rdnet': dict(variant='rdnet_tiny', growth_rates=(8, 16, 8, 8), bottleneck=3,
                  block_sizes=(1, 2, 2, 1), halvings=(1, 3), squeeze_blocks=(2, 4),
                  stem_features=12),
    'rdnet without layer scale': dict(
        variant='rdnet_tiny', growth_rates=(8, 16), bottleneck=4, block_sizes=(1, 2),
        halvings=(1,), squeeze_blocks=(), stem_features=16, layer_scale=0.0),
}  # fmt: skip


def shaken(module, channels):
    """Variables of which none is simple."""
    from flax import traverse_util

    from flax_densenet import init_variables

    flat = traverse_util.flatten_dict(init_variables(module, 0, channels=channels))
    rng = np.random.default_rng(0)
    for path, leaf in flat.items():
        if path[-1] != 'kernel':  # those are random already
            leaf = leaf + rng.uniform(-0.3, 0.3, leaf.shape)
        flat[path] = np.asarray(leaf, np.float32)
    made = traverse_util.unflatten_dict(flat)
    return {'batch_stats': {}} | made


def assert_hub(timm, module, fields, folder, *, channels=3, resize='crop'):
    """timm makes the network of a folder of ours, and prepares the same images."""
    from PIL import Image

    variables = shaken(module, channels)
    names = [f'class {n}' for n in range(module.num_classes)]
    metadata = {
        'model': fields, 'class_names': names, 'image_size': 48,
        'mean': [0.5, 0.4, 0.3][:channels], 'std': [0.2, 0.3, 0.25][:channels],
        'data': {'resize': resize, 'crop_fraction': 0.75, 'interpolation': 'bicubic'},
    }  # fmt: skip
    trained = trained_lib.Trained(module, variables, metadata, {}, None, None)
    formats.save(str(folder), trained, 'huggingface')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    found = weight_file.load(str(folder))
    images = np.random.default_rng(1).standard_normal((2, 64, 48, channels))
    images = images.astype('f4')
    with torch.inference_mode():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        logits = model(x).numpy()
    for network, arrays in ((module, variables), (found.module, found.variables)):
        ours = jax.jit(network.apply)(arrays, images)
        assert np.abs(ours - logits).max() < 1e-4 * logits.std()
    assert list(model.pretrained_cfg['label_names']) == names
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config)
    photo = np.random.default_rng(2).integers(0, 255, (9, 12, 3), np.uint8)
    photo = Image.fromarray(photo).resize((200, 150))
    theirs = transform(photo if channels == 3 else photo.convert('L'))
    ours = trained_lib.preparation_of(found_metadata(found)).apply(photo)
    ours = trained_lib.normalize(ours[None], mean=metadata['mean'], std=metadata['std'])
    difference = np.asarray(ours)[0] - theirs.permute(1, 2, 0).numpy()
    assert difference.shape == (48, 48, channels)
    assert np.abs(difference).max() < 0.1  # a few of 255 steps, at the edges
    return model


def found_metadata(found):
    return found.metadata | {'image_size': found.preprocessing['image_size']}


@pytest.mark.parametrize('kind', exhaustive_after(2, HUB_NETWORKS))
def test_folder_for_the_hub(kind, timm, tmp_path):
    fields = HUB_NETWORKS[kind]
    module = create_model(num_classes=5, **fields)
    channels, resize = (1, 'stretch') if kind == 'gray' else (3, 'crop')
    model = assert_hub(
        timm, module, fields, tmp_path / 'a', channels=channels, resize=resize
    )
    # As timm itself saves it, without anything of ours.
    timm.models.save_for_hf(model, str(tmp_path / 'b'), safe_serialization=True)
    found = weight_file.load(str(tmp_path / 'b'))
    ours = weight_file.load(str(tmp_path / 'a'))
    assert found.class_names is None or found.class_names == ours.class_names
    assert found.module.clone(epsilon=1) == ours.module.clone(epsilon=1)
    jax.tree.map(np.testing.assert_array_equal, found.variables, ours.variables)
    keep = ('image_size', 'resize', 'interpolation', 'mean', 'std', 'channels')
    for name in keep:
        assert found.preprocessing[name] == ours.preprocessing[name], name
    timm.models.save_for_hf(model, str(tmp_path / 'c'))
    (tmp_path / 'c' / 'model.safetensors').unlink(missing_ok=True)
    again = weight_file.load(str(tmp_path / 'c'))  # pytorch_model.bin
    jax.tree.map(np.testing.assert_array_equal, again.variables, ours.variables)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize('name', ['densenet121', 'rdnet_tiny'])
def test_full_size_for_the_hub(name, timm, tmp_path):
    module = create_model(name, num_classes=7)
    model = assert_hub(timm, module, {'variant': name}, tmp_path / 'a')
    assert model.pretrained_cfg['architecture'] == name


@pytest.mark.parametrize(
    ('form', 'name', 'kind'),
    exhaustive_after(
        2,
        [
            ('safetensors', "b'irds.safetensors", 'blur'),
            ('torch', 'birds.pth', 'densenet'),
            ('torch', 'birds.pth', 'rdnet'),
            ('huggingface', 'a folder', 'gray'),
        ],
    ),
)
def test_code_of_cards(form, name, kind, timm, tmp_path, monkeypatch, capsys):
    """What a card says to do with a file gives the model's logits."""
    import re

    from PIL import Image

    from flax_densenet.export import model_card

    module = create_model(num_classes=3, **HUB_NETWORKS[kind])
    channels = 1 if kind == 'gray' else 3
    metadata = {
        'model': HUB_NETWORKS[kind], 'class_names': ['a', 'b', 'c'], 'image_size': 64,
        'mean': [0.5] * channels, 'std': [0.25] * channels, 'multi_label': False,
        'data': {'resize': 'crop', 'crop_fraction': 0.5, 'interpolation': 'bilinear'},
    }  # fmt: skip
    variables = shaken(module, channels)
    trained = trained_lib.Trained(module, variables, metadata, {}, None, None)
    monkeypatch.chdir(tmp_path)
    formats.save(name, trained, form)
    said = model_card.render(
        trained, file=name, file_format=form, hub=form == 'huggingface'
    )
    photo = np.random.default_rng(2).integers(0, 255, (9, 12, 3), np.uint8)
    Image.fromarray(photo).resize((160, 140)).save('photo.jpg')
    preparation, *blocks = re.findall(r'```python\n(.*?)```', said, re.S)
    names = {}
    exec(preparation, names)
    if channels == 1:
        names['image'] = names['image'].convert('L')
    expected = np.asarray(jax.jit(module.apply)(variables, names['x'][None]))
    if form == 'huggingface':  # its transforms take the photograph itself
        names['image'] = Image.open('photo.jpg').convert('L')
    capsys.readouterr()
    exec(blocks[-1], names)
    numbers = re.findall(r'-?\d+\.\d+(?:e[-+]\d+)?', capsys.readouterr().out)
    difference = np.abs(np.array(numbers, 'f4') - expected[0]).max()
    assert difference < (0.02 if form == 'huggingface' else 1e-3) * expected.std()
