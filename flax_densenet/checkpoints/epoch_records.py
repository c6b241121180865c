"""The metrics in an epoch's record for the images that choose the best epoch.

If the data has three parts, these are the validation images, and a record holds
`val_accuracy`, `val_loss`, ... With two parts, and in runs of versions that had only
two, the test images choose, and it holds `test_accuracy`, `test_loss`, ...

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
    """`val` or `test`: the images of a record, or of a checkpoint's metrics."""
    return VAL if f'{VAL}_accuracy' in record else TEST


def get(record: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The value for these images, by its name without the part: `accuracy`, `loss`, ...

    Returns:
      The default if the record has none.
    """
    return record.get(f'{part_of(record)}_{name}', default)
