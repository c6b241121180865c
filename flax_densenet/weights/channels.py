"""Weights and their preprocessing for another number of image channels."""

from typing import Any

import numpy as np


def with_channels(preprocessing: dict[str, Any], channels: int) -> dict[str, Any]:
    """Preprocessing for images of another number of channels: one mean for all."""
    if len(preprocessing['mean']) == channels:
        return preprocessing | {'channels': channels}
    return preprocessing | {
        'channels': channels,
        'mean': (float(np.mean(preprocessing['mean'])),) * channels,
        'std': (float(np.mean(preprocessing['std'])),) * channels,
    }


def convert_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The first kernel `[H, W, C, F]` for another number of channels, as timm does.

    To one channel: the sum over the old ones, so a gray image gives what its three
    equal channels gave. From one, or to any other number: repeated, and divided so
    that equal channels give the same sum.
    """
    old = kernel.shape[2]
    if channels == old:
        return kernel
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, -(-channels // old), 1))[:, :, :channels]
    return (repeated * (old / channels)).astype(kernel.dtype)
