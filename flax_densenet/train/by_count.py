"""Settings for fine-tuning that depend on the number of training images.

With `train.by_count`, a setting that has its value in `OPEN` is chosen here. With fewer
images, less of the network changes and each image is seen more often. The numbers are
rules of thumb, not the result of a search.
"""

import dataclasses
import logging
import math
from typing import Any

from flax_densenet import settings as settings_lib

_LOGGER = logging.getLogger(__name__)

# The open value of each setting that can be chosen.
OPEN = {
    'data.batch_size': 0,
    'data.policy': 'auto',
    'optimizer.learning_rate': 0.0,
    'optimizer.layer_decay': 0.0,
    'train.epochs': 0,
    'train.head_warmup_epochs': -1,
    'train.patience': -1,
    'train.freeze': 'auto',
}
# Up to this many training images, use these values for the settings in `OPEN`, in the
# same order. `most` of the blocks: all but the last.
_TIERS: list[tuple[float, tuple[Any, ...]]] = [
    (300, (16, 'none', 3e-4, 0.7, 40, 3, 10, 'most')),
    (2000, (16, 'none', 3e-4, 0.75, 30, 2, 8, 'denseblock1')),
    (20000, (32, 'trivialaugment', 3e-4, 0.8, 20, 1, 6, 'none')),
    (math.inf, (64, 'trivialaugment', 5e-4, 0.9, 12, 1, 4, 'none')),
]


def format_markdown() -> str:
    """The rows of the table in docs/pretrained.md."""
    rows: list[str] = []
    before = 0.0
    for most, values in _TIERS:
        chosen = dict(zip(OPEN, values, strict=True))
        frozen = chosen['train.freeze']
        shown = {'most': 'all blocks but the last', 'none': 'nothing'}
        cells = (
            f'up to {most:,.0f}' if math.isfinite(most) else f'above {before:,.0f}',
            chosen['data.batch_size'],
            f'{chosen["optimizer.learning_rate"]:g}',
            chosen['optimizer.layer_decay'],
            chosen['train.epochs'],
            _epochs(chosen['train.head_warmup_epochs']),
            _epochs(chosen['train.patience']),
            chosen['data.policy'],
            shown.get(frozen, f'up to `{frozen}`'),
        )
        rows.append(f'| {" | ".join(map(str, cells))} |')
        before = most
    return '\n'.join(rows)


def _epochs(count):
    return f'{count} epoch{"s" * (count != 1)}'


def find_open(settings: settings_lib.Settings) -> list[str]:
    """Names of the settings that are open; none without `train.by_count`."""
    if not settings.train.by_count:
        return []
    values = settings_lib.flatten(settings)
    return [name for name, value in OPEN.items() if values[name] == value]


def choose(
    settings: settings_lib.Settings, count: int, *, blocks: int
) -> settings_lib.Settings:
    """Fills in the open settings and prints the choices in one line.

    Args:
      count: number of training images.
      blocks: number of the network's blocks.
    """
    names = find_open(settings)
    if not names:
        return settings
    tier = next(values for most, values in _TIERS if count <= most)
    chosen = dict(zip(OPEN, tier, strict=True))
    if chosen['train.freeze'] == 'most':
        chosen['train.freeze'] = f'denseblock{max(blocks - 1, 1)}'
    chosen = {name: chosen[name] for name in names}
    made = _replace(settings, chosen)
    epochs = made.train.epochs
    limited = min(made.train.head_warmup_epochs, max(epochs - 1, 0))
    if 'train.head_warmup_epochs' in chosen and made.train.freeze == 'backbone':
        limited = 0  # the classifier trains alone anyway
    if 'train.head_warmup_epochs' in chosen:
        chosen['train.head_warmup_epochs'] = limited
        made = _replace(made, chosen)
    _LOGGER.info(
        f'for {count} training images: '
        + ', '.join(f'{name}={value}' for name, value in chosen.items())
        + '; to change one: --config.NAME=VALUE'
    )
    if made.augmentation.augment.endswith('flip'):
        _LOGGER.info(
            f'training images are changed by data.augment={made.augmentation.augment}; '
            'if left and right matter, set it to none'
        )
    return made


def _replace(
    settings: settings_lib.Settings, values: dict[str, Any]
) -> settings_lib.Settings:
    config = settings_lib.to_config(settings)
    for name, value in values.items():
        section, _, field = name.partition('.')
        config[section][field] = value
    return dataclasses.replace(settings, **vars(settings_lib.from_config(config)))
