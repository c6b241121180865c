"""Augmented photographs per second and core, compared with torchvision's transforms.

  .venv/bin/python -m benchmarks.augmented FOLDER [RECIPE ...]

Photographs become batches of 16 uint8 images of 224x224: decoded, cropped at random,
mirrored, and changed as the recipe says. Ours is `pipeline.train_batches` with one
thread. The others are torch's DataLoader with torchvision's transforms: v2 on Pillow
images (also in a worker process), v2 on tensors, and v1 on Pillow images. All decode
with Pillow and are pinned to one core. Turns alternate, and ratios are relative to the
fastest of the others. Images per second of processor time are also measured, since they
depend less on what else the machine does.
"""

import json
import os
import pathlib
import resource
import sys
import time

from benchmarks import sidebyside

PEERS = '.venv-peers/bin/python'
BATCH, SIZE = 16, 224
RECIPES = ('randaugment', 'trivialaugment', 'color_jitter')
JITTER = (0.4, 0.4, 0.4, 0.1)
TORCH = {
    'torchvision v2, Pillow': ('v2', 'pillow', '0'),
    'torchvision v2, Pillow, one worker': ('v2', 'pillow', '1'),
    'torchvision v2, tensors': ('v2', 'tensor', '0'),
    'torchvision v1, Pillow': ('v1', 'pillow', '0'),
}


def _paths(folder):
    return sorted(str(path) for path in pathlib.Path(folder).rglob('*.jpg'))


def _cpu_seconds():
    """Processor time of this process and of its ended children."""
    used = [
        resource.getrusage(who)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _serve_ours(folder, recipe):
    import numpy as np

    from flax_densenet.data import images as images_lib
    from flax_densenet.data import labeled_images, pipeline, readers

    paths = _paths(folder)

    class Counting(readers.FileReader):
        count = 0

        def __getitem__(self, index):
            self.count += 1  # includes batches made in advance
            return super().__getitem__(index)

    reader = Counting(paths, np.zeros(len(paths), np.int32))
    examples = labeled_images.Examples(
        reader, np.arange(len(paths)), images_lib.Preparation(SIZE)
    )
    jitter = recipe == 'color_jitter'
    changes = {'color_jitter': JITTER} if jitter else {'policy': recipe}
    steps = len(paths) // BATCH

    def measure():
        start, cpu, before = time.perf_counter(), _cpu_seconds(), reader.count
        batches = pipeline.train_batches(
            examples,
            batch_size=BATCH,
            seed=0,
            augment='crop_flip',
            threads=1,
            **changes,
        )
        for _ in range(steps):
            next(batches)
        seconds = time.perf_counter() - start
        batches.close()
        time.sleep(1)  # finishes batches in progress
        return {
            'images_per_second': steps * BATCH / seconds,
            'images_per_cpu_second': (reader.count - before) / (_cpu_seconds() - cpu),
        }

    sidebyside.serve(measure)


def _make_transform(recipe, version, kind):
    from benchmarks import torch_models

    torch_models.import_torchvision()
    from torchvision import transforms as v1
    from torchvision.transforms import v2

    module = v2 if version == 'v2' else v1
    change = {
        'randaugment': module.RandAugment,
        'trivialaugment': module.TrivialAugmentWide,
        'color_jitter': lambda: module.ColorJitter(*JITTER),
    }[recipe]()
    to_tensor = module.PILToTensor()
    steps = [module.RandomResizedCrop(SIZE), module.RandomHorizontalFlip(), change]
    steps = [to_tensor, *steps] if kind == 'tensor' else [*steps, to_tensor]
    return module.Compose(steps)


def _serve_torch(folder, recipe, version, kind, workers):
    import torch
    from PIL import Image

    torch.set_num_threads(1)

    class Photographs(torch.utils.data.Dataset):
        paths = _paths(folder)
        transform = staticmethod(_make_transform(recipe, version, kind))

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            with Image.open(self.paths[index]) as image:
                return self.transform(image.convert('RGB')), 0

    loader = torch.utils.data.DataLoader(
        Photographs(), BATCH, shuffle=True, drop_last=True, num_workers=int(workers)
    )

    def measure():
        start, cpu = time.perf_counter(), _cpu_seconds()
        count = sum(len(images) for images, _ in loader)
        seconds = time.perf_counter() - start
        return {
            'images_per_second': count / seconds,
            'images_per_cpu_second': count / (_cpu_seconds() - cpu),
        }

    sidebyside.serve(measure)


def compare(folder, recipe, rounds):
    """`{metric: {name: images/s, 'ours / fastest other': ratio}}` of a recipe."""
    me = ['-m', 'benchmarks.augmented', folder, '--serve', recipe]
    contenders = {'ours': sidebyside.Contender([sys.executable, *me])}
    for name, options in TORCH.items():
        contenders[name] = sidebyside.Contender([PEERS, *me, *options])
    found = sidebyside.alternate(contenders, rounds)
    for contender in contenders.values():
        contender.close()
    return {figure: _summarize(found, figure) for figure in found['ours']}


def _summarize(found, figure):
    values = {name: figures[figure] for name, figures in found.items()}
    result = {name: sidebyside.summarize(each) for name, each in values.items()}
    best = max(TORCH, key=lambda name: result[name]['median'])
    result['ours / fastest other'] = sidebyside.ratio(values['ours'], values[best])
    return result


def main(folder, *recipes, rounds=9):
    found = {recipe: compare(folder, recipe, rounds) for recipe in recipes or RECIPES}
    print(json.dumps(found, indent=2))


if __name__ == '__main__':
    if '--serve' in sys.argv:
        os.sched_setaffinity(0, {0})
        folder, _, recipe, *options = sys.argv[1:]
        if options:
            _serve_torch(folder, recipe, *options)
        else:
            _serve_ours(folder, recipe)
    else:
        main(*sys.argv[1:])
