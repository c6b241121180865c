"""Loads weight files of torchvision, timm, torchxrayvision, Keras and this package.

A file is recognized by its content, not by its name. Every array is accounted for: if
some are missing, unexpected or have another shape, an error lists them.

    weights = load('densenet121.pth')
    logits = weights.module.apply(weights.variables, images)
"""

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.errors import UserError, list_first
from flax_densenet.models import factory, initialization, network
from flax_densenet.system import paths
from flax_densenet.weights import (
    architecture,
    array_checks,
    head_layers,
    heads,
    keras_files,
    operating_points,
    published,
    rdnet_names,
    safetensors_files,
    timm_config,
    torch_content,
    torch_names,
    torch_pickle,
)
from flax_densenet.weights import channels as channels_lib
from flax_densenet.weights import metadata as metadata_lib

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
METADATA = 'flax_densenet'  # key of our JSON in a safetensors file
# The preparation of images for each family; configs/base.py explains the fields.
_TORCHVISION = dict(
    image_size=224,
    resize='crop',
    crop_fraction=0.875,
    interpolation='bilinear',
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    channels=3,
)
PREPROCESSING = {
    'torchvision': _TORCHVISION,
    'timm': _TORCHVISION | dict(interpolation='bicubic'),
    'rdnet': _TORCHVISION | dict(interpolation='bicubic', crop_fraction=0.9),
    # 0 to 255 becomes -1024 to 1024: (x / 255 - 0.5) * 2048.
    'torchxrayvision': dict(
        image_size=224,
        resize='crop',
        crop_fraction=1.0,
        interpolation='bilinear',
        mean=(0.5,),
        std=(1 / 2048,),
        channels=1,
    ),
    'keras': _TORCHVISION | dict(resize='stretch', crop_fraction=1.0),
    'keras_hub': _TORCHVISION | dict(resize='stretch', crop_fraction=1.0),
}
# How other files begin that people take for weights.
_OTHER_FILES = dict.fromkeys(
    (b'<!doctype', b'<html', b'<?xml', b'<head'),
    'it is a web page, as from a link that asks to log in; download the file itself',
) | {b'\x1f\x8b': 'it is compressed; unpack it with gunzip or tar first'}
# The names of the families in messages.
FAMILIES = {'rdnet': 'RDNet', 'keras': 'Keras', 'keras_hub': 'Keras'}


@dataclasses.dataclass(frozen=True)
class Weights:
    """The content of a weight file.

    Attributes:
      path: the file, or the folder of weights or of a run.
      family: a key of `PREPROCESSING`, or `flax_densenet`.
      variables: `{'params', 'batch_stats'}`, numpy arrays with our names.
      fields: arguments of `create_model`: the variant, and fields that differ from it.
      num_classes: width of the classifier; 0 if the file has none.
      preprocessing: fields of `config.data` that prepare images for these weights.
      class_names: None if the file does not have them.
      metadata: metadata of one of our runs, or other facts in the file.
      outputs: one of `heads.OUTPUTS`; None if the file does not say.
      prepared: the fields of `preprocessing` that come from the file.
      unread: a layer that prepares images in a way that cannot be read, or ''.
      head: layers of a head that cannot be computed and was left out.
      head_reason: why it cannot be computed.
      notes: lines about guesses.
      size_note: what differs at other image sizes than that of the file, or ''.
      folder: the folder of the Hub, if the weights come from one; None for a file.
    """

    path: str
    family: str
    variables: dict[str, Any]
    fields: dict[str, Any]
    num_classes: int
    preprocessing: dict[str, Any]
    class_names: tuple[str, ...] | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    outputs: str | None = None
    prepared: frozenset[str] = frozenset()
    unread: str = ''
    head: tuple[str, ...] = ()
    head_reason: str = ''
    notes: tuple[str, ...] = ()
    size_note: str = ''
    folder: str | None = None

    @property
    def is_own(self) -> bool:
        """Whether this program wrote the weights, with its own metadata."""
        return self.family == 'flax_densenet'

    @functools.cached_property
    def module(self) -> network.Network:
        """The network of these weights."""
        return factory.create_model(num_classes=self.num_classes, **self.fields)


