"""Random erasing, mixup and CutMix, on the device within the training step.

Random erasing (https://arxiv.org/abs/1708.04896) covers a box of an image with the mean
color. mixup (https://arxiv.org/abs/1710.09412) and CutMix
(https://arxiv.org/abs/1905.04899) then blend a partner from the same batch into each
image, everywhere or in a box. The loss of an image is the weighted mean of the losses
by its own and its partner's label (`blend`), so it works with any loss.

Everything is a function of the key and the global batch, independent of the devices.

>>> images = jnp.zeros((4, 8, 8, 3), jnp.uint8)
>>> mixing = Mixing(mixup=0.2)
>>> mixed = mix(images, jax.random.key(0), mixing, mean=(0.5, 0.5, 0.5))
>>> mixed.images.shape, mixed.images.dtype, mixed.partners.shape, mixed.weights.shape
((4, 8, 8, 3), dtype('float32'), (4,), (4,))
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_densenet import settings
from flax_densenet.errors import UserError

# Random erasing: share of the area, and aspect ratio; as in torchvision and timm.
ERASE_SCALE, ERASE_RATIO = (0.02, 0.33), (0.3, 3.3)
_TRIES = 10  # tries to fit a box into the image; as in torchvision
# Random numbers per image: area and aspect of each try, the decision, the position (2).
_NUMBERS = 2 * _TRIES + 3
# Folded into the step's key; other numbers are micro-batches (`step.make_gradients`).
_KEY = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Options of `mix`. A value of 0 turns an option off.

    Attributes:
      erase: share of the images in which a box is erased.
      mixup, cutmix: alpha of Beta(alpha, alpha), from which the share that images keep
        is drawn, once per batch. With both, each batch uses one of them, equally often.
    """

    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self):
        return bool(self.erase or self.pairs)

    @property
    def pairs(self) -> bool:
        """Whether images are mixed with partners."""
        return bool(self.mixup or self.cutmix)


class Mixed(NamedTuple):
    """The mixed images of a batch.

    Attributes:
      images: float32 `[N, H, W, C]`, from 0 to 255.
      partners: int32 `[N]`, the row that was blended into each image.
      weights: float32 `[N]`, the share of the image itself.
    """

    images: Any
    partners: Any
    weights: Any


def from_settings(augmentation: settings.AugmentationSettings, *, rows: int) -> Mixing:
    """Checks the settings for mixing batches.

    Args:
      erase, mixup, cutmix: the fields.
      rows: number of rows in a micro-batch, over all devices.

    Raises:
      UserError: a value is out of range, or a batch has only one row to mix.
    """
    erase, mixup, cutmix = augmentation.erase, augmentation.mixup, augmentation.cutmix
    if not 0 <= erase <= 1:
        raise UserError(f'data.erase={erase} is a probability: use 0 to 1')
    for name, alpha in (('mixup', mixup), ('cutmix', cutmix)):
        # Below, shares are 0 or 1 in float32; above, 0.5. It must be a typo.
        if alpha != 0 and not 0.01 <= alpha <= 100:
            raise UserError(
                f'data.{name}={alpha} is the alpha of Beta(alpha, alpha): use 0.01 to '
                '100, or 0 for none'
            )
        if alpha and rows < 2:
            raise UserError(
                f'data.{name}={alpha} has no two images to mix in a batch of {rows}; '
                f'use a larger data.batch_size, fewer train.accumulate_steps or '
                f'data.{name}=0'
            )
    return Mixing(erase, mixup, cutmix)


def mix(images, key, mixing: Mixing, *, mean) -> Mixed:
    """Erases boxes and mixes pairs.

    Args:
      images: uint8 or uint16 `[N, H, W, C]`, a (micro-)batch over all devices.
      key: random key of the step (and micro-batch); a constant is folded in.
      mixing: what to do.
      mean: `[C]`, from 0 to 1: the color of boxes, which is 0 once normalized.
    """
    count, height, width, _ = images.shape
    # As few draws as possible: each takes half a second to compile on a CPU.
    key = jax.random.fold_in(key, _KEY)
    numbers = jax.random.uniform(key, (5,), jnp.float32)
    # Rows move between devices as uint8, a quarter of the bytes of float32.
    partners = other = None
    if mixing.pairs:
        shift = 1 + (numbers[0] * (count - 1)).astype(jnp.int32)
        partners = (jnp.arange(count) - shift) % count
        other = _to_255(images[partners])
    images = _to_255(images)
    if mixing.erase:
        by_row = jax.random.fold_in(key, 1)
        by_row = jax.random.uniform(by_row, (count, _NUMBERS), jnp.float32)
        boxes = draw_boxes(by_row, height, width, mixing.erase)
        fill = 255 * jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, -1)
        images = jnp.where(inside(boxes, height, width)[..., None], fill, images)
        if mixing.pairs:
            theirs = inside(boxes[partners], height, width)[..., None]
            other = jnp.where(theirs, fill, other)
    if not mixing.pairs:
        return Mixed(images, jnp.arange(count), jnp.ones(count, jnp.float32))
    share, own = draw_shares(numbers[1:], height, width, mixing)
    own = own[None, :, :, None]
    return Mixed(
        images * own + other * (1 - own), partners, jnp.broadcast_to(share, count)
    )


