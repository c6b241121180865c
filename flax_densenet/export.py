"""Trained models as single files: for torchvision, timm and Keras, and for ourselves.

As a folder for the Hugging Face Hub also, see `hub`.

A batch norm adds its own small number to the variance before the root. Where that is
another one in the program that is to read the file, the difference is added to the
variances, so the file computes what the model does.
"""

import json
import os
import tempfile
from typing import Any

import numpy as np
from flax import traverse_util

from flax_densenet import evaluate, hub, keras_files, model, rdnet_files
from flax_densenet import weights as weights_lib
from flax_densenet.errors import UserError

_TORCH_EPSILON = 1e-5


def torch_arrays(module, variables) -> dict[str, np.ndarray]:
    """torchvision's `state_dict`, of RDNet timm's: keys, layouts, epsilon, float32.

    Args:
      variables: `{'params', 'batch_stats'}`.

    Raises:
      UserError: the model pads as torchvision does not, or its epsilon is so much
        smaller that a variance would be negative.
    """
    flat = traverse_util.flatten_dict(variables, sep='/')
    if not model.has_batch_norm(module):
        return rdnet_files.torch_arrays(module, flat)
    if module.padding != 'torch' and module.stem != 'cifar':
        raise UserError(
            f'model.padding={module.padding}: torchvision and timm pad otherwise, so '
            'they would compute something else from these weights; use --format=keras '
            'or keep the workdir'
        )
    found = {}
    for name, array in flat.items():
        array = weights_lib.to_torch_layout(np.asarray(array, np.float32))
        if name.endswith('/var') and module.epsilon != _TORCH_EPSILON:
            array = array + np.float32(module.epsilon - _TORCH_EPSILON)
            if array.min() < 0:
                raise UserError(
                    f"{name}: with torch's epsilon of 1e-5 instead of "
                    f'{module.epsilon:g} a variance would be below 0'
                )
        key = weights_lib.torch_key(name)
        found[key] = array
        if key.endswith('.running_mean'):
            place = key.removesuffix('.running_mean')
            found[f'{place}.num_batches_tracked'] = np.array(0, np.int64)
    return dict(sorted(found.items()))


def _write_torch(path, trained):
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "--format=torch needs torch: pip install 'flax_densenet[torch]'; "
            '--format=safetensors needs nothing more, and torch can read it'
        ) from error
    arrays = torch_arrays(trained.module, trained.variables)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    torch.save(tensors, path)


def _write_safetensors(path, trained):
    from safetensors import numpy as safetensors

    metadata = dict(trained.metadata)
    if model.has_batch_norm(trained.module):
        metadata['model'] = dict(metadata['model'], epsilon=_TORCH_EPSILON)
    safetensors.save_file(
        torch_arrays(trained.module, trained.variables),
        path,
        {weights_lib.METADATA: json.dumps(metadata), 'format': 'pt'},
    )


def _write_keras(path, trained):
    if not model.has_batch_norm(trained.module):
        variant = trained.metadata['model']['variant']
        raise UserError(
            f'--format=keras: keras.applications has no {variant}; use '
            '--format=safetensors or torch'
        )
    keras_files.write(path, trained.module, trained.variables)


def _write_huggingface(path, trained):
    hub.write(path, trained, _write_safetensors)


FORMATS = {
    'torch': (_write_torch, ('.pth', '.pt')),
    'safetensors': (_write_safetensors, ('.safetensors',)),
    'keras': (_write_keras, ('.keras', '.weights.h5', '.h5')),
    'huggingface': (_write_huggingface, ('',)),  # a folder
}


def save(path: str, trained: evaluate.Trained, file_format: str):
    """Writes a trained model to one file, whole or not at all.

    Args:
      path: its name ends as the format's names do; replaced where it is there.
      file_format: `torch` and `safetensors` are taken by torchvision's and timm's
        `load_state_dict(strict=True)`, the latter also by `weights.load` with all that
        this project knows of the model; `keras` by `keras.applications`;
        `huggingface` is a folder (`hub`).

    Raises:
      UserError: the format cannot hold the model, or the file cannot be written.
    """
    check_format(path, file_format)
    write, endings = FORMATS[file_format]
    folder = os.path.dirname(os.path.abspath(path))
    ending = next(ending for ending in endings if path.endswith(ending))
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix='.export') as unfinished:
            part = os.path.join(unfinished, f'model{ending}')
            write(part, trained)
            hub.place(part, path)
    except OSError as error:
        raise UserError(
            f'--out={path} cannot be written ({error.strerror or error})'
        ) from error


def check_format(path: str, file_format: str):
    """Raises where the format is not known, or the file's name is not one of its."""
    if file_format not in FORMATS:
        raise UserError(
            f'--format={file_format} is not known; use {", ".join(FORMATS)}'
        )
    endings: Any = FORMATS[file_format][1]
    if not path.endswith(endings):
        raise UserError(
            f'--out={path}: a file of --format={file_format} ends with '
            f'{" or ".join(endings)}'
        )
    if file_format == 'huggingface':
        hub.check(path)