def load(path: str) -> Weights:
    """Loads weights with their architecture and preprocessing.

    Args:
      path: a PyTorch file (`.pth`, `.pt`, `.pth.tar`), a safetensors file or its index
        (`.safetensors.index.json`), a Keras file (`.h5`, `.weights.h5`, `.keras`), a
        folder from the Hugging Face Hub, or the folder of a run (its best checkpoint is
        used). Names of files do not matter. Also a name of published weights
        (`published.is_name`), which are downloaded if necessary.

    Raises:
      UserError: the file is corrupt, holds neither a DenseNet nor an RDNet, or arrays
        are missing, unexpected or have another shape.
    """
    if published.is_name(path):
        found = published.fetch(path)
        return found.describe(load(found.path))
    path = paths.resolve(path, 'init_from=')
    if os.path.isdir(path):
        return (_load_folder if is_weights(path) else _load_run)(path)
    kind = _kind(path)
    if kind == 'keras':
        return _from_keras(path, keras_files.read_content(path))
    if kind == 'safetensors':
        return _load_safetensors(path)
    content = torch_content.find(path, torch_pickle.read(path))
    return _from_torch(path, content)


def is_weights(path: str) -> bool:
    """Whether this is a file, a folder from the Hub or a name of published weights.

    False for the folder of a run.
    """
    if published.is_name(path):
        return True
    path = paths.expand(path)
    return os.path.isfile(path) or timm_config.is_folder(path)


def _load_folder(folder):
    """Weights of timm or of this package, as their config.json describes them."""
    config = timm_config.load(folder)
    weights = load(timm_config.find_weights(folder))
    if config.metadata is not None:
        if weights.metadata != config.metadata:
            weights = _with_metadata(folder, weights, config.metadata)
        timm_config.check_agrees(
            folder, config, weights.class_names, weights.preprocessing
        )
        return dataclasses.replace(weights, path=folder, folder=folder)
    channels = weights.preprocessing['channels']
    timm_config.check_fits(folder, config, weights.module, channels)
    fields = dict(weights.fields)
    # No array shows whether pooling blurs.
    blurs = factory.VARIANTS.get(config.variant, {}).get('blur_pool', False)
    if weights.module.fields().get('blur_pool', blurs) != blurs:
        fields['blur_pool'] = blurs
    return dataclasses.replace(
        weights,
        path=folder,
        family='rdnet' if weights.family == 'rdnet' else 'timm',
        fields=fields,
        preprocessing=config.preprocessing,
        prepared=frozenset(config.preprocessing),
        class_names=config.class_names or weights.class_names,
    )


def _with_metadata(path, file_weights, ours):
    """The weights of a file with the metadata of the config.json next to it."""
    arrays = traverse_util.flatten_dict(file_weights.variables, sep='/')
    weights = _make(
        path, 'flax_densenet', arrays, to_tuples(ours['model']), ours['class_names']
    )
    return dataclasses.replace(
        weights, preprocessing=_preprocessing_of(ours), metadata=ours
    )


def _kind(path):
    try:
        with open(path, 'rb') as file:
            start = file.read(16)
    except FileNotFoundError as error:
        hint = published.suggest(path)
        raise UserError(f'{path}: there is no such file or folder{hint}') from error
    except (OSError, ValueError) as error:  # a NUL in its name
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{path} cannot be read ({reason})') from error
    if keras_files.is_keras_file(path):
        return 'keras'
    if safetensors_files.is_index(path):
        return 'safetensors'
    if len(start) > 8 and start[8:9] == b'{':
        return 'safetensors'
    if start[:4] == b'PK\x03\x04' or start[:1] == b'\x80':
        return 'torch'
    if start == b'version https://':
        raise UserError(
            f'{path} is not the weights but a Git LFS pointer to them; download them '
            'with: git lfs pull'
        )
    for beginning, reason in _OTHER_FILES.items():
        if start.lower().startswith(beginning):
            raise UserError(f'{path} holds no weights: {reason}')
    if not start:
        raise UserError(f'{path} is empty; download it again')
    raise UserError(
        f'{path} holds no weights; use a file of torch (.pth), safetensors or Keras '
        '(.h5, .keras), or the folder of a run'
    )


