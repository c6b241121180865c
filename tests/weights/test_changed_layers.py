"""Pickled networks with layers that were changed and have no arrays."""

import collections

import jax
import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import weight_file
from helpers import torch_networks
from helpers.torch_networks import shake

torch = pytest.importorskip('torch')
nn = torch.nn
WIDTH = 20
FORMS = {'zip': True, 'legacy': False}


@pytest.fixture(scope='module')
def networks():
    torch_networks.import_torchvision()
    from torchvision.models import densenet

    return densenet


def net(networks):
    torch.manual_seed(0)
    return shake(networks.DenseNet(4, (2, 3), 8, bn_size=2, num_classes=5))


def save(model, tmp_path, form='zip'):
    path = str(tmp_path / f'{form}.pth')
    torch.save(model.eval(), path, _use_new_zipfile_serialization=FORMS[form])
    return path


def replaced(**layers):
    """A change of layers, with `__` for each dot of their names."""

    def change(model):
        for name, layer in layers.items():
            *parents, last = name.split('__')
            part = model.get_submodule('.'.join(parents))
            setattr(part, last, layer)

    return change


def attributes(place, **values):
    def change(model):
        vars(model.get_submodule(place)).update(values)

    return change


CONV2 = 'features.denseblock1.denselayer2.conv2'
BODIES = {
    'features.pool0 is Identity where a DenseNet has MaxPool2d': replaced(
        features__pool0=nn.Identity()
    ),
    'features.pool0 is AvgPool2d where a DenseNet has MaxPool2d': replaced(
        features__pool0=nn.AvgPool2d(3, 2, 1)
    ),
    'features.relu0 is Identity where a DenseNet has ReLU': replaced(
        features__relu0=nn.Identity()
    ),
    'features.denseblock2.denselayer1.relu2 is SiLU where a DenseNet has': replaced(
        features__denseblock2__denselayer1__relu2=nn.SiLU()
    ),
    'features.transition1.pool is MaxPool2d where a DenseNet has AvgPool2d': replaced(
        features__transition1__pool=nn.MaxPool2d(2)
    ),
    'features.transition1.pool is Identity where a DenseNet has AvgPool2d': replaced(
        features__transition1__pool=nn.Identity()
    ),
    'features.p is MaxPool2d, which no DenseNet has there': (
        lambda model: model.features.add_module('p', nn.MaxPool2d(2))
    ),
    'features.pool0 has no ReLU in front of it': (
        lambda model: delattr(model.features, 'relu0')
    ),
    'features.conv0 has stride=1 where a DenseNet has 2': attributes(
        'features.conv0', stride=(1, 1)
    ),
    f'{CONV2} has padding=2 where a DenseNet has 1': attributes(
        CONV2, dilation=(2, 2), padding=(2, 2)
    ),
    f'{CONV2} has padding_mode=reflect where a DenseNet has zeros': attributes(
        CONV2, padding_mode='reflect'
    ),
    'features.pool0 has ceil_mode=True where a DenseNet has False': attributes(
        'features.pool0', ceil_mode=True
    ),
    'features.norm0 has eps=0.001 and .*transition1.norm has eps=1e-05': attributes(
        'features.norm0', eps=1e-3
    ),
}


@pytest.mark.parametrize('message', BODIES)
def test_a_changed_body_is_refused(message, networks, tmp_path):
    model = net(networks)
    form = 'legacy' if 'pool0 is Identity' in message else 'zip'
    BODIES[message](model)
    with pytest.raises(UserError, match=f'its {message}.*run it in torch') as error:
        weight_file.load(save(model, tmp_path, form))
    assert '\n' not in str(error.value)


FRONTS = {
    'Upsample': nn.Upsample(scale_factor=2),
    'InstanceNorm2d': nn.InstanceNorm2d(3),
    'Conv2d': nn.Conv2d(3, 3, 1),
    'BatchNorm2d': nn.BatchNorm2d(3),
}


@pytest.mark.parametrize('kind', FRONTS)
def test_a_layer_in_front_is_refused(kind, networks, tmp_path):
    layer, model = FRONTS[kind], net(networks)
    path = save(nn.Sequential(layer, model), tmp_path)
    with pytest.raises(UserError, match=rf'its 0 is {kind} in .*save\(model\[1\], F'):
        weight_file.load(path)
    inner = nn.Sequential(nn.Dropout(), nn.Sequential(layer))
    named = collections.OrderedDict(prepare=inner, net=nn.DataParallel(model))
    path = save(nn.Sequential(named), tmp_path)
    with pytest.raises(UserError, match=rf'its prepare.1.0 is {kind} in front of'):
        weight_file.load(path)


def named_head(model, **layers):
    linear = nn.Linear(WIDTH, 5)
    layers = {'features': model.features, **layers, 'classifier': linear}
    return nn.Sequential(collections.OrderedDict(layers))


def timm_net(**fields):
    timm = pytest.importorskip('timm.models.densenet')
    torch.manual_seed(0)
    model = timm.DenseNet(4, (2, 3), num_classes=5, bn_size=2, **fields)
    return shake(model)


def body_of_timm(model):
    del model
    layers = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 5))
    return nn.Sequential(timm_net().features, *layers)


