"""Networks of torch and torchvision with random weights, for comparisons."""

import importlib.util

import pytest


def import_torchvision():
    """Imports torchvision without its compiled operators, or skips the test."""
    if importlib.util.find_spec('torchvision') is None:
        pytest.skip('torchvision is not installed')
    from benchmarks import torch_models

    return torch_models.import_torchvision()


def shake(model):
    """Sets random statistics and scales, so that each of them matters."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def uniform(like, low, high):
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.copy_(uniform(module.weight, 0.5, 1.5))
                module.bias.copy_(uniform(module.bias, -0.3, 0.3))
                module.running_mean.copy_(uniform(module.bias, -0.3, 0.3))
                module.running_var.copy_(uniform(module.bias, 0.5, 1.5))
    return model.eval()


def small(torchvision, **fields):
    """A DenseNet with two blocks."""
    import torch

    fields = dict(growth_rate=8, block_config=(2, 2), num_init_features=16) | fields
    torch.manual_seed(0)
    return shake(torchvision.models.DenseNet(**fields))
