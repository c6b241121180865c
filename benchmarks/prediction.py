"""Prediction on photographs: decoding alone, the model alone, both together.

  python -m benchmarks.prediction photos --rounds=6

What keeps up reads ahead while the device computes: both together should take as long
as the slower of the two, on one machine not more than both one after the other.
"""

import argparse
import concurrent.futures
import os
import pathlib
import time

import numpy as np

from flax_densenet import create_model, init_variables
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.inference import input_files
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.system import process
from flax_densenet.weights import trained as trained_lib

BATCH, THREADS = 16, 4


def make_predictor(batch_size=BATCH, precision='float32'):
    """DenseNet-121 at 224x224; its first parameters compute as fast as others."""
    module = create_model('densenet121', num_classes=1000)
    mesh = mesh_lib.make_mesh()
    metadata = {
        'model': {'variant': 'densenet121'},
        'class_names': None,
        'image_size': 224,
        'mean': [0.485, 0.456, 0.406],
        'std': [0.229, 0.224, 0.225],
        'data': {},
    }
    variables = mesh_lib.replicate(init_variables(module, 0), mesh)
    trained = trained_lib.Trained(module, variables, metadata, {}, None, mesh)
    return predictor_lib.Predictor(trained, batch_size, precision=precision)


def rates(predictor, paths):
    """Images/s of decoding, of the model and of both."""
    count = len(paths) // BATCH * BATCH
    paths = paths[:count]
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        images = list(pool.map(predictor.load, paths))
    decoded = time.perf_counter()
    for start in range(0, count, BATCH):
        predictor.compute(np.stack(images[start : start + BATCH]))
    computed = time.perf_counter()
    assert sum(1 for _ in predictor.stream(paths, threads=THREADS)) == count
    ended = time.perf_counter()
    return [
        count / seconds
        for seconds in (decoded - started, computed - decoded, ended - computed)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=pathlib.Path)
    parser.add_argument('--rounds', type=int, default=6)
    parser.add_argument('--images', type=int, default=96)
    options = parser.parse_args()
    process.keep_memory()
    predictor = make_predictor()
    paths = list(input_files.find([str(options.folder)]))[: options.images]
    rates(predictor, paths[:BATCH])  # compiles
    found = np.array([rates(predictor, paths) for _ in range(options.rounds)])
    decode, model, both = found.T
    print(f'{len(paths)} images, batches of {BATCH}, load {os.getloadavg()[0]:.1f}')
    for name, values, digits in (
        ('decode, images/s', decode, 1),
        ('model, images/s', model, 1),
        ('both, images/s', both, 1),
        ('both / slower of the two', both / np.minimum(decode, model), 2),
        ('both / one after the other', both * (1 / decode + 1 / model), 2),
    ):
        low, middle, high = np.percentile(values, [0, 50, 100]).round(digits)
        print(f'{name:<28}{middle:>8} ({low} to {high})')


if __name__ == '__main__':
    main()