def inner_network(model):
    model.classifier = nn.Identity()
    return nn.Sequential(model, nn.Dropout(), nn.Linear(WIDTH, 5))


def another_epsilon(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return model


def blurred(model):
    del model
    layers = pytest.importorskip('timm.layers')
    return timm_net(stem_type='deep', aa_layer=layers.BlurPool2d)


RELU, FLAT = nn.ReLU(), nn.Flatten()
MEAN, MAX = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)
NO_RELU = {'last_relu': False}
READ = {
    'max': (lambda m: named_head(m, a=RELU, b=MAX, c=FLAT), {'pooling': 'max'}),
    'no ReLU': (lambda m: named_head(m, b=MEAN, c=FLAT), NO_RELU),
    'nested': (
        lambda m: nn.Sequential(
            nn.Sequential(m.features), nn.Sequential(MEAN, FLAT, nn.Linear(WIDTH, 5))
        ),
        NO_RELU,
    ),
    'usual': (lambda m: named_head(m, a=RELU, b=MEAN, c=FLAT), {}),
    'inner network': (inner_network, {}),
    "timm's maximum": (lambda _: timm_net(global_pool='max'), {'pooling': 'max'}),
    "timm's last ReLU": (body_of_timm, {}),
    'blur': (blurred, {'blur_pool': True}),
    'epsilon': (another_epsilon, {'epsilon': 1e-3}),
}


@pytest.mark.parametrize('kind', READ)
def test_what_a_file_says_is_computed(kind, networks, tmp_path):
    make, expected = READ[kind]
    found = weight_file.load(save(make(net(networks)), tmp_path))
    assert not found.head and found.num_classes == 5
    usual = {'last_relu': True, 'pooling': 'mean', 'blur_pool': False, 'epsilon': 1e-5}
    actual = {name: getattr(found.module, name) for name in usual}
    assert actual == usual | expected


def test_numbers_of_what_a_file_says(networks, tmp_path):
    """Another epsilon and other layers in front of the classifier: torch's logits."""
    model = named_head(another_epsilon(net(networks)), pool=MAX, flat=FLAT).eval()
    found = weight_file.load(save(model, tmp_path))
    images = np.random.default_rng(1).standard_normal((2, 64, 64, 3)).astype('f4')
    with torch.inference_mode():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    ours = jax.jit(found.module.apply)(found.variables, images)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def with_head(*layers):
    def change(model):
        model.classifier = nn.Sequential(*layers)
        return model

    return change


HEADS = {
    'global_pool.pool is a .*AvgMaxPool': lambda _: timm_net(global_pool='avgmax'),
    'it has no global pooling': lambda m: named_head(m, a=RELU, b=FLAT),
    'classifier.0 is a Sigmoid': with_head(nn.Sigmoid(), nn.Linear(WIDTH, 5)),
    r'1 \(Softmax over dim 0\)': lambda m: nn.Sequential(m, nn.Softmax(0)),
}


@pytest.mark.parametrize('reason', HEADS)
def test_other_heads_are_refused(reason, networks, tmp_path):
    path = save(HEADS[reason](net(networks)), tmp_path)
    with pytest.raises(UserError, match=reason):
        trained_lib.load_trained(path)


def test_the_epsilon_of_a_norm_in_the_head(networks, tmp_path):
    kernels = []
    for epsilon in (1e-5, 1.0):
        model, norm = net(networks), nn.BatchNorm1d(WIDTH, eps=epsilon)
        torch.manual_seed(0)
        model.classifier = nn.Sequential(norm, nn.Linear(WIDTH, 5))
        found = weight_file.load(save(model, tmp_path))
        kernels.append(found.variables['params']['classifier']['kernel'])
    np.testing.assert_allclose(kernels[0], kernels[1] * np.sqrt(2), rtol=1e-4)


def small_stem(model):
    model.features = nn.Sequential(
        collections.OrderedDict(
            conv0=nn.Conv2d(3, 8, 3, padding='same', bias=False),
            **dict(list(model.features.named_children())[4:]),
        )
    )
    return model


def numbered(model):
    model.features = nn.Sequential(*model.features.children())
    return model


def with_silent_layers(model):
    model.features.transition1.add_module('drop', nn.Dropout2d())
    model.features.add_module('last', nn.ReLU())
    layer = model.features.denseblock1.denselayer1
    layer.conv2.padding = 'same'
    return nn.Sequential(nn.Identity(), nn.DataParallel(model), nn.Dropout())


KEPT = {
    'torchvision': lambda m: m,
    'timm': lambda _: timm_net(),
    'timm deep': lambda _: timm_net(stem_type='deep'),
    'small stem': small_stem,
    'numbered': numbered,
    'silent': with_silent_layers,
}


@pytest.mark.parametrize('kind', KEPT)
def test_unchanged_networks_are_read(kind, networks, tmp_path):
    """As their state dicts, which say nothing about such layers."""
    model = KEPT[kind](net(networks))
    torch.save(model.state_dict(), tmp_path / 'state.pth')
    expected = weight_file.load(str(tmp_path / 'state.pth'))
    for form in FORMS if kind == 'torchvision' else ['zip']:
        found = weight_file.load(save(model, tmp_path, form))
        assert not found.head and found.fields == expected.fields
        jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
