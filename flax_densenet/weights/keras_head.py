"""Reads what surrounds the network in a Keras configuration: preparation, activation.

Layers before the network that subtract and divide become mean and std. The last layer
shows whether the outputs are a softmax or sigmoids.

>>> rescaling = {'class_name': 'Rescaling', 'config': {'scale': 1 / 255, 'offset': 0}}
>>> network = {
...     'class_name': 'Functional',
...     'config': {'layers': [{'class_name': 'Conv2D', 'config': {}}]},
... }
>>> dense = {'class_name': 'Dense', 'config': {'activation': 'sigmoid'}}
>>> found = read({'layers': [rescaling, network, dense]}, {})
>>> found.preparation, found.outputs
({'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0)}, 'sigmoid')
"""

import dataclasses
from typing import Any

import numpy as np

from flax_densenet.data import bands
from flax_densenet.settings import sizes
from flax_densenet.weights import heads

# Layers that do nothing at inference, or do not change values.
SILENT = {
    *('Dropout', 'GaussianNoise', 'Identity', 'Cast', 'RandAugment', 'RandomErasing'),
    *('RandomFlip', 'RandomRotation', 'RandomZoom', 'RandomTranslation', 'AugMix'),
    *('RandomContrast', 'RandomBrightness', 'RandomColorJitter', 'RandomShear'),
    *('RandomColorDegeneration', 'RandomGrayscale', 'RandomHue', 'RandomSaturation'),
    *('RandomSharpness', 'RandomPosterization', 'MixUp', 'CutMix', 'RandomInvert'),
    'RandomGaussianBlur',
}
# The first layer of the network, which may have a ZeroPadding2D of its own.
_NETWORK = {'Conv2D', 'DenseNetBackbone', 'DenseNetImageClassifier'}
_MODELS = {'Functional', 'Sequential', 'Model'}
_ACTIVATIONS = {'sigmoid': heads.SIGMOID, 'softmax': heads.SOFTMAX}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a configuration says about images and outputs.

    Attributes:
      preparation: fields of `config.data`.
      unread: the layer that changes images in a way that cannot be read; '' for none.
      outputs: one of `heads.OUTPUTS`; None if the configuration does not say.
      used: paths of arrays in the file that are not part of the network.
    """

    preparation: dict[str, Any] = dataclasses.field(default_factory=dict)
    unread: str = ''
    outputs: str | None = None
    used: tuple[str, ...] = ()


def read(settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> Found:
    """Reads the configuration of a model.

    Args:
      settings: configuration of the outermost model; empty if the file has none.
      arrays: `{path in the file: array}`, for Normalization layers.
    """
    layers = settings.get('layers')
    if not isinstance(layers, list):
        return Found(outputs=activation(settings))
    layers = [layer for layer in layers if isinstance(layer, dict)]
    front = _Front(arrays)
    front.read(layers)
    preparation = front.preparation()
    return Found(preparation, front.unread, _outputs(layers), tuple(front.used))


def activation_name(settings) -> str:
    """The name of a layer's activation; `linear` if it has none."""
    found = settings.get('activation')
    if isinstance(found, dict):
        found = str(found.get('class_name', '')).lower()
    return found if isinstance(found, str) else 'linear'


def activation(settings) -> str | None:
    """One of `heads.OUTPUTS`; None for other activations."""
    return _ACTIVATIONS.get(activation_name(settings))


def class_of(layer) -> tuple[str, dict[str, Any]]:
    """The class name and the configuration of a layer."""
    settings = layer.get('config')
    return str(layer.get('class_name')), settings if isinstance(settings, dict) else {}


def inner_layers(layer):
    """The layers of a model; None if the layer is not a model."""
    kind, settings = class_of(layer)
    inner = settings.get('layers')
    if kind in _MODELS and isinstance(inner, list):
        return [one for one in inner if isinstance(one, dict)]
    return None


def is_relu(kind: str, settings: dict[str, Any]) -> bool:
    """Whether a layer of this class is a plain ReLU."""
    name = {'ReLU': 'relu', 'Activation': activation_name(settings)}.get(kind)
    return name == 'relu' and not has_unusual_slope(settings)


def has_unusual_slope(settings: dict[str, Any]) -> bool:
    """Whether a ReLU, as a layer or an activation, has a limit, slope or threshold."""
    found = settings.get('activation')
    inner = found.get('config') if isinstance(found, dict) else None
    keys = 'max_value', 'negative_slope', 'threshold'
    places = (settings, inner if isinstance(inner, dict) else {})
    return any(place.get(key) not in (None, 0) for place in places for key in keys)


def _outputs(layers):
    """The outputs, according to the last layer that is or has an activation."""
    for layer in reversed(layers):
        kind, settings = class_of(layer)
        inner = inner_layers(layer)
        if inner is not None:
            return _outputs(inner)
        if kind == 'Softmax':
            return heads.SOFTMAX
        if found := activation(settings):
            return found
        if kind in ('Dense', 'Conv2D', 'GlobalAveragePooling2D'):
            break
    return None


