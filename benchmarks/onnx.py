"""DenseNet-121 as ONNX files in ONNX Runtime: ours, ours in int8, torchvision's.

  python -m benchmarks.onnx --folder=DIR --rounds=12

Needs `.venv-peers` (make .venv-peers/installed) for torchvision's own export. All take
normalized float32 images of 224x224; weights are first ones, which compute as fast as
others. Contenders take turns, see `sidebyside`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from benchmarks import sidebyside

ROOT = pathlib.Path(__file__).resolve().parents[1]
PEERS = os.environ.get('PEERS', str(ROOT / '.venv-peers/bin/python'))
THREADS = 2


def make_float32(path):
    """Our float32 file of normalized images."""
    import onnx

    from benchmarks import prediction
    from flax_densenet.export import onnx_network

    trained = prediction.make_predictor().trained
    arguments = trained.module, trained.variables, trained.metadata
    onnx.save(onnx_network.make(*arguments, inputs='normalized'), path)


def make_ours(folder):
    """`ours.onnx` and `int8.onnx`, calibrated on photographs of scikit-learn."""
    import onnx

    from benchmarks import prediction
    from flax_densenet.export import onnx_int8, onnx_network, sample_images
    from flax_densenet.weights import trained as trained_lib

    trained = prediction.make_predictor().trained
    metadata = trained.metadata
    arguments = trained.module, trained.variables, metadata
    onnx.save(onnx_network.make(*arguments, inputs='normalized'), folder / 'ours.onnx')
    samples = sample_images.from_library(trained_lib.preparation_of(metadata))
    made = onnx_int8.make(*arguments, [samples.images], inputs='normalized')
    onnx.save(made, folder / 'int8.onnx')


_TORCHVISION = """
import sys, torch
from benchmarks import torch_models
model = torch_models.import_torchvision().models.densenet121(weights=None).eval()
images = torch.randn(2, 3, 224, 224)
batch = torch.export.Dim('batch')
torch.onnx.export(model, (images,), sys.argv[1], dynamo=True, external_data=False,
                  dynamic_shapes=({0: batch},), verbose=False)
"""


def make_torchvisions(folder):
    """`torchvision.onnx` by `torch.onnx.export`, as its documentation has it."""
    path = folder / 'torchvision.onnx'
    subprocess.run([PEERS, '-c', _TORCHVISION, str(path)], check=True, cwd=ROOT)


def contend(path, batch, threads):
    """Serves images/s of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        path, options, providers=['CPUExecutionProvider']
    )
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, 3, 224, 224)).astype(np.float32)
    name = session.get_inputs()[0].name
    session.run(None, {name: images})
    turns = max(2, 48 // batch)

    def measure():
        started = time.perf_counter()
        for _ in range(turns):
            session.run(None, {name: images})
        return {'images/s': turns * batch / (time.perf_counter() - started)}

    sidebyside.serve(measure)


def compare(folder, batch, rounds):
    """Images/s of each file, and ratios, taken round by round."""
    names = ('ours', 'torchvision', 'int8')
    command = [sys.executable, '-m', 'benchmarks.onnx', '--contend']
    contenders = {
        name: sidebyside.Contender([*command, f'{folder}/{name}.onnx', str(batch)])
        for name in names
    }
    found = sidebyside.alternate(contenders, rounds)
    for contender in contenders.values():
        contender.close()
    rates = {name: found[name]['images/s'] for name in names}
    return {
        'batch': batch,
        **{name: sidebyside.summarize(rates[name]) for name in names},
        'ours/torchvision': sidebyside.ratio(rates['ours'], rates['torchvision']),
        'int8/ours': sidebyside.ratio(rates['int8'], rates['ours']),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--contend', nargs=2, metavar=('FILE', 'BATCH'))
    parser.add_argument('--folder', type=pathlib.Path, default=pathlib.Path('build'))
    parser.add_argument('--rounds', type=int, default=12)
    options = parser.parse_args()
    if options.contend:
        path, batch = options.contend
        contend(path, int(batch), THREADS)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    make_ours(options.folder)
    make_torchvisions(options.folder)
    for batch in (16, 1):
        print(json.dumps(compare(options.folder, batch, options.rounds), indent=1))


if __name__ == '__main__':
    main()
