"""Reads and writes DenseNet weights in Keras files.

It reads networks of keras.applications and keras-hub, alone or with a head:
`.weights.h5` and `.keras` files of Keras 3, `.h5` files of any Keras version, and
`task.weights.h5` files of presets. No code in a file is run: only its arrays and the
numbers in its configuration are read.

>>> from flax_densenet.weights import keras_files
>>> keras_files.is_keras_file(keras_files.__file__)
False
"""

import contextlib
import dataclasses
import io
import logging
import os
import re
import tempfile
import zipfile
from typing import Any

import numpy as np

from flax_densenet import errors
from flax_densenet.errors import UserError
from flax_densenet.weights import (
    hdf5,
    keras_body,
    keras_config,
    keras_head,
    keras_layers,
    keras_tail,
)

_LOGGER = logging.getLogger(__name__)
_WEIGHTS = 'model.weights.h5'
# The configuration next to the weights of a preset.
_BESIDE = {_WEIGHTS: 'config.json', 'task.weights.h5': 'task.json'}
_ARCHIVE_STARTS = (b'metadata.json', b'config.json')
_LARGEST_CONFIG = 2**26
# Training state, not part of the model.
_TRAINING = re.compile(
    r'(optimizer|optimizer_weights|_?metrics|_?compile_metrics|_?loss_tracker)/'
    r'|(.*/)?_?(seed|random)_generator[^/]*/'
)
# Fixed in keras.applications; the other fields of DenseNet are free or checked.
_FIXED = {
    'growth_rate': 32,
    'bottleneck': 4,
    'compression': 0.5,
    'stem': 'imagenet',
    'stem_features': 64,
    'blur_pool': False,
    'padding': 'torch',
}


@contextlib.contextmanager
def _reading(path):
    """Turns errors into `PATH is not a valid Keras file (reason)`."""
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f'{path} is not a file') from error
    # h5py and zipfile raise these for corrupt files, and `hdf5` for refused ones.
    except (
        OSError,
        EOFError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        MemoryError,
        zipfile.BadZipFile,
    ) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'{path} is not a valid Keras file ({reason})') from error


def is_keras_file(path: str) -> bool:
    """Whether the content of a file is HDF5 or a `.keras` archive; needs no h5py."""
    try:
        with open(path, 'rb') as file:
            start = file.read(64)
        if not start.startswith(b'PK'):
            return start.startswith(hdf5.SIGNATURE)
        with zipfile.ZipFile(path) as archive:
            return _WEIGHTS in archive.namelist()
    except OSError:
        return False
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        # A truncated archive: the list of names is at the end, the first name here.
        return start[30:].startswith(_ARCHIVE_STARTS)


@dataclasses.dataclass(frozen=True)
class Content:
    """A Keras file of a DenseNet.

    Attributes:
      arrays, fields, family: see `read`.
      around: what the configuration says about images and outputs.
      tail: the layers after the network.
    """

    arrays: dict[str, np.ndarray]
    fields: dict[str, Any]
    family: str
    around: keras_head.Found
    tail: keras_tail.Tail


