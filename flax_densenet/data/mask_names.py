"""Recognizes masks next to images by their names: `a.png` and `a_mask.png`."""

import os
import re
from collections.abc import Sequence

_MASK = re.compile(
    r'(.+?)[ _.-]+(?:masks?|seg|segmentation|segmented|gt|groundtruth|annotation)'
    r'(?:[ _-]?[0-9]{1,2})?',
    re.IGNORECASE,
)


def describe(paths: Sequence[str]) -> list[str]:
    """A line about images that look like masks of others in their folders, if any."""
    stems = {os.path.splitext(path)[0]: path for path in paths}
    pairs = []
    for stem, path in stems.items():
        folder, name = os.path.split(stem)
        match = _MASK.fullmatch(name)
        image = stems.get(os.path.join(folder, match[1])) if match else None
        if image is not None:
            pairs.append((path, os.path.basename(image)))
    if not pairs:
        return []
    return [
        f'warning: {len(pairs)} images look like masks of others, such as '
        f'{pairs[0][0]} of {pairs[0][1]}, and are read as photos of their class; '
        'move them out of the class folders'
    ]
