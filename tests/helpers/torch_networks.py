"""Networks of torch and torchvision with random weights, for comparisons."""

import importlib.util

import pytest


def import_torchvision():
    """torchvision, without its compiled operators; skips where it is absent."""
    if importlib.util.find_spec('torchvision') is None:
        pytest.skip('torchvision is not installed')
    from benchmarks import torch_models

    return torch_models.import_torchvision()


def shake(model):
    """Random statistics and scales, so that none of them could be left out."""
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
    """A DenseNet of two blocks."""
    import torch

    fields = dict(growth_rate=8, block_config=(2, 2), num_init_features=16) | fields
    torch.manual_seed(0)
    return shake(torchvision.models.DenseNet(**fields))
