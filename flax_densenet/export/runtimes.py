"""Runs exported files in the programs that they are meant for, in separate processes.

The process that wrote a file might succeed because of state that it still has. A new
process has only the file.
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
    return lambda images: _joined(session.run(None, {name: images}))


def _joined(outputs):
    """The outputs `[N, C]`, with the score `[N]` as a last column if there is one."""
    outputs = [np.asarray(one, np.float32) for one in outputs]
    return np.concatenate([one.reshape(len(one), -1) for one in outputs], -1)


def _openvino(path, about):
    import openvino

    # Use float32 even on processors with lower-precision arithmetic.
    options = {'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.Core().compile_model(path, 'CPU', options)
    return lambda images: _joined(compiled(images).values())


def _ours(path, about):
    import jax

    from flax_densenet.weights import trained

    model = trained.load_trained(path)
    # Float32 like the other runtimes, whatever dtype the run was trained in.
    apply = jax.jit(model.module.clone(dtype='float32').apply)

    def compute(images):
        logits = np.asarray(apply(model.variables, images))
        return model.calibration.apply(logits) if model.calibration else logits

    return compute


def _jax(path, about):
    from jax import export

    with open(path, 'rb') as file:
        program = export.deserialize(bytearray(file.read()))

    def compute(images):
        found = program.call(images)
        return _joined(found if isinstance(found, list | tuple) else [found])

    return compute


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
        network.layers[
            -1
        ].activation = keras.activations.linear  # logits instead of probabilities
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


# `{name: (function that loads a file, packages that it needs)}`.
RUNTIMES = {
    'onnxruntime': (_onnxruntime, ('onnxruntime',)),
    'openvino': (_openvino, ('openvino',)),
    'flax_densenet': (_ours, ()),
    'jax': (_jax, ('flatbuffers',)),
    'torch': (_torch, ('torch',)),
    'keras': (_keras, ('keras', 'h5py')),
}


def is_installed(name: str) -> bool:
    """Whether the packages of a runtime are installed; does not import them."""
    return all(importlib.util.find_spec(package) for package in RUNTIMES[name][1])


def run(
    name: str, path: str, images: np.ndarray, about: dict[str, Any]
) -> tuple[np.ndarray | None, str]:
    """Runs a file on images, in a new process.

    Args:
      name: a key of `RUNTIMES`.
      path: the file.
      images: inputs along axis 0. The first one is run separately, so that at least two
        batch sizes are tested.
      about: the fields of the network, its `family`, and the number of `channels`.

    Returns:
      The outputs along axis 0, with the score of unusual images as the last column if
      the file has it, and an empty string; or None and the error.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = [os.path.join(folder, f'{what}.npy') for what in ('images', 'outputs')]
        np.save(places[0], images)
        # Run as a file, because a module would import the package with JAX. -P keeps
        # its folder, where modules have short names, out of the search path.
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
            lines = done.stderr.strip().splitlines() or [f'status {done.returncode}']
            return None, lines[-1]
        return np.load(places[1]), ''


def main(name, path, images, outputs, about):
    images = np.load(images)
    compute = RUNTIMES[name][0](path, json.loads(about))
    batches = [images[:1]]
    batches += [images[n : n + _BATCH] for n in range(1, len(images), _BATCH)]
    outputs_by_batch = [np.asarray(compute(batch), np.float32) for batch in batches]
    np.save(outputs, np.concatenate(outputs_by_batch))


if __name__ == '__main__':
    main(*sys.argv[1:])
