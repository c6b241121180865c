"""The configuration in Keras' files -> fields of DenseNet.

Read as the JSON that it is: nothing is made from it, so no code of a file runs.

>>> from flax_densenet.weights import keras_config
>>> layer = '{"class_name": "BatchNormalization", "config": {"epsilon": 1e-3}}'
>>> keras_config.list_objects(layer)
[('BatchNormalization', {'epsilon': 0.001})]
"""

import json
import re
import warnings
from typing import Any

from flax_densenet.errors import UserError

EPSILON = 1.001e-5  # of every batch norm in keras.applications and keras-hub


def list_objects(text: str | bytes) -> list[tuple[str, dict[str, Any]]]:
    """[(class_name, config)] of all objects in Keras' JSON, at whatever depth."""
    found, waiting = [], [json.loads(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if isinstance(node.get('config'), dict):
                found.append((str(node.get('class_name')), node['config']))
            node = list(node.values())
        waiting += node if isinstance(node, list) else ()
    return found


def fields_of(path: str, objects, groups, *, is_hub: bool) -> dict[str, Any]:
    """Fields of `DenseNet` that a file implies: all that no array shows.

    Args:
      path: the file, for messages.
      objects: `list_objects` of its configuration; empty where it has none.
      groups: paths and names of its layers, those without arrays too.
      is_hub: it is a network of keras-hub.

    Raises:
      UserError: DenseNet computes something else. A warning tells of layers that
        change the images.
    """
    _check_objects(path, objects)
    return _numbers(path, objects) | {'padding': _padding(objects, groups, is_hub)}


def _check_objects(path, objects):
    """Refuses another head, tells of layers without arrays before the network."""
    for name, settings in objects:
        if name == 'GlobalMaxPooling2D' or settings.get('pooling') == 'max':
            raise UserError(
                f'{path}: its classifier takes the maximum over the image; only the '
                'mean (GlobalAveragePooling2D) can be read'
            )
        if name in ('Rescaling', 'Lambda'):
            numbers = {k: settings[k] for k in ('scale', 'offset') if k in settings}
            said = f'{name} {numbers}' if numbers else name
            warnings.warn(
                f'{path}: its layer {said} is left out; if it prepares images, '
                'give data.mean and data.std that do the same',
                stacklevel=2,
            )


def _numbers(path, objects):
    """epsilon, momentum and unbiased_variance."""
    norms = [settings for name, settings in objects if name == 'BatchNormalization']
    epsilons = {float(settings.get('epsilon', 1e-3)) for settings in norms} or {EPSILON}
    momenta = {float(settings.get('momentum', 0.99)) for settings in norms}
    if len(epsilons) > 1:
        raise UserError(
            f'{path}: its batch norms have several values of epsilon '
            f'({", ".join(map(str, sorted(epsilons)))}); DenseNet has one'
        )
    return dict(
        epsilon=epsilons.pop(),
        momentum=momenta.pop() if len(momenta) == 1 else 0.99,
        unbiased_variance=False,
    )


def _padding(objects, groups, is_hub):
    """`torch` where the stem is padded by layers of its own, as keras.applications."""
    for name, settings in objects:
        if name == 'Conv2D' and list(settings.get('kernel_size', ())) == [7, 7]:
            return 'same' if settings.get('padding') == 'same' else 'torch'
    if any('zero_padding2d' in group for group in groups):
        return 'torch'
    # keras-cv has the same names without these layers. Files that list layers without
    # arrays have a ReLU for each norm.
    relus = sum(bool(re.search(r'relu$|(^|/)activation\w*$', g)) for g in groups)
    return 'same' if is_hub or relus > 8 else 'torch'
