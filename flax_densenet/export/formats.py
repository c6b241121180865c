"""Writes trained models to files for other frameworks, for runtimes, and for JAX.

`hub` writes folders for the Hugging Face Hub.

If the program that reads a file uses another batch norm epsilon than the model, the
difference is added to the variances, so that the file computes the same as the model.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
from flax import traverse_util

from flax_densenet.data import source_names
from flax_densenet.errors import UserError
from flax_densenet.export import (
    hub,
    onnx_graph,
    onnx_int8,
    onnx_network,
    stablehlo,
)
from flax_densenet.export import precision as precision_lib
from flax_densenet.weights import keras_files, rdnet_names, torch_names, weight_file
from flax_densenet.weights import trained as trained_lib

_TORCH_EPSILON = 1e-5


def torch_arrays(module, variables) -> dict[str, np.ndarray]:
    """The `state_dict` of torchvision's model, or of timm's RDNet, in float32.

    Args:
      variables: `{'params', 'batch_stats'}`.

    Raises:
      UserError: the model pads differently from torchvision, or its epsilon is so much
        smaller that a variance would be negative.
    """
    flat = traverse_util.flatten_dict(variables, sep='/')
    return _TORCH_ARRAYS[module.family](module, flat)


def _densenet_arrays(module, flat):
    if module.padding != 'torch' and module.stem != 'cifar':
        raise UserError(
            f'model.padding={module.padding}: torchvision and timm pad differently, so '
            'they would compute something else with these weights; use --format=keras '
            'or keep the workdir'
        )
    arrays = {}
    for name, array in flat.items():
        array = torch_names.to_torch_layout(np.asarray(array, np.float32))
        if name.endswith('/var') and module.epsilon != _TORCH_EPSILON:
            array = array + np.float32(module.epsilon - _TORCH_EPSILON)
            if array.min() < 0:
                raise UserError(
                    f"{name}: with torch's epsilon of 1e-5 instead of "
                    f'{module.epsilon:g} a variance would be below 0'
                )
        key = torch_names.torch_key(name)
        arrays[key] = array
        if key.endswith('.running_mean'):
            place = key.removesuffix('.running_mean')
            arrays[f'{place}.num_batches_tracked'] = np.array(0, np.int64)
    return dict(sorted(arrays.items()))


# By `Network.family`.
_TORCH_ARRAYS = {'densenet': _densenet_arrays, 'rdnet': rdnet_names.torch_arrays}


def _write_torch(path, trained, options):
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "--format=torch needs torch: pip install 'flax_densenet[torch]'; "
            '--format=safetensors needs nothing more, and torch can read it'
        ) from error
    arrays = _stored(torch_arrays(trained.module, trained.variables), options)
    types = {'bfloat16': torch.bfloat16}
    tensors = {
        name: torch.from_numpy(np.float32(array)).to(types[array.dtype.name])
        if array.dtype.name in types
        else torch.from_numpy(array.copy())
        for name, array in arrays.items()
    }
    torch.save(tensors, path)


def _write_safetensors(path, trained, options):
    from safetensors import numpy as safetensors

    metadata = dict(trained.metadata)
    if trained.module.has_batch_norm:
        metadata['model'] = dict(metadata['model'], epsilon=_TORCH_EPSILON)
    content = safetensors.save(
        _stored(torch_arrays(trained.module, trained.variables), options),
        {weight_file.METADATA: json.dumps(metadata), 'format': 'pt'},
    )
    # `save_file` creates files that only their owner can read.
    with open(path, 'wb') as file:
        file.write(content)


def _stored(arrays, options):
    """Converts kernels to the requested precision; small norms and biases stay."""
    if options.precision == 'float32':
        return arrays
    return {
        name: precision_lib.convert(array, options.precision, name)
        if array.ndim > 1
        else array
        for name, array in arrays.items()
    }


def _write_keras(path, trained, options):
    if trained.module.family != 'densenet':
        variant = trained.metadata['model']['variant']
        raise UserError(
            f'--format=keras: keras.applications has no {variant}; use '
            '--format=safetensors or torch'
        )
    keras_files.write(path, trained.module, trained.variables)


def _write_onnx(path, trained, options):
    arguments = trained.module, trained.variables, trained.metadata
    more = {'inputs': options.inputs, 'decisions': trained.decisions}
    if options.precision == 'int8':
        made = onnx_int8.make(*arguments, options.calibration, **more)
    else:
        made = onnx_network.make(*arguments, precision=options.precision, **more)
    onnx_graph.import_onnx().save(made, path)


def _write_stablehlo(path, trained, options):
    plain = trained.with_tta('none')  # the default of all other formats
    stablehlo.save(
        path,
        plain,
        inputs=options.inputs,
        precision=options.precision,
        any_size=plain.module.takes_any_size(),
    )


def _write_huggingface(folder, trained, options):
    def write_weights(path, trained):
        _write_safetensors(path, trained, options)

    hub.write(folder, trained, write_weights, license=options.license)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an export.

    Attributes:
      inputs: `images` (uint8 in, probabilities out) or `normalized` (floats in, logits
        out); None for the default of the format.
      precision: precision of the stored weights; `int8` also computes in integers.
      calibration: for `int8`, typical images as uint8 batches `[N, H, W, C]`.
      license: license of the weights, for formats that store it.
    """

    inputs: str | None = None
    precision: str = 'float32'
    calibration: Sequence[np.ndarray] | None = None
    license: str | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
      write: a function `(path, trained, options)` that writes the file.
      endings: valid extensions of the file.
      inputs: valid input types; the first is the default.
      precisions: valid precisions of the weights.
      runtimes: keys of `runtimes.RUNTIMES` that can run the file.
      channels_first: whether normalized images are `[N, C, H, W]`.
      folds: whether a calibration is folded into the weights; otherwise `write` handles
        it.
    """

    write: Callable[[str, trained_lib.Trained, Options], None]
    endings: tuple[str, ...]
    inputs: tuple[str, ...] = ('normalized',)
    precisions: tuple[str, ...] = precision_lib.PRECISIONS
    runtimes: tuple[str, ...] = ('flax_densenet',)
    channels_first: bool = False
    folds: bool = True


FORMATS = {
    'safetensors': Format(
        _write_safetensors, ('.safetensors',), runtimes=('flax_densenet', 'torch')
    ),
    'torch': Format(_write_torch, ('.pth', '.pt'), runtimes=('torch',)),
    'keras': Format(
        _write_keras,
        ('.keras', '.weights.h5', '.h5'),
        precisions=('float32',),
        runtimes=('keras',),
    ),
    'onnx': Format(
        _write_onnx,
        ('.onnx',),
        inputs=onnx_network.INPUTS,
        precisions=(*precision_lib.PRECISIONS, 'int8'),
        runtimes=('onnxruntime', 'openvino'),
        channels_first=True,
    ),
    'stablehlo': Format(
        _write_stablehlo,
        ('.stablehlo',),
        inputs=stablehlo.INPUTS,
        runtimes=('jax',),
        folds=False,
    ),
    'huggingface': Format(
        _write_huggingface,
        ('',),  # a folder
        runtimes=('flax_densenet', 'torch'),
    ),
}


# Formats for classes of other packages, whose head is one layer after mean pooling.
_USUAL_HEADS = ('torch', 'keras', 'huggingface')
# Formats for any graph, such as an ensemble of networks.
_ENSEMBLES = ('onnx', 'stablehlo')


def by_ending(path: str) -> str:
    """The format that the extension of a file implies.

    >>> by_ending('birds.weights.h5')
    'keras'

    Raises:
      UserError: no format has this extension.
    """
    endings = {
        ending: name
        for name, known in FORMATS.items()
        for ending in known.endings
        if ending
    }
    for ending, name in endings.items():
        if path.endswith(ending):
            return name
    raise UserError(
        f'{path}: no format has this extension; use one of {", ".join(endings)}, or '
        '--format=huggingface for a folder'
    )


def save(
    path: str,
    trained: trained_lib.Trained,
    file_format: str,
    options: Options | None = None,
    *,
    verify: Callable[[str], None] = lambda part: None,
):
    """Writes a trained model to a file, atomically.

    Args:
      path: the file, with an extension of the format; an existing file is replaced.
      trained: the model. Its calibration is folded into the weights of the classifier.
      file_format: a key of `FORMATS`. `torch` and `safetensors` files work with
        `load_state_dict(strict=True)` in torchvision and timm; `weight_file.load` reads
        `safetensors` files with all metadata of the model. `keras` is for
        `keras.applications`, `onnx` for ONNX Runtime and others, `stablehlo` for JAX.
        `huggingface` is a folder.
      options: inputs, precision and so on; None for the defaults.
      verify: called with the new file before it is moved into place. If it raises, the
        existing file stays.

    Raises:
      UserError: the format cannot hold the model, or the file cannot be written.
    """
    options = options or Options()
    check_format(path, file_format, options)
    check_head(trained.module, file_format)
    written = FORMATS[file_format]
    trained = _prepare(trained, folds=written.folds)
    if options.inputs is None:
        options = dataclasses.replace(options, inputs=written.inputs[0])
    folder = os.path.dirname(os.path.abspath(path))
    ending = next(ending for ending in written.endings if path.endswith(ending))
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix='.export') as unfinished:
            part = os.path.join(unfinished, f'model{ending}')
            written.write(part, trained, options)
            verify(part)
            hub.place(part, path)
    except OSError as error:
        raise UserError(
            f'--out={path} cannot be written ({error.strerror or error})'
        ) from error


def _prepare(trained, *, folds):
    """The model with its calibration in its weights or in the program.

    Its metadata keeps what was fitted, with the name of the data but without its path.
    """
    if trained.decisions is None:
        return trained
    data = source_names.public_source(trained.decisions.data) or ''
    decisions = dataclasses.replace(trained.decisions, data=data)
    trained = dataclasses.replace(trained, decisions=decisions)
    folded = trained.folded()
    if folds:
        return folded
    return dataclasses.replace(trained, metadata=folded.metadata)


def check_head(module, file_format: str):
    """Raises `UserError` if a format does not support the head of a network."""
    if module.members > 1 and file_format not in _ENSEMBLES:
        raise UserError(
            f'--format={file_format} holds one network, and this is an ensemble of '
            f'{module.members}; use --format={" or ".join(_ENSEMBLES)}, or export one '
            'of them, as fold-1 in its folder'
        )
    if not module.has_usual_head() and file_format in _USUAL_HEADS:
        raise UserError(
            f'--format={file_format}: the network has a head of several layers or '
            'another pooling, which the networks there lack; use --format=safetensors, '
            'onnx or stablehlo'
        )


def check_format(path: str, file_format: str, options: Options | None = None):
    """Raises `UserError` for an unknown format or option, or an invalid file name."""
    if file_format not in FORMATS:
        raise UserError(
            f'--format={file_format} is not known; use {", ".join(FORMATS)}'
        )
    known, options = FORMATS[file_format], options or Options()
    if not path.endswith(known.endings):
        raise UserError(
            f'--out={path}: a file of --format={file_format} ends with '
            f'{" or ".join(known.endings)}'
        )
    for name, valid in (('inputs', known.inputs), ('precision', known.precisions)):
        value = getattr(options, name)
        if value is not None and value not in valid:
            raise UserError(
                f'--{name}={value}: --format={file_format} has {", ".join(valid)}'
            )
    if file_format == 'huggingface':
        hub.check(path)