class _Front:
    """The layers before the network: x becomes `x * factor + shift`."""

    def __init__(self, arrays):
        self._arrays = arrays
        self._factor, self._shift = np.ones(1), np.zeros(1)
        self._changed = False
        self._size, self._resized = None, {}
        self.unread, self.used = '', []

    def read(self, layers):
        """Reads up to the network; whether it was found."""
        kinds = [class_of(layer)[0] for layer in layers]
        for number, layer in enumerate(layers):
            kind, settings = class_of(layer)
            inner = inner_layers(layer)
            if inner is not None and self.read(inner):
                return True
            if kind in _NETWORK:
                return True
            if kind == 'ZeroPadding2D' and kinds[number + 1 : number + 2] == ['Conv2D']:
                return True
            read = inner is not None or self._apply(kind, settings, layer)
            if not read and not self.unread:
                self.unread = f'its layer {settings.get("name") or kind} ({kind})'
        return False

    def preparation(self):
        """Fields of `config.data`."""
        found = dict(self._resized)
        if self._size and not found:
            found['image_size'] = self._size
        if not self._changed or self.unread:
            return found
        std = 1 / (255 * self._factor)
        mean = -self._shift * std
        count = max(3, len(std), len(mean))
        found['mean'], found['std'] = (
            tuple(float(f'{x:.9g}') + 0.0 for x in np.resize(v, count))
            for v in (mean, std)
        )
        return found

    def _apply(self, kind, settings, layer):
        """Applies one layer; False if it cannot be read."""
        if kind == 'InputLayer':
            return self._read_size(settings)
        if kind in SILENT:
            return True
        if kind == 'Resizing':
            return self._resize(settings)
        if kind == 'Rescaling':
            return self._move(*(_number(settings.get(k)) for k in ('scale', 'offset')))
        if kind == 'Normalization':
            return self._normalize(settings)
        value = _constant(layer)
        if value is None:
            return False
        if kind in ('TrueDivide', 'Divide', 'Multiply'):
            with np.errstate(divide='ignore'):
                factor = value if kind == 'Multiply' else 1 / value
            return self._move(factor, np.zeros(1))
        if kind in ('Subtract', 'Add', 'BiasAdd'):
            return self._move(np.ones(1), -value if kind == 'Subtract' else value)
        return False

    def _move(self, factor, shift):
        if factor is None or shift is None:
            return False
        if len({len(v) for v in (factor, shift, self._factor, self._shift)} - {1}) > 1:
            return False
        self._changed = True
        self._shift = self._shift * factor + shift
        self._factor = self._factor * factor
        numbers = np.concatenate([self._factor, self._shift])
        return bool((self._factor > 0).all() and np.isfinite(numbers).all())

    def _read_size(self, settings):
        shape = settings.get('batch_shape') or settings.get('batch_input_shape')
        if isinstance(shape, list) and len(shape) == 4 and self._size is None:
            height, width = shape[1:3]
            if sizes.are_sides(height, width):
                self._size = sizes.parse((height, width))
        return True

    def _resize(self, settings):
        height, width = settings.get('height'), settings.get('width')
        filters = settings.get('interpolation', 'bilinear')
        if not sizes.are_sides(height, width):
            return False
        if filters not in ('bilinear', 'bicubic') or settings.get(
            'pad_to_aspect_ratio'
        ):
            return False
        self._resized = {
            'image_size': sizes.parse((height, width)),
            'resize': 'crop' if settings.get('crop_to_aspect_ratio') else 'stretch',
            'interpolation': filters,
            'crop_fraction': 1.0,
        }
        return True

    def _normalize(self, settings):
        mean, variance = (
            _number(settings.get('mean')),
            _number(settings.get('variance')),
        )
        if mean is None or variance is None:
            mean, variance = self._find_statistics(settings.get('name'))
        if mean is None or variance is None or settings.get('invert'):
            return False
        std = np.maximum(np.sqrt(np.maximum(variance, 0)), 1e-7)
        return self._move(1 / std, -mean / std)

    def _find_statistics(self, name):
        """Mean and variance of an adapted layer, which stores them as arrays."""
        found = {}
        for key, array in self._arrays.items():
            parts = key.split('/')
            if 'normalization' not in parts and name not in parts:
                continue
            leaf = parts[-1].removesuffix(':0')
            role = {'0': 'mean', '1': 'variance', '2': 'count'}.get(leaf, leaf)
            if role in ('mean', 'variance', 'count') and role not in found:
                found[role] = _number(array)
                self.used.append(key)
        return found.get('mean'), found.get('variance')


def _number(value):
    """The number or numbers in a configuration as an array; None for anything else."""
    if isinstance(value, dict):
        inner = value.get('config')
        value = inner.get('value') if isinstance(inner, dict) else None
    try:
        found = np.ravel(np.asarray(value, dtype=float))
    except (TypeError, ValueError):
        return None
    is_short = 1 <= len(found) <= bands.MOST
    return found if is_short and np.isfinite(found).all() else None


def _constant(layer):
    """The constant operand of an operation."""
    nodes = layer.get('inbound_nodes')
    node = nodes[0] if isinstance(nodes, list) and nodes else None
    arguments = node.get('args') if isinstance(node, dict) else None
    if not isinstance(arguments, list) or len(arguments) != 2:
        return None
    first = arguments[0]
    if not isinstance(first, dict) or first.get('class_name') != '__keras_tensor__':
        return None
    return _number(arguments[1])
