"""Photographs per second and core: `flax_densenet.data` and torch's DataLoader.

  .venv/bin/python -m benchmarks.decode FOLDER

Both decode with Pillow and resize to 224x224 (bilinear, antialiased) into batches of 16
uint8 images, and both are pinned to one core. torch runs without a worker process,
which is faster there; another contender has one worker.
"""

import json
import os
import pathlib
import sys
import time

from benchmarks import sidebyside

PEERS = '.venv-peers/bin/python'
BATCH, SIZE = 16, 224


def _paths(folder):
    return sorted(str(path) for path in pathlib.Path(folder).rglob('*.jpg'))


def _serve_ours(folder):
    import numpy as np

    from flax_densenet.data import images as images_lib
    from flax_densenet.data import labeled_images, pipeline, readers

    paths = _paths(folder)
    reader = readers.FileReader(paths, np.zeros(len(paths), np.int32))
    preparation = images_lib.Preparation(SIZE)
    examples = labeled_images.Examples(reader, np.arange(len(paths)), preparation)

    def measure():
        start = time.perf_counter()
        batches = pipeline.eval_batches(examples, batch_size=BATCH, threads=1)
        count = sum(int(batch['mask'].sum()) for batch in batches)
        seconds = time.perf_counter() - start
        batches.close()
        return {'images_per_second': count / seconds}

    sidebyside.serve(measure)


def _serve_torch(folder, workers):
    import numpy as np
    import torch
    from PIL import Image

    torch.set_num_threads(1)

    class Photographs(torch.utils.data.Dataset):
        paths = _paths(folder)

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            with Image.open(self.paths[index]) as image:
                image = image.convert('RGB')
                image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)), 0

    loader = torch.utils.data.DataLoader(Photographs(), BATCH, num_workers=workers)

    def measure():
        start = time.perf_counter()
        count = sum(len(images) for images, _ in loader)
        return {'images_per_second': count / (time.perf_counter() - start)}

    sidebyside.serve(measure)


def main(folder, rounds=9):
    me = ['-m', 'benchmarks.decode', folder]
    contenders = {
        'ours': sidebyside.Contender([sys.executable, *me, 'ours']),
        'torch': sidebyside.Contender([PEERS, *me, 'torch', '0']),
        'torch, one worker': sidebyside.Contender([PEERS, *me, 'torch', '1']),
    }
    found = {
        name: figures['images_per_second']
        for name, figures in sidebyside.alternate(contenders, rounds).items()
    }
    for contender in contenders.values():
        contender.close()
    result = {name: sidebyside.summarize(values) for name, values in found.items()}
    best = max(('torch', 'torch, one worker'), key=lambda n: result[n]['median'])
    result['ours / torch'] = sidebyside.ratio(found['ours'], found[best])
    print(json.dumps(result, indent=2))


if __name__ == '__main__':
    if len(sys.argv) > 2:
        os.sched_setaffinity(0, {0})
        if sys.argv[2] == 'ours':
            _serve_ours(sys.argv[1])
        else:
            _serve_torch(sys.argv[1], int(sys.argv[3]))
    else:
        main(*sys.argv[1:])