def _from_keras(path, content):
    around, tail = content.around, content.tail
    weights = _make(path, content.family, content.arrays, content.fields)
    prepared, unread = _fit_means(weights, around.preparation)
    return dataclasses.replace(
        weights,
        preprocessing=weights.preprocessing | prepared,
        prepared=frozenset(prepared),
        unread=around.unread or unread,
        outputs=around.outputs,
        head=tail.layers,
        head_reason=tail.reason,
        notes=(f'{path}: {tail.guess}',) if tail.guess else (),
        size_note=tail.size_note,
    )


def _fit_means(weights, prepared):
    """The fields that were read, and a description of those that cannot be used."""
    channels = weights.preprocessing['channels']
    fitted = channels_lib.fit_means(prepared, channels)
    if fitted is None:
        kept = {k: v for k, v in prepared.items() if k not in ('mean', 'std')}
        return kept, f'its mean and std, which are not for {channels} channels,'
    return fitted, ''


def _from_torch(path, content):
    renamed = torch_names.rename(path, content.arrays, content.layers)
    arrays = renamed.arrays
    family, preprocessing = 'torchvision', None
    first, head = (arrays.get(f'params/{n}/kernel') for n in ('conv0', 'classifier'))
    if rdnet_names.is_rdnet(arrays):
        family = 'rdnet'
    elif 'params/conv1/kernel' in arrays:  # a deep stem, which torchvision lacks
        family = 'timm'
    gray = first is not None and first.ndim == 4 and first.shape[2] == 1
    if gray and (renamed.extra or (head is not None and head.shape[-1] == 18)):
        family = 'torchxrayvision'
    elif sidecar := timm_config.preprocessing_beside(path):
        family = family if family == 'rdnet' else 'timm'
        preprocessing = sidecar
    other_head, reason = renamed.head or content.head, renamed.reason
    if other_head:
        arrays = {k: v for k, v in arrays.items() if '/classifier/' not in k}
    fields = architecture.differing(path, arrays, content.fields)
    weights = _make(
        path, family, arrays, fields | ({} if other_head else renamed.fields)
    )
    names, unfit = _choose_names(content.class_names, weights.num_classes)
    if preprocessing and preprocessing['channels'] != weights.preprocessing['channels']:
        preprocessing = None  # it belongs to other weights
    prepared, unread = _fit_means(weights, preprocessing or renamed.preparation)
    outputs = content.outputs
    extra = dict(renamed.extra)
    if family == 'torchxrayvision':
        outputs = outputs or heads.SIGMOID
        extra.setdefault('operating_points', operating_points.of_file(path))
    return dataclasses.replace(
        weights,
        metadata={k: v for k, v in extra.items() if v is not None},
        class_names=names,
        outputs=outputs,
        preprocessing=weights.preprocessing | prepared,
        prepared=frozenset(prepared),
        unread=unread,
        head=other_head,
        head_reason=reason or 'one of them computes something else',
        notes=tuple(
            f'{path}: {one}' for one in (renamed.guess, unfit or content.note) if one
        ),
    )


def _choose_names(found, count):
    """The names that fit the number of outputs, and a line if there are only others.

    One output may have two names.
    """
    fitting = [n for n in found if len(n) == count or (count == 1 and len(n) == 2)]
    if fitting or not found or not count:
        return (fitting[0] if fitting else None), ''
    return None, (
        f'it names {len(found[0])} classes ({list_first(found[0], 3)}), but has '
        f'{count} outputs, so these names are not used; to give others: '
        '--class_names=FILE or A,B,...'
    )


