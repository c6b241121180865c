"""Folders with results of this program, which searches for images skip.

People train and predict in the folder of their photos, so a run's pictures, heat maps
and packs may be below it, and none of them is a class or an image of one.
"""

import os
from collections.abc import Iterable

# In folders whose other files do not tell who wrote them.
MARK = '.flax_densenet'
# Files of a run, a sweep or a pack.
_FILES = frozenset(
    (
        *(MARK, 'metrics.jsonl', 'checksums.json', 'sweep.json', 'pack.json'),
        *('eval.json', 'lr_find.json', 'environment.json', 'nonfinite.json'),
    )
)
_WEIGHTS = {'config.json', 'model.safetensors'}  # a folder for the Hub
# Folders of a run, which can be the folder of the photos itself.
_OF_RUNS = frozenset(('checkpoints', 'events', 'wandb'))


def is_result(names: Iterable[str]) -> bool:
    """Whether a folder that holds these names has results of this program."""
    names = set(names)
    return not _FILES.isdisjoint(names) or names >= _WEIGHTS


def has_results(folder: str) -> bool:
    """`is_result` of a folder, without listing it."""

    def holds(name):
        return os.path.exists(os.path.join(folder, name))

    return any(map(holds, _FILES)) or all(map(holds, _WEIGHTS))


def is_part_of_run(folder: str) -> bool:
    """Whether a folder belongs to a run, judged by the files next to it."""
    above, name = os.path.split(os.path.abspath(folder))
    return name in _OF_RUNS and has_results(above)


def mark(folder: str):
    """Marks a folder that this program fills.

    Raises:
      OSError: it cannot be written.
    """
    path = os.path.join(folder, MARK)
    if not os.path.exists(path):
        with open(path, 'w', encoding='utf-8') as file:
            file.write(
                'Results of flax_densenet: searches for images skip this folder.\n'
            )


def clear_mark(folder: str):
    """Removes the mark.

    Raises:
      OSError: it cannot be removed.
    """
    path = os.path.join(folder, MARK)
    if os.path.exists(path):
        os.unlink(path)
