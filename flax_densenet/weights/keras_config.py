"""Fields of DenseNet from the configuration in Keras' files.

The configuration is only read as JSON, so no code in a file is run.

>>> from flax_densenet.weights import keras_config
>>> layer = '{"class_name": "BatchNormalization", "config": {"epsilon": 1e-3}}'
>>> keras_config.list_objects(layer)
[('BatchNormalization', {'epsilon': 0.001})]
"""

import collections
import json
import re
from typing import Any

from flax_densenet.errors import UserError

EPSILON = 1.001e-5  # the value of every batch norm in keras.applications and keras-hub


def list_objects(text: str | bytes) -> list[tuple[str, dict[str, Any]]]:
    """`[(class_name, config)]` of all objects in the JSON, at any depth."""
    objects, waiting = [], [json.loads(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if isinstance(node.get('config'), list):  # before Keras 2.2
                node['config'] = {'layers': node['config']}
            if isinstance(node.get('config'), dict):
                objects.append((str(node.get('class_name')), node['config']))
            node = list(node.values())
        waiting += node if isinstance(node, list) else ()
    return objects


def fields_of(
    path: str, objects, groups, *, is_hub: bool, behind=None, transitions: int = 0
) -> dict[str, Any]:
    """Fields of `DenseNet` that the file implies but the arrays do not show.

    Args:
      path: the file, for error messages.
      objects: `list_objects` of its configuration; empty if it has none.
      groups: paths and names of its layers, including those without arrays.
      is_hub: whether the network is from keras-hub.
      behind: (class, configuration) of each layer of the head, or None.
      transitions: number of transitions, each with a pooling layer; 0 if unknown.

    Raises:
      UserError: the network is not a DenseNet, or its batch norms differ.
    """
    if behind is None:
        _check_pooling(path, objects, groups)
        if not is_hub:
            _check_windows(path, groups, transitions)
    heads = {settings.get('name') for _, settings in behind or ()}
    numbers = _numbers(path, objects, heads)
    return numbers | {'padding': _padding(objects, groups, is_hub)}


def _check_pooling(path, objects, groups):
    kinds = {name for name, _ in objects} | {_class_name(group) for group in groups}
    pooled = {settings.get('pooling') for _, settings in objects}
    # The last is its name in keras.applications.
    maxima = {'GlobalMaxPooling2D', 'global_max_pooling2d', 'max_pool'}
    if 'max' in pooled or kinds & maxima:
        raise UserError(
            f'{path}: its classifier takes the maximum over the image, and the file '
            'does not show all layers; save the whole model: model.save(FILE.keras)'
        )


def _check_windows(path, groups, transitions):
    """Refuses more pooling layers than those of the network.

    Files without a configuration have a group for each layer, also for those without
    arrays.
    """
    counts = collections.Counter(
        group.rpartition('/')[0]
        for group in groups
        if _class_name(group) == 'average_pooling2d'
    )
    if transitions and any(count != transitions for count in counts.values()):
        raise UserError(
            f'{path}: its classifier has an AveragePooling2D, whose window the file '
            'does not show; save the whole model: model.save(FILE.keras)'
        )


def _class_name(group):
    """`average_pooling2d` for `layers/average_pooling2d_3`."""
    return re.sub(r'_\d+$', '', group.rpartition('/')[2])


def _numbers(path, objects, heads):
    """epsilon, momentum and unbiased_variance."""
    norms = [
        settings
        for name, settings in objects
        if name == 'BatchNormalization'
        and (settings.get('name') is None or settings['name'] not in heads)
    ]
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
    """`torch` if the stem has padding layers, as in keras.applications."""
    for name, settings in objects:
        if name == 'Conv2D' and list(settings.get('kernel_size', ())) == [7, 7]:
            return 'same' if settings.get('padding') == 'same' else 'torch'
    if any('zero_padding2d' in group for group in groups):
        return 'torch'
    # keras-cv uses the same names but lacks these layers. In files that list layers
    # without arrays, each norm has a ReLU.
    relus = sum(bool(re.search(r'relu$|(^|/)activation\w*$', g)) for g in groups)
    return 'same' if is_hub or relus > 8 else 'torch'