def _to_255(images):
    """Converts to float32 from 0 to 255, keeping levels between integers."""
    numbers = images.astype(jnp.float32)
    return numbers / 257 if images.dtype == jnp.uint16 else numbers


def draw_boxes(numbers, height: int, width: int, probability: float):
    """Boxes of random erasing, int32 `[N, 4]`: top, left, bottom, right; or empty.

    Args:
      numbers: from 0 to 1, `[N, _NUMBERS]`.
    """
    side = jnp.array([height, width])
    low, high = ERASE_SCALE
    area = height * width * (low + (high - low) * numbers[:, :_TRIES])
    low, high = map(math.log, ERASE_RATIO)
    ratio = jnp.exp(low + (high - low) * numbers[:, _TRIES : 2 * _TRIES])
    shape = jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)], -1)
    shape = jnp.round(shape).astype(jnp.int32)  # [N, tries, 2]
    fits = (shape < side[None, None]).all(-1)
    first = fits.argmax(-1)[:, None, None]
    shape = jnp.take_along_axis(shape, first, 1)[:, 0]
    wanted, places = numbers[:, -1] < probability, numbers[:, -3:-1]
    shape = jnp.where((wanted & fits.any(-1))[:, None], shape, 0)
    room = side[None] - shape + 1
    start = jnp.minimum((places * room).astype(jnp.int32), room - 1)
    return jnp.concatenate([start, start + shape], -1)


def inside(boxes, height: int, width: int):
    """Pixels in boxes `[N, 4]` of top, left, bottom, right: bool `[N, H, W]`."""
    top, left, bottom, right = (boxes[:, n, None] for n in range(4))
    y, x = jnp.arange(height)[None], jnp.arange(width)[None]
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    return rows[:, :, None] & columns[:, None, :]


def draw_shares(numbers, height: int, width: int, mixing: Mixing):
    """The share that the images of a batch keep, and the share per pixel, `[H, W]`.

    Args:
      numbers: from 0 to 1, at least four.
    """
    if not mixing.cutmix:
        share = _from_beta(numbers[0], mixing.mixup)
        return share, jnp.broadcast_to(share, (height, width))
    box = cut_box(numbers[1:3], _from_beta(numbers[0], mixing.cutmix), height, width)
    outside = 1 - inside(box[None], height, width)[0].astype(jnp.float32)
    pixels = ((box[2] - box[0]) * (box[3] - box[1])).astype(jnp.float32)
    share = 1 - pixels / (height * width)
    if not mixing.mixup:
        return share, outside
    even, by_box = _from_beta(numbers[0], mixing.mixup), numbers[3] < 0.5
    return jnp.where(by_box, share, even), jnp.where(by_box, outside, even)


def cut_box(center, share, height: int, width: int):
    """CutMix's box, int32 `[4]`, with sides of sqrt(1 - share) times the image's.

    Its center can be anywhere, and parts outside the image are cut off. So the box can
    be smaller, and the share of its actual pixels counts.

    Args:
      center: from 0 to 1, as shares of height and width.
    """
    side = jnp.array([height, width])
    center = (center * side).astype(jnp.int32)
    half = (0.5 * jnp.sqrt(1 - share) * side).astype(jnp.int32)
    start, end = jnp.maximum(center - half, 0), jnp.minimum(center + half, side)
    return jnp.concatenate([start, end])


def _from_beta(uniform, alpha):
    """A Beta(alpha, alpha) value from a uniform number, with a table of quantiles.

    `jax.random.beta` is a loop of random length, for which a GPU waits for its host.
    """
    from scipy import special

    places = np.linspace(0, 1, 4097)
    quantiles = special.betaincinv(alpha, alpha, places)
    return jnp.interp(uniform, places.astype('f4'), quantiles.astype('f4'))


def blend(own, others, weights):
    """The loss of mixed images, from the losses by both labels.

    Losses become weighted means. An image counts as correct if it is correct by the
    label with the larger weight.

    Args:
      own: `(loss, weighted loss, correct)`, each `[N]`, by the images' own labels.
      others: the same by their partners' labels.
      weights: `Mixed.weights`.
    """
    *losses, correct = own
    *their_losses, theirs = others
    losses = (
        (weights * one + (1 - weights) * other).astype(one.dtype)
        for one, other in zip(losses, their_losses, strict=True)
    )
    return *losses, jnp.where(weights >= 0.5, correct, theirs)