def read(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """Reads a Keras file of a DenseNet.

    Args:
      path: a file that `is_keras_file` recognizes. For the `task.weights.h5` of a
        preset, the `model.weights.h5` next to it is read too.

    Returns:
      arrays: `{'params/conv0/kernel': float32 [7, 7, 3, 64], ...}`, with kernels
        `[H, W, in, out]` or `[in, out]`. Unknown arrays keep their path in the file;
        the state of an optimizer is left out.
      fields: the fields of `DenseNet` that the file implies.
      family: `keras` or `keras_hub`.

    Raises:
      UserError: the file is corrupt or refers to other files, h5py is missing, or the
        network is not a DenseNet.
    """
    content = read_content(path)
    return content.arrays, content.fields, content.family


def read_content(path: str) -> Content:
    """Reads a Keras file like `read`, including what surrounds the network."""
    layers, groups, objects = _read_file(path)
    neighbor = os.path.join(os.path.dirname(path), _WEIGHTS)
    if os.path.basename(path) == 'task.weights.h5' and os.path.exists(neighbor):
        more, more_groups, more_objects = _read_file(neighbor, f'{_WEIGHTS}/')
        layers += more
        groups |= more_groups
        objects += more_objects
    layers = _without_copy(path, layers)
    if not layers:
        raise UserError(f'{path} is not a valid Keras file (it holds no layers)')
    is_hub = any(name == 'DenseNetBackbone' for name, _ in objects)
    is_hub |= any(map(keras_layers.is_of_hub, groups))
    is_hub |= any('dense_net_backbone' in group for group in groups)
    with _reading(path):
        config = objects[0][1] if objects else {}
        parts = keras_body.split(config)
        modules = [one.module.partition('/')[0] for one in layers if one.module]
        keras_body.check(path, parts)
        fields = keras_config.fields_of(
            *(path, objects, groups),
            is_hub=is_hub,
            behind=parts.behind,
            transitions=len({m for m in modules if m.startswith('transition')}),
        )
        by_key = {key: array for one in layers for key, array in one.by_key().items()}
        around = keras_head.read(config, by_key)
        size = None if around.unread else around.preparation.get('image_size')
        tail, used = _read_tail(parts, layers, size)
    arrays = _name([one for one in layers if one not in used]) | tail.arrays
    for key in around.used:
        arrays.pop(key, None)
    family = 'keras_hub' if is_hub else 'keras'
    return Content(arrays, fields | tail.fields, family, around, tail)


@dataclasses.dataclass(frozen=True, eq=False)
class _Placed:
    """A layer in a file, our submodule for it (or None), and its arrays by role."""

    layer: keras_layers.Layer
    module: str | None
    arrays: dict[str, np.ndarray]

    def by_key(self):
        return {key: self.arrays[role] for role, key in self.layer.keys.items()}

    def is_of_head(self):
        is_norm = self.arrays.keys() == set(keras_layers.NORM)
        dense = 'kernel' in self.arrays and self.arrays['kernel'].ndim == 2
        return self.module in (None, 'classifier') and (is_norm or dense)


def _name(layers):
    arrays = {}
    for one in layers:
        for role, key in one.layer.keys.items():
            name = keras_layers.path_of(one.module, role) if one.module else None
            # A name that appears twice is unknown, too.
            known = name is not None and name not in arrays
            arrays[name if known else key] = one.arrays[role]
    return arrays


def _without_copy(path, layers):
    """The layers, leaving out a second copy of the network."""
    seen, again = {}, []
    for one in layers:
        if one.module is not None and one.module in seen:
            again.append((seen[one.module], one))
        else:
            seen[one.module] = one
    if not any(one.module.startswith('denseblock') for _, one in again):
        return layers
    first, second = (one.layer.place for one in again[0])
    for one, other in again:
        if one.arrays.keys() != other.arrays.keys() or not all(
            np.array_equal(one.arrays[role], other.arrays[role]) for role in one.arrays
        ):
            raise UserError(
                f'{path} holds two networks, with {first} and {second}; choose one and '
                'save it alone: model.get_layer(NAME).save(FILE)'
            )
    _LOGGER.warning(
        '%s holds the same network twice, with %s and %s; the first is used',
        *(path, first, second),
    )
    copies = [other for _, other in again]
    return [one for one in layers if one not in copies]


def _read_tail(parts, layers, size):
    """The head, and the layers that belong to it."""
    found = [one for one in layers if one.is_of_head()]
    body = {one.module: one.arrays for one in layers if one.module}
    if not any(name.startswith('denseblock') for name in body):
        return keras_tail.Tail(), []
    if parts.behind is None and [one.module for one in found] in ([], ['classifier']):
        return keras_tail.Tail(), []
    width = len(body['norm5']['gamma']) if 'gamma' in body.get('norm5', {}) else None
    arrays = {key: array for one in found for key, array in one.by_key().items()}
    tail = keras_tail.read(parts, [one.layer for one in found], arrays, width, size)
    return tail, found


def _read_file(path, prefix=''):
    """The layers, the names of layers and groups, and `[(class, config)]`.

    Args:
      prefix: a prefix for the paths of the arrays.
    """
    with _reading(path), contextlib.ExitStack() as stack:
        objects, content = [], path
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                objects = keras_config.list_objects(
                    _member(archive, 'config.json', _LARGEST_CONFIG)
                )
                content = io.BytesIO(_member(archive, _WEIGHTS, hdf5.LARGEST))
        file = stack.enter_context(hdf5.open_file(content))
        if 'model_config' in file.attrs:
            objects = keras_config.list_objects(file.attrs['model_config'])
        elif content is path:
            objects = _objects_beside(path)
        datasets, groups = hdf5.walk(file)
        datasets = {k: v for k, v in datasets.items() if not _TRAINING.match(k)}
        arrays = hdf5.load(datasets)
        layers = keras_layers.list_layers(arrays, groups)
        names = {layer.name for layer in layers} | set(groups)
    modules = keras_layers.find_modules(layers, arrays)
    placed = []
    for layer, module in zip(layers, modules, strict=True):
        of_layer = {role: arrays[key] for role, key in layer.keys.items()}
        keys = {role: f'{prefix}{key}' for role, key in layer.keys.items()}
        layer = dataclasses.replace(layer, keys=keys)
        placed.append(_Placed(layer, module, of_layer))
    return placed, names, objects


def _member(archive, name, largest):
    """A file in a .keras archive, unless it is too large to be real."""
    info = archive.getinfo(name)
    limit = max(2**20, hdf5.EXPANSION * info.compress_size)
    if info.file_size > min(largest, limit):
        raise ValueError(f'{name} of {info.file_size} bytes is too large for it')
    return archive.read(info)


def _objects_beside(path):
    """Objects in the JSON file next to the weights of a preset; empty otherwise."""
    folder, name = os.path.split(path)
    try:
        with open(os.path.join(folder, _BESIDE.get(name, '')), 'rb') as file:
            return keras_config.list_objects(file.read(_LARGEST_CONFIG))
    except (OSError, ValueError):
        return []


def write(path: str, module, variables):
    """Writes a model as a file for the DenseNet of keras.applications.

    Both compute the same logits. Keras adds a softmax after the classifier, unless the
    network is created with `classifier_activation=None`. Values are stored as float32.
    If epsilon differs from 1.001e-5, the value in Keras, variances are adjusted (and
    scales too, if a variance is near 0) so that the outputs stay the same.

    Args:
      path: ends in `.weights.h5` (weights only), `.keras` or `.h5` (model and weights).
        Keras loads all of them with `load_weights` and `DenseNet121(weights=path,
        classes=...)`, and the last two also with `keras.models.load_model`.
      module: a `DenseNet`. Without a classifier it becomes `include_top=False`.
      variables: `{'params', 'batch_stats'}`.

    Raises:
      UserError: keras is missing, keras.applications has no such network, or the file
        cannot be written. An existing file then stays as it was.
    """
    if not path.endswith(('.keras', '.h5')):
        raise UserError(f'{path}: Keras files end in .keras, .weights.h5 or .h5')
    _check_fields(path, module)
    arrays = _flatten(variables)
    network = _make_network(module, channels=arrays['params/conv0/kernel'].shape[2])
    for layer in network.layers:
        name = keras_layers.module_of(layer.name)
        if layer.weights:
            layer.set_weights(_weights(name, arrays, module.epsilon))
    folder, name = os.path.split(path)
    try:
        # Keras chooses the format by the extension, so the name keeps it.
        with tempfile.TemporaryDirectory(dir=folder or '.') as temporary:
            written = os.path.join(temporary, name)
            if name.endswith('.weights.h5'):
                network.save_weights(written)
            else:
                network.save(written)
            os.replace(written, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'{path} cannot be written ({reason})') from error


def _check_fields(path, module):
    wanted = {name: (getattr(module, name), fixed) for name, fixed in _FIXED.items()}
    wanted['block_sizes'] = (tuple(module.block_sizes), 'four blocks')
    if len(module.block_sizes) == 4:
        del wanted['block_sizes']
    for name, (value, fixed) in wanted.items():
        if value != fixed:
            raise UserError(
                f'{path}: keras.applications has no DenseNet with '
                f'model.{name}={value}, only with {fixed}; .safetensors and .pth files '
                'support it'
            )


def _make_network(module, channels):
    """A DenseNet of keras.applications with random weights, for any image size."""
    # Keras reads it at import; otherwise it would look for TensorFlow.
    os.environ.setdefault('KERAS_BACKEND', 'jax')
    with errors.extra('keras', '--format=keras'):
        import keras

        # The public functions have fixed lists of blocks; this one takes any list.
        from keras.src.applications.densenet import DenseNet
    depth = 2 * sum(module.block_sizes) + 5
    return DenseNet(
        list(module.block_sizes),
        include_top=module.num_classes > 0,
        weights=None,
        input_tensor=keras.Input((None, None, channels)),
        classes=module.num_classes or 1000,
        name=f'densenet{depth}',
    )


def _weights(module, arrays, epsilon):
    """The arrays of a layer in the order of Keras."""
    roles = keras_layers.NORM
    if f'params/{module}/kernel' in arrays:
        roles = keras_layers.WEIGHTS[: 1 + (f'params/{module}/bias' in arrays)]
    values = [arrays[keras_layers.path_of(module, role)] for role in roles]
    if roles is not keras_layers.NORM or epsilon == keras_config.EPSILON:
        return values
    scale, bias, mean, var = (np.asarray(value, np.float64) for value in values)
    moved = np.maximum(var + (epsilon - keras_config.EPSILON), 0)
    # The scale changes only if the variance would fall below 0.
    scale = scale * np.sqrt((moved + keras_config.EPSILON) / (var + epsilon))
    return [value.astype(np.float32) for value in (scale, bias, mean, moved)]


def _flatten(tree, prefix=''):
    """Nested dicts to `{'params/conv0/kernel': numpy float32 array, ...}`."""
    arrays = {}
    for name, child in tree.items():
        path = f'{prefix}{name}'
        if hasattr(child, 'items'):
            arrays |= _flatten(child, f'{path}/')
        else:
            arrays[path] = np.asarray(child, np.float32)
    return arrays