def _load_safetensors(path):
    metadata, arrays = safetensors_files.read(path)
    if METADATA not in metadata:
        names = torch_content.names_of_metadata(metadata)
        return _from_torch(path, torch_content.Content(arrays, names))
    try:
        ours = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: its metadata is not ours ({error!r})') from error
    metadata_lib.check(path, ours, named=False)
    fields, names = to_tuples(ours['model']), ours['class_names']
    arrays = torch_names.rename(path, arrays, own=True).arrays
    weights = _make(path, 'flax_densenet', arrays, fields, names)
    return dataclasses.replace(
        weights, preprocessing=_preprocessing_of(ours), metadata=ours
    )


def _load_run(workdir):
    step = checkpoint_reader.find_step(workdir, 'best')
    metadata = metadata_lib.load(workdir, step)
    fields = to_tuples(metadata['model'])
    names = tuple(metadata['class_names'])
    module = factory.create_model(num_classes=len(names), **fields)
    channels = len(metadata['mean'])
    restored = checkpoint_reader.restore(
        workdir,
        step,
        sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]),
        model=initialization.variable_shapes(module, channels=channels),
    )
    variables = jax.tree.map(np.asarray, restored['model'])
    flat = traverse_util.flatten_dict(variables, sep='/')
    array_checks.check_values(f'{workdir}, epoch {step}', flat, str)
    return Weights(
        path=workdir,
        family='flax_densenet',
        variables=variables,
        fields=fields,
        num_classes=len(names),
        preprocessing=_preprocessing_of(metadata),
        class_names=names,
        metadata=metadata,
    )


def _preprocessing_of(metadata):
    data = {
        name: value
        for name, value in metadata['data'].items()
        if name in _TORCHVISION and value is not None
    }
    data |= {name: metadata[name] for name in ('image_size', 'mean', 'std')}
    data = to_tuples(data) | {'channels': len(data['mean'])}
    # For models of 8-bit images, a new run determines them from its own images.
    window, bit_depth = (metadata['data'].get(n) for n in ('window', 'bit_depth'))
    if window or (bit_depth or 8) > 8:
        data |= {'window': tuple(window or ()), 'bit_depth': bit_depth or 8}
    return _TORCHVISION | data


def to_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Converts lists from JSON to tuples, so that modules are hashable."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _make(path, family, arrays, fields, names=None):
    """Checks every array against the architecture, and makes `Weights`."""
    fields = architecture.find_fields(path, arrays) | fields
    *hidden, num_classes = head_layers.widths_of(arrays) or (0,)
    if hidden:
        fields['hidden'] = tuple(hidden)
    if names and len(names) != num_classes:
        raise UserError(
            f'{path} names {len(names)} classes, but its classifier has {num_classes}; '
            'use an intact copy'
        )
    module = factory.create_model(num_classes=num_classes, **fields)
    channels = arrays['params/conv0/kernel'].shape[2]
    shapes = initialization.variable_shapes(module, channels=channels)
    wanted = traverse_util.flatten_dict(shapes, sep='/')
    show = str if family.startswith('keras') else torch_names.torch_key
    if rdnet_names.is_rdnet(arrays):
        show = rdnet_names.torch_key
    array_checks.check(path, arrays, wanted, show)
    flat = {name: np.asarray(arrays[name], leaf.dtype) for name, leaf in wanted.items()}
    array_checks.check_values(path, flat, show)
    preprocessing = PREPROCESSING.get(family, _TORCHVISION)
    if channels != preprocessing['channels']:
        preprocessing = channels_lib.with_channels(preprocessing, channels)
    return Weights(
        path=path,
        family=family,
        variables=initialization.with_statistics(
            traverse_util.unflatten_dict(flat, sep='/')
        ),
        fields=fields,
        num_classes=num_classes,
        preprocessing=preprocessing,
        class_names=tuple(map(str, names)) if names else None,
    )
