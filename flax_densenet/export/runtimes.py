"""Exported files in the programs that they are for, each in a process of its own.

A process that wrote a file can read it with what it still remembers; a fresh one has
the file alone. So each file is tried before it is handed out (`verify`).
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

_BATCH = 16


def _onnxruntime(path, about) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _openvino(path, about):
    import openvino

    # As float32 also on processors that could do with less.
    options = {'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.Core().compile_model(path, 'CPU', options)
    return lambda images: next(iter(compiled(images).values()))


def _ours(path, about):
    import jax

    from flax_densenet.weights import trained

    found = trained.load_trained(path)
    # As the other runtimes compute, whatever the run was trained in.
    apply = jax.jit(found.module.clone(dtype='float32').apply)
    return lambda images: np.asarray(apply(found.variables, images))


def _jax(path, about):
    from jax import export

    with open(path, 'rb') as file:
        program = export.deserialize(bytearray(file.read()))
    return lambda images: np.asarray(program.call(images))


def _torch(path, about):
    import torch

    from flax_densenet.export import torch_network

    if not path.endswith(('.pth', '.pt')):
        from safetensors.torch import load_file

        folder = os.path.isdir(path)
        state = load_file(os.path.join(path, 'model.safetensors') if folder else path)
    else:
        state = torch.load(path, weights_only=True)
    network = torch_network.make(state, about)
    return lambda images: network(torch.from_numpy(images.transpose(0, 3, 1, 2)))


def _keras(path, about):
    os.environ['KERAS_BACKEND'] = 'jax'
    import keras
    from keras.src.applications.densenet import DenseNet

    if path.endswith('.keras'):
        network = keras.models.load_model(path, compile=False)
        network.layers[-1].activation = keras.activations.linear  # else probabilities
    else:
        channels = about['channels']
        network = DenseNet(
            list(about['block_sizes']),
            weights=None,
            classes=about['num_classes'],
            classifier_activation=None,
            input_tensor=keras.Input((None, None, channels)),
        )
        network.load_weights(path)
    return lambda images: network.predict(images, verbose=0)


# name: (what runs a file, the packages that it needs).
RUNTIMES = {
    'onnxruntime': (_onnxruntime, ('onnxruntime',)),
    'openvino': (_openvino, ('openvino',)),
    'flax_densenet': (_ours, ()),
    'jax': (_jax, ('flatbuffers',)),
    'torch': (_torch, ('torch',)),
    'keras': (_keras, ('keras', 'h5py')),
}


def is_installed(name: str) -> bool:
    """Whether a runtime's packages are there; imports none of them."""
    return all(importlib.util.find_spec(package) for package in RUNTIMES[name][1])


def run(
    name: str, path: str, images: np.ndarray, about: dict[str, Any]
) -> tuple[np.ndarray | None, str]:
    """What a file says of images, in a fresh process.

    Args:
      images: what the model takes, along axis 0: the first by itself, so that there are
        at least two batch sizes.
      about: the network's fields, its `family`, and the images' `channels`.

    Returns:
      The outputs along axis 0 and an empty text; or None and what went wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = [os.path.join(folder, f'{what}.npy') for what in ('images', 'outputs')]
        np.save(places[0], images)
        # As a file, not a module: the package would be imported, JAX and all. -P keeps
        # its folder, whose modules have short names, from being searched.
        command = [sys.executable, '-P', os.path.abspath(__file__), name, path, *places]
        root = os.path.abspath(os.path.join(os.path.dirname(__file__), '../..'))
        before = os.environ.get('PYTHONPATH')
        search = os.pathsep.join(part for part in (root, before) if part)
        done = subprocess.run(
            [*command, json.dumps(about)],
            capture_output=True,
            text=True,
            errors='replace',
            env=os.environ | {'PYTHONPATH': search, 'JAX_PLATFORMS': 'cpu'},
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f'status {done.returncode}']
            return None, said[-1]
        return np.load(places[1]), ''


def main(name, path, images, outputs, about):
    images = np.load(images)
    compute = RUNTIMES[name][0](path, json.loads(about))
    batches = [images[:1]]
    batches += [images[n : n + _BATCH] for n in range(1, len(images), _BATCH)]
    found = [np.asarray(compute(batch), np.float32) for batch in batches]
    np.save(outputs, np.concatenate(found))


if __name__ == '__main__':
    main(*sys.argv[1:])
