"""Weights and their preprocessing for another number of image channels."""

from typing import Any

import numpy as np

from flax_densenet.errors import UserError


def with_channels(preprocessing: dict[str, Any], channels: int) -> dict[str, Any]:
    """Preprocessing for another number of channels: each gets the average values."""
    if len(preprocessing['mean']) == channels:
        return preprocessing | {'channels': channels}
    return preprocessing | {
        'channels': channels,
        'mean': (float(np.mean(preprocessing['mean'])),) * channels,
        'std': (float(np.mean(preprocessing['std'])),) * channels,
    }


def fit_means(prepared: dict[str, Any], channels: int) -> dict[str, Any] | None:
    """The fields read from a file, with a mean and std for each channel.

    Returns:
      None if the number of values differs from the number of channels.
    """
    fitted = dict(prepared)
    for name in prepared.keys() & {'mean', 'std'}:
        numbers = prepared[name]
        if len(set(numbers)) == 1:
            fitted[name] = tuple(numbers[:1]) * channels
        elif len(numbers) != channels:
            return None
    return fitted


def describe_conversion(old: int, channels: int) -> str:
    """Describes what `convert_channels` does."""
    if channels == 1:
        how = 'summed over the channels'
    else:
        how = f'repeated and multiplied by {old}/{channels}'
    return (
        f'made for images with {old} channel{"s" * (old > 1)}; for '
        f'data.channels={channels} its first convolution is {how}'
    )


def convert_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Converts the first kernel `[H, W, C, F]` to other image channels, like timm.

    To one channel: the sum over the old ones, so that a gray image gives the same
    result as three equal channels. To any other number: repeated and scaled, so that
    equal channels give the same result. The dtype stays the same.

    Raises:
      UserError: the old channels are neither gray nor color.
    """
    old = kernel.shape[2]
    if channels == old:
        return kernel
    if old not in (1, 3):
        raise UserError(
            f'data.channels={channels}: the weights are for images with {old} channels '
            f'of an unknown kind; use data.channels={old}'
        )
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, -(-channels // old), 1))[:, :, :channels]
    return (repeated * (old / channels)).astype(kernel.dtype)
