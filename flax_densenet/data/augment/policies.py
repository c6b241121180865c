"""Augmentation policies: RandAugment and TrivialAugment.

RandAugment (https://arxiv.org/abs/1909.13719) applies N operations with magnitude M of
30; TrivialAugment (https://arxiv.org/abs/2103.10158, its wide space) applies one, with
a random magnitude. Operations, ranges, nearest-pixel sampling and black corners are
torchvision's.
Images are Pillow's, RGB or L (gray).

>>> policy = parse('randaugment-2-9')
>>> policy.count, policy.magnitude
(2, 9)
>>> import numpy as np
>>> apply(Image.new('L', (4, 3)), np.random.default_rng(0), policy).size
(4, 3)
"""

import dataclasses
import re
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps

from flax_densenet.data.augment import color
from flax_densenet.errors import UserError

_BINS = 31  # magnitudes are 0 to 30
_MOST_OPERATIONS = 14


@dataclasses.dataclass(frozen=True)
class Policy:
    """An augmentation policy.

    Attributes:
      count: number of operations, applied one after another.
      magnitude: of each operation, from 0 to 30; None for a random one.
      wide: use TrivialAugment's ranges instead of RandAugment's.
    """

    count: int
    magnitude: int | None
    wide: bool


def parse(name: str) -> Policy | None:
    """Parses `data.policy`; None for `none`.

    Raises:
      UserError: there is no such policy.
    """
    if name == 'none':
        return None
    if name == 'trivialaugment':
        return Policy(1, None, wide=True)
    match = re.fullmatch(r'randaugment(?:-(\d{1,3})-(\d{1,3}))?', str(name))
    if match:
        count, magnitude = (int(x) for x in (match[1] or 2, match[2] or 9))
        if 1 <= count <= _MOST_OPERATIONS and magnitude < _BINS:
            return Policy(count, magnitude, wide=False)
    raise UserError(
        f'data.policy={name} is not known; use none, randaugment (the same as '
        f'randaugment-2-9: N operations, 1 to {_MOST_OPERATIONS}, of magnitude M, 0 to '
        f'{_BINS - 1}) or trivialaugment'
    )


def apply(image, rng, policy: Policy, *, functions=None):
    """Applies random operations to an image, which is not changed itself.

    Args:
      Args: image: a Pillow image.
      functions: functions of an image and an amount, by the names in `OPERATIONS`; by
        default those of this module.
    """
    for _ in range(policy.count):
        name = _NAMES[rng.integers(len(_NAMES))]
        operation = OPERATIONS[name]
        place = policy.magnitude
        if place is None:
            place = int(rng.integers(_BINS))
        amount = operation.amount(place / (_BINS - 1), image, policy.wide)
        if operation.signed and rng.random() < 0.5:
            amount = -amount
        function = functions[name] if functions else operation.function
        image = function(image, amount)
    return image


def _size_of(image):
    """Width and height of a Pillow image or an array `[H, W, C]`."""
    return image.size if isinstance(image, Image.Image) else image.shape[1::-1]


def _affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def shear_x(image, amount):
    """Each row moves left by `amount` of its distance from the top."""
    return _affine(image, 1, amount, 0, 0, 1, 0)


def shear_y(image, amount):
    """Each column moves up by `amount` of its distance from the left."""
    return _affine(image, 1, 0, 0, amount, 1, 0)


def translate_x(image, amount):
    """Moves right by `amount` pixels, rounded towards 0."""
    return _affine(image, 1, 0, -int(amount), 0, 1, 0)


def translate_y(image, amount):
    """Moves down by `amount` pixels, rounded towards 0."""
    return _affine(image, 1, 0, 0, 0, 1, -int(amount))


def adjust_sharpness(image, factor):
    """0 is smoothed, 1 the image itself."""
    return ImageEnhance.Sharpness(image).enhance(factor)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation on an image.

    Attributes:
      function: (image, amount) -> image.
      amount: (level 0 to 1, image, wide) -> amount.
      signed: the amount is negative half of the time.
    """

    function: Callable
    amount: Callable
    signed: bool


def _up_to(narrow, wide):
    return lambda level, _, is_wide: level * (wide if is_wide else narrow)


def _pixels(axis):
    """RandAugment uses shares of the side, TrivialAugment pixels."""

    def amount(level, image, is_wide):
        return level * (32 if is_wide else 150 / 331 * _size_of(image)[axis])

    return amount


def _bits(level, _, is_wide):
    # Rounds like torch and numpy: halves to the even number.
    return 8 - round(level * (6 if is_wide else 4))


def _by_factor(function):
    """An operation with a factor of 1 + amount."""
    return Operation(
        lambda image, amount: function(image, 1 + amount), _up_to(0.9, 0.99), True
    )


def _without_amount(function):
    return Operation(lambda image, _: function(image), lambda *_: 0, False)


OPERATIONS = {
    'identity': _without_amount(lambda image: image),
    'shear_x': Operation(shear_x, _up_to(0.3, 0.99), True),
    'shear_y': Operation(shear_y, _up_to(0.3, 0.99), True),
    'translate_x': Operation(translate_x, _pixels(0), True),
    'translate_y': Operation(translate_y, _pixels(1), True),
    'rotate': Operation(Image.Image.rotate, _up_to(30, 135), True),  # degrees, left
    'brightness': _by_factor(color.adjust_brightness),
    'saturation': _by_factor(color.adjust_saturation),
    'contrast': _by_factor(color.adjust_contrast),
    'sharpness': _by_factor(adjust_sharpness),
    'posterize': Operation(ImageOps.posterize, _bits, False),
    # Values from this threshold on are inverted.
    'solarize': Operation(
        ImageOps.solarize, lambda level, *_: 255 * (1 - level), False
    ),
    'autocontrast': _without_amount(ImageOps.autocontrast),
    'equalize': _without_amount(ImageOps.equalize),
}
_NAMES = tuple(OPERATIONS)
