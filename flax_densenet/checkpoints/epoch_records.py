"""What the record of an epoch says of the images that choose the best one.

With three parts of images these are the validation images, and a record holds
`val_accuracy`, `val_loss`, ...; with two, and in runs of versions that had no more, the
test images choose, and it holds `test_accuracy`, `test_loss`, ...

>>> get({'val_accuracy': 0.9}, 'accuracy'), get({'test_accuracy': 0.8}, 'accuracy')
(0.9, 0.8)
>>> part_of({'val_accuracy': 0.9}), part_of({'test_accuracy': 0.8})
('val', 'test')
"""

from collections.abc import Mapping
from typing import Any

VAL, TEST = 'val', 'test'
WORDS = {VAL: 'validation', TEST: 'test'}


def part_of(record: Mapping[str, Any]) -> str:
    """`val` or `test`: which images a record, or a checkpoint's metrics, are of."""
    return VAL if f'{VAL}_accuracy' in record else TEST


def get(record: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A value of those images by its name without the part: `accuracy`, `loss`, ...

    Returns:
      The default if the record has none.
    """
    return record.get(f'{part_of(record)}_{name}', default)
