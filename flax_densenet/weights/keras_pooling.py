"""What the pooling layers in the head of a Keras model compute together.

If its window covers the whole feature map, a pooling layer takes the mean or the
maximum over all positions. So do several steps whose windows tile the map.

>>> pooling = Pooling((2, 2))
>>> pooling.add('AveragePooling2D', {'name': 'a', 'pool_size': [2, 2]})
>>> pooling.kind, pooling.is_complete
('mean', True)
"""

from typing import Any

from flax_densenet.weights import keras_body
from flax_densenet.weights.head_layers import Unreadable

KINDS = {
    'GlobalAveragePooling2D': 'mean',
    'GlobalMaxPooling2D': 'max',
    'AveragePooling2D': 'mean',
    'MaxPooling2D': 'max',
}
_TITLES = {'mean': 'mean', 'max': 'maximum'}


class Pooling:
    """The pooling layers of a head.

    Attributes:
      kind: `mean` or `max`; None before the first layer.
      is_complete: whether one position is left.
      size_note: what differs at other image sizes; '' for nothing.
    """

    def __init__(self, maps: tuple[int, int] | None):
        """Starts with feature maps of this height and width; None if unknown."""
        self.kind: str | None = None
        self.is_complete = False
        self.size_note = ''
        self._maps = maps

    def add(self, kind: str, settings: dict[str, Any]):
        """Adds a layer; raises `Unreadable` if the result is not computed by us."""
        name = settings.get('name')
        if not self.is_complete and self.kind not in (None, KINDS[kind]):
            raise Unreadable(
                f'{name} takes the {_TITLES[KINDS[kind]]} of a {_TITLES[self.kind]}'
            )
        self.kind = self.kind or KINDS[kind]
        if kind.startswith('Global'):
            self.is_complete = True
            return
        window = keras_body.pair(settings.get('pool_size', 2))
        strides = keras_body.pair(settings.get('strides')) or window
        maps = settings.get('maps') or self._maps
        if window is None or strides is None or min(*window, *strides) < 1:
            raise Unreadable(f'{name} has no size')
        shown = f'{name} pools windows of {window[0]}x{window[1]}'
        if strides != window:
            shown = f'{shown} with strides of {strides[0]}x{strides[1]}'
        if maps is None:
            raise Unreadable(f'{shown} of a feature map of unknown size')
        sides = list(zip(maps, window, strides, strict=True))
        is_alone = settings.get('padding', 'valid') == 'valid'
        covers = all(n == w and (is_alone or s >= n) for n, w, s in sides)
        if not covers and not all(w == s and n % w == 0 for n, w, s in sides):
            raise Unreadable(
                f'{shown}, which do not tile its feature map of {maps[0]}x{maps[1]}'
            )
        self._maps = (maps[0] // window[0], maps[1] // window[1])
        self.is_complete = self._maps == (1, 1)
        self.size_note = (
            f'the {_TITLES[self.kind]} over all positions is computed, which equals '
            f'its layer {name} ({kind}) only at the image size of the file'
        )
