"""Heads of several layers in real modules of torch: equal logits and probabilities."""

import collections
import importlib.util

import jax
import numpy as np
import pytest

from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import weight_file

torch = pytest.importorskip('torch')
nn = torch.nn


@pytest.fixture(scope='module')
def torchvision():
    if importlib.util.find_spec('torchvision') is None:
        pytest.skip('torchvision is not installed')
    from benchmarks import torch_models

    return torch_models.import_torchvision()


def shake(model):
    """Random statistics and scales."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
    return model.eval()


def densenet(torchvision, head=None):
    torch.manual_seed(0)
    model = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5)
    if head:
        model.classifier = head(model.classifier.in_features)
    return model


class ConcatPool(nn.Module):
    """fastai's: the maximum, then the mean."""

    def forward(self, x):
        return torch.cat([x.amax((2, 3), keepdim=True), x.mean((2, 3), True)], 1)


def fastai(torchvision):
    """As its vision_learner makes it of torchvision's network."""
    model = densenet(torchvision)
    width = model.classifier.in_features
    body = nn.Sequential(*list(model.children())[:-1])
    head = nn.Sequential(
        *(ConcatPool(), nn.Flatten(), nn.BatchNorm1d(2 * width), nn.Dropout(0.25)),
        *(nn.Linear(2 * width, 12, bias=False), nn.ReLU(), nn.BatchNorm1d(12)),
        *(nn.Dropout(0.5), nn.Linear(12, 5, bias=False)),
    )
    return nn.Sequential(body, head)


def named(width):
    layers = {
        'fc1': nn.Linear(width, 12),
        'relu': nn.ReLU(),
        'fc2': nn.Linear(12, 5),
        'output': nn.LogSoftmax(dim=1),
    }
    return nn.Sequential(collections.OrderedDict(layers))


def norms(width):
    return nn.Sequential(
        *(nn.BatchNorm1d(width), nn.Dropout(), nn.Linear(width, 12)),
        *(nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5)),
    )


def ambiguous(width):
    return nn.Sequential(
        *(nn.Linear(width, 12), nn.Dropout(), nn.BatchNorm1d(12), nn.ReLU()),
        *(nn.Linear(12, 3), nn.Sigmoid()),
    )


def front(torchvision):
    model = densenet(torchvision)
    width = model.classifier.in_features
    return nn.Sequential(
        *(model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)),
    )


def rectified(torchvision):
    first, *others = front(torchvision)
    return nn.Sequential(first, nn.ReLU(), *others)


MODELS = {
    'named': lambda tv: densenet(tv, named),
    'norms': lambda tv: densenet(tv, norms),
    'ambiguous': lambda tv: densenet(tv, ambiguous),
    'front': front,
    'rectified': rectified,
    'fastai': fastai,
}
LAST = {'named': 'softmax', 'ambiguous': 'sigmoid'}


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('kind', MODELS)
def test_logits(kind, whole, torchvision, tmp_path):
    if whole and kind == 'fastai':
        return  # its pooling is a class of another project, which is refused
    model, path = shake(MODELS[kind](torchvision)), str(tmp_path / 'x.pth')
    torch.save(model if whole else model.state_dict(), path)
    found = weight_file.load(path)
    if kind == 'ambiguous' and not whole:
        assert 'unclear where the ReLU' in found.head_reason
        return
    # What is pickled leaves nothing to guess.
    assert not found.head and bool(found.notes) is not whole
    images = np.random.default_rng(1).standard_normal((3, 64, 64, 3)).astype('f4')
    with torch.inference_mode():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    ours = np.asarray(jax.jit(found.module.apply)(found.variables, images))
    if kind in LAST:
        assert found.outputs == (LAST[kind] if whole else None)
        activate = {'softmax': jax.nn.log_softmax, 'sigmoid': jax.nn.sigmoid}
        ours = activate[LAST[kind]](ours)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    assert trained_lib.load_trained(path).module == found.module


def test_monai(tmp_path):
    nets = pytest.importorskip('monai.networks.nets')
    torch.manual_seed(0)
    model = shake(nets.DenseNet(2, 1, 5, init_features=16, growth_rate=8,
        block_config=(2, 2)))  # fmt: skip
    images = np.random.default_rng(1).standard_normal((3, 64, 64, 1)).astype('f4')
    with torch.inference_mode():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    for whole in (True, False):
        path = str(tmp_path / 'x.pt')
        torch.save(model if whole else model.state_dict(), path)
        found = weight_file.load(path)
        ours = jax.jit(found.module.apply)(found.variables, images)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
        assert not found.notes and found.num_classes == 5
