"""Beside the real timm: RDNet, and the DenseNets that torchvision does not have."""

import importlib.util

import jax
import numpy as np
import pytest

from flax_densenet import VARIANTS, create_model, evaluate, export, layers, weights
from flax_densenet.errors import UserError

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
    return evaluate.Trained(found.module, found.variables, metadata, {}, 0, None)


def assert_exported(found, model, tmp_path):
    """timm's state dict comes out as it went in, by both formats."""
    state = {k: v for k, v in model.state_dict().items() if 'num_batches' not in k}
    for form, name in (('torch', 'b.pth'), ('safetensors', 'b.safetensors')):
        path = str(tmp_path / name)
        export.save(path, trained_of(found), form)
        read = torch.load
        if form == 'safetensors':
            read = pytest.importorskip('safetensors.torch').load_file
        exported = read(path)
        assert exported.keys() == model.state_dict().keys()
        assert all(torch.equal(exported[key], state[key]) for key in state)
        model.load_state_dict(exported, strict=True)
        again = weights.load(path)
        assert again.module == found.module
        jax.tree.map(np.testing.assert_array_equal, again.variables, found.variables)


@pytest.mark.parametrize('prefix', ['', 'module.', 'nv'])
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
    found = weights.load(str(tmp_path / 'a.pth'))
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
    found = weights.load(str(tmp_path / 'a.pth'))
    assert (found.num_classes, found.module.layer_scale) == (0, 0)
    assert found.module.bottleneck == 2
    assert_same_function(model, found.module, found.variables)
    for fields in ({'stem_type': 'overlap'}, {'head_norm_first': True}):
        torch.save(small(timm, **fields).state_dict(), tmp_path / 'b.pth')
        with pytest.raises(UserError, match='does not fit an RDNet of .*unexpected: '):
            weights.load(str(tmp_path / 'b.pth'))


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


@pytest.mark.parametrize('blur', [True, False])
def test_deep_stem(blur, timm, tmp_path):
    torch.manual_seed(0)
    aa_layer = timm.layers.BlurPool2d if blur else None
    model = timm.models.densenet.DenseNet(
        growth_rate=8, block_config=(2, 2), stem_type='deep', aa_layer=aa_layer,
        num_classes=5,
    )  # fmt: skip
    shake(model)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    found = weights.load(str(tmp_path / 'a.pth'))
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


@pytest.mark.slow
@pytest.mark.parametrize('name', ['rdnet_tiny', 'densenetblur121d'])
def test_full_size(name, timm, tmp_path):
    torch.manual_seed(0)
    model = shake(timm.create_model(name))
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    found = weights.load(str(tmp_path / 'a.pth'))
    assert found.fields == {'variant': name}
    crop = found.preprocessing['crop_fraction']
    assert crop == pytest.approx(model.pretrained_cfg['crop_pct'])
    assert found.preprocessing['interpolation'] == 'bicubic'
    assert_same_function(model, found.module, found.variables, size=(32, 45))
    arrays = export.torch_arrays(found.module, found.variables)
    state = model.state_dict()
    assert arrays.keys() == state.keys()
    assert all(np.array_equal(arrays[key], state[key].numpy()) for key in state)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', ['rdnet_small', 'rdnet_base', 'rdnet_large', 'densenet264d']
)
def test_shapes_of_the_large(name, timm):
    """Each array of timm's is one of ours, of the same shape."""
    from flax import traverse_util

    from flax_densenet import model as model_lib
    from flax_densenet import rdnet_files

    with torch.device('meta'):
        theirs = timm.create_model(name).state_dict()
    module = create_model(name, num_classes=1000)
    shapes = traverse_util.flatten_dict(model_lib.variable_shapes(module), sep='/')
    key = rdnet_files.torch_key if 'rdnet' in name else weights.torch_key
    layouts = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
    ours = {
        key(place): tuple(leaf.shape[axis] for axis in layouts[leaf.ndim])
        for place, leaf in shapes.items()
    }
    theirs = {k: tuple(v.shape) for k, v in theirs.items() if 'num_batches' not in k}
    assert ours == theirs
