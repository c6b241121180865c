"""Networks of torchvision, with a version of torch for which torchvision has no build.

There is no CPU build of torchvision for this torch. Installed with `--no-deps`, it
lacks its compiled operators, which its models do not use. Declaring the names of the
operators first makes the pure Python part importable.
"""

import functools
import importlib.util
import pathlib
import re

import torch


@functools.cache  # a process may declare the names once
def import_torchvision():
    """Returns the torchvision module."""
    library = torch.library.Library('torchvision', 'DEF')
    folder = pathlib.Path(importlib.util.find_spec('torchvision').origin).parent
    source = (folder / '_meta_registrations.py').read_text()
    names = set(re.findall(r'torchvision::(\w+)', source))
    names |= set(re.findall(r'register_meta\("(\w+)"\)', source)) | {'nms', 'qnms'}
    for name in sorted(names):
        library.define(f'{name}(Tensor a) -> Tensor')
    import torchvision

    torchvision.flax_densenet_library = library  # else its names go with it
    return torchvision


def make_cifar(depth: int, growth_rate: int):
    """DenseNet-BC for 32x32 images, from torchvision's blocks, stem without pooling."""
    torchvision = import_torchvision()
    layers = (depth - 4) // 6
    model = torchvision.models.DenseNet(
        growth_rate=growth_rate,
        block_config=(layers,) * 3,
        num_init_features=2 * growth_rate,
        num_classes=10,
    )
    model.features.conv0 = torch.nn.Conv2d(3, 2 * growth_rate, 3, padding=1, bias=False)
    for name in ('norm0', 'relu0', 'pool0'):
        delattr(model.features, name)
    return model


class _PlainLayer(torch.nn.Module):
    """Norm, ReLU, 3x3 convolution, dropout, concatenated to the input."""

    def __init__(self, channels, growth_rate, dropout):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(channels)
        self.conv = torch.nn.Conv2d(channels, growth_rate, 3, padding=1, bias=False)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x):
        y = self.conv(torch.nn.functional.relu(self.norm(x), inplace=True))
        return torch.cat([x, self.dropout(y)], 1)


def make_cifar_plain(depth: int, growth_rate: int, *, dropout: float):
    """DenseNet for 32x32 images without bottleneck and compression, as the paper's."""
    nn, channels = torch.nn, 16
    parts = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for block in range(3):
        for _ in range((depth - 4) // 3):
            parts.append(_PlainLayer(channels, growth_rate, dropout))
            channels += growth_rate
        parts += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        if block < 2:
            parts += [nn.Conv2d(channels, channels, 1, bias=False), nn.AvgPool2d(2)]
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*parts)


def make_rdnet(num_classes: int):
    """timm's RDNet-T."""
    import_torchvision()
    import timm

    return timm.create_model('rdnet_tiny', num_classes=num_classes)
