"""Reads and writes `config.json` in timm's format for the Hugging Face Hub.

timm builds the network from `architecture` and `model_args` and prepares images
according to `pretrained_cfg`. Everything else that this program knows about a model is
stored under `flax_densenet`, which timm ignores. A config may come from a stranger, so
it is checked here before any of it is used.
"""

import dataclasses
import json
import math
import os
from typing import Any

from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import bands, images
from flax_densenet.errors import UserError
from flax_densenet.models import factory, network
from flax_densenet.settings import sizes
from flax_densenet.weights import metadata as metadata_lib
from flax_densenet.weights import timm_network

CONFIG_FILE = 'config.json'
WEIGHT_FILES = ('model.safetensors', 'pytorch_model.bin')
_INDEX_FILE = 'model.safetensors.index.json'  # of a file in several parts
OURS = 'flax_densenet'  # key of our metadata
_RUN_FILE = 'environment.json'  # in run folders, which have a config.json too
_LARGEST = 2**27  # bytes
_CROPS = {'crop': 'center', 'stretch': 'squash'}  # ours: timm's
# Arguments of timm that no array depends on, with their values in our networks.
_FIXED = {
    'global_pool': 'avg',
    'act_layer': None,
    'norm_layer': None,
    'norm_eps': None,
    'aa_layer': None,
    'head_norm_first': False,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The content of a config.json, checked.

    Attributes:
      variant: variant of the network; None if there is our own metadata, which has it.
      arguments: arguments of timm's class (`timm_network.arguments`).
      num_classes: number of classes; None if the file does not say.
      class_names: names of the classes; None if the file does not name all of them.
      preprocessing: see `weight_file.Weights.preprocessing`.
      metadata: metadata of one of our runs; None for models of timm.
    """

    variant: str | None
    arguments: dict[str, Any]
    num_classes: int | None
    class_names: tuple[str, ...] | None
    preprocessing: dict[str, Any]
    metadata: dict[str, Any] | None


def is_folder(path: str) -> bool:
    """Whether this is a folder from the Hub rather than the folder of a run."""
    return (
        os.path.isfile(os.path.join(path, CONFIG_FILE))
        and not os.path.exists(os.path.join(path, _RUN_FILE))
        and not checkpoint_reader.has_checkpoint(path)
    )


def has_statistics(content: dict[str, Any]) -> bool:
    """Whether a folder with this config.json needs `decisions.STATISTICS_FILE`."""
    found = content.get(OURS)
    found = found.get('decisions') if isinstance(found, dict) else None
    return isinstance(found, dict) and found.get('statistics') is True


def find_weights(folder: str) -> str:
    """The path of the weight file in a folder.

    Raises:
      UserError: there is no weight file.
    """
    for name in (*WEIGHT_FILES, _INDEX_FILE):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    raise UserError(
        f'{folder} has a {CONFIG_FILE} but no {" or ".join(WEIGHT_FILES)}; use an '
        'intact copy'
    )


def make(
    module: network.Network,
    metadata: dict[str, Any],
    preparation: images.Preparation,
    *,
    num_features: int,
    license: str | None = None,
) -> dict[str, Any]:
    """The content of config.json.

    Args:
      metadata: metadata of the run; `class_names` can be None.
      preparation: preparation of the images.
      num_features: number of inputs of the classifier.
      license: license of the weights.
    """
    channels, shape = preparation.channels, preparation.shape
    # timm lacks this name, although its arrays fit some networks without a name there.
    unknown = f'flax_densenet/{metadata["model"].get("variant")}'
    name, arguments = timm_network.find(module, channels=channels) or (unknown, {})
    first, last = timm_network.FIRST_AND_LAST[module.family]
    crop = preparation.crop_fraction if preparation.resize == 'crop' else 1.0
    made = {
        'architecture': name,
        'num_classes': module.num_classes,
        'num_features': num_features,
        'global_pool': 'avg',
        'label_names': metadata['class_names'],
        'model_args': arguments,
        'pretrained_cfg': {
            'input_size': [channels, *shape],
            'fixed_input_size': False,
            'interpolation': preparation.interpolation,
            'crop_pct': crop,
            'crop_mode': _CROPS[preparation.resize],
            'mean': list(metadata['mean']),
            'std': list(metadata['std']),
            'num_classes': module.num_classes,
            'pool_size': [module.last_map_side(side) for side in shape],
            'first_conv': first,
            'classifier': last,
            'license': license,
        },
        OURS: metadata,
    }
    if made['label_names'] is None:
        del made['label_names']
    if not arguments:
        del made['model_args']
    return made


def read(path: str) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
      UserError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        if os.path.getsize(path) > _LARGEST:
            raise UserError(f'{path} is far too large to describe a model')
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, 'strerror', None) or error
        raise UserError(
            f'{path} is not valid JSON ({reason}); use an intact copy'
        ) from error
    if not isinstance(content, dict):
        raise UserError(f'{path} is not a JSON object; use an intact copy')
    return content


def load(folder: str) -> Config:
    """Reads and checks the config of a folder.

    Raises:
      UserError: the config is not JSON, or this program does not support its network or
        its preparation of images.
    """
    path = os.path.join(folder, CONFIG_FILE)
    content = read(path)
    # Old files keep everything in one object.
    settings = content.get('pretrained_cfg', content)
    if not isinstance(settings, dict):
        raise _wrong(path, 'pretrained_cfg', settings, 'an object')
    num_classes = _find(content, settings, 'num_classes')
    if num_classes is not None and not _is_count(num_classes):
        raise _wrong(path, 'num_classes', num_classes, 'a whole number')
    variant, arguments = None, {}
    if (metadata := content.get(OURS)) is None:
        variant, arguments = _network(path, content)
    else:
        metadata_lib.check(path, metadata, named=False)
    return Config(
        variant=variant,
        arguments=arguments,
        num_classes=num_classes,
        class_names=_class_names(path, content, settings, num_classes),
        preprocessing=preprocessing_of(path, settings),
        metadata=metadata,
    )


def _find(content, settings, name):
    value = content.get(name)
    return settings.get(name) if value is None else value


def _wrong(path, name, value, wanted):
    stated = 'missing' if value is None else repr(value)[:60]
    return UserError(f'{path}: {name} is {stated}; this program expects {wanted}')


def _is_count(value):
    return type(value) is int and 0 <= value <= metadata_lib.MOST_CLASSES


def _network(path, content):
    """Our name of the architecture, and timm's arguments for it."""
    name = content.get('architecture')
    variant = name.partition('.')[0].removeprefix('tv_') if _is_text(name) else ''
    try:
        module = factory.create_model(variant, num_classes=1)
    except UserError as error:
        raise _wrong(path, 'architecture', name, ', '.join(factory.VARIANTS)) from error
    given = content.get('model_args')
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise _wrong(path, 'model_args', given, 'an object')
    for key, usual in _FIXED.items():
        if given.get(key) not in (usual, None):
            wanted = 'nothing' if usual is None else f'{usual}, or nothing,'
            raise _wrong(path, f'model_args.{key}', given[key], wanted)
    own = timm_network.arguments(module)
    known = {key: value for key, value in given.items() if key in own}
    if 'ls_init_value' in known:  # it only matters whether there are factors
        known['ls_init_value'] = 1e-6 if known['ls_init_value'] else 0.0
    return variant, own | known


def _is_text(value):
    return isinstance(value, str) and len(value) < 200


def _class_names(path, content, settings, num_classes):
    """The class names, from a list or from `{number: name}`."""
    names = _find(content, settings, 'label_names')
    if names is None or num_classes is None:
        return None
    if isinstance(names, dict):
        if sorted(names) != sorted(map(str, range(num_classes))):
            return None  # timm allows gaps
        names = [names[str(number)] for number in range(num_classes)]
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise _wrong(path, 'label_names', names, 'a list of strings')
    if len(names) != num_classes:
        raise UserError(
            f'{path}: {len(names)} label_names for num_classes={num_classes}; use as '
            'many names as classes, or remove label_names'
        )
    return tuple(names)


def preprocessing_of(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of `config.data` that prepare images as `pretrained_cfg` says.

    Args:
      path: the config, for error messages.
      settings: the content of `pretrained_cfg`.

    Raises:
      UserError: this program cannot prepare images in that way.
    """
    usual: dict[str, Any] = {
        'crop_pct': 0.875,
        'crop_mode': 'center',
        'interpolation': 'bicubic',
        'input_size': [3, 224, 224],
        'mean': [0.485, 0.456, 0.406],
        'std': [0.229, 0.224, 0.225],
    }
    settings = usual | {k: v for k, v in settings.items() if v is not None}
    for name, (is_good, wanted) in _PREPARATION.items():
        if not is_good(settings[name]):
            raise _wrong(path, f'pretrained_cfg.{name}', settings[name], wanted)
    channels, *shape = settings['input_size']
    crop = float(settings['crop_pct'])
    resize = next(o for o, t in _CROPS.items() if t == settings['crop_mode'])
    if resize == 'stretch' and crop != 1:
        wanted = '1.0 with the crop_mode squash'
        raise _wrong(path, 'pretrained_cfg.crop_pct', crop, wanted)
    for name in ('mean', 'std'):
        if len(settings[name]) != channels:
            wanted = f'a number for each of {channels} channels'
            raise _wrong(path, f'pretrained_cfg.{name}', settings[name], wanted)
    return dict(
        image_size=sizes.parse(shape),
        resize=resize,
        crop_fraction=crop,
        interpolation=settings['interpolation'],
        mean=tuple(map(float, settings['mean'])),
        std=tuple(map(float, settings['std'])),
        channels=channels,
    )


def preprocessing_beside(path: str) -> dict[str, Any] | None:
    """The preprocessing in the config.json next to a file from the Hub."""
    config = os.path.join(os.path.dirname(path), CONFIG_FILE)
    try:
        settings = read(config).get('pretrained_cfg')
        # Run folders have a file with this name, too.
        if isinstance(settings, dict):
            return preprocessing_of(config, settings)
    except UserError:
        pass
    return None


def _is_size(value):
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(n) is int for n in value)
        and 1 <= value[0] <= bands.MOST
        and all(0 < side <= sizes.LARGEST for side in value[1:])
    )


def _are_numbers(value):
    return isinstance(value, list) and all(
        type(n) in (int, float) and math.isfinite(n) for n in value
    )


def _is_share(value):
    return type(value) in (int, float) and 0.01 <= value <= 1


def _is_one_of(names):
    return lambda value: isinstance(value, str) and value in names


_PREPARATION = {
    'input_size': (_is_size, '[CHANNELS, HEIGHT, WIDTH]'),
    'crop_pct': (_is_share, 'a share up to 1'),
    'crop_mode': (_is_one_of(_CROPS.values()), ' or '.join(_CROPS.values())),
    'interpolation': (
        _is_one_of(images.INTERPOLATIONS),
        ' or '.join(images.INTERPOLATIONS),
    ),
    'mean': (_are_numbers, 'a number for each channel'),
    'std': (
        lambda value: _are_numbers(value) and min(value, default=0) > 0,
        'a number above 0 for each channel',
    ),
}


def check_fits(folder: str, config: Config, module: network.Network, channels: int):
    """Raises `UserError` if the weights do not fit the network in the config.

    Args:
      channels: number of image channels of the weights.
    """
    _compare(
        folder,
        {'channels': config.preprocessing['channels']},
        {'channels': channels},
        'the weights next to it have',
        'use files that belong together',
    )
    arguments = timm_network.arguments(module)
    stated = config.arguments | {'num_classes': config.num_classes}
    actual = {key: arguments.get(key, 'none') for key in config.arguments} | {
        'num_classes': module.num_classes
    }
    _compare(
        folder,
        {key: value for key, value in stated.items() if value is not None},
        actual,
        'the weights next to it have',
        'use files that belong together',
    )


def check_agrees(folder: str, config: Config, class_names, preprocessing):
    """Raises `UserError` if timm's part of the config disagrees with ours.

    Args:
      class_names, preprocessing: values in our metadata in the config.
    """
    stated = dict(config.preprocessing)
    if preprocessing['resize'] == 'stretch':
        del stated['crop_fraction']  # has no effect
    if config.class_names is not None:
        stated['label_names'] = config.class_names
    _compare(
        folder,
        stated,
        preprocessing | {'label_names': class_names},
        f'under {OURS} it says',
        'make both the same',
    )


def _compare(folder, stated, actual, where, remedy):
    wrong = [key for key, value in stated.items() if value != actual[key]]
    if wrong:
        path = os.path.join(folder, CONFIG_FILE)
        one, other = (
            ', '.join(f'{key}={repr(side[key])[:80]}' for key in wrong)
            for side in (stated, actual)
        )
        raise UserError(f'{path} says {one}; {where} {other}: {remedy}')
