"""Reading packed images beside opening small files, with a cold cache.

  .venv/bin/python -m benchmarks.packing PHOTOGRAPHS [FOLDER]

Writes crops of the photographs of a folder as 20,000 JPEGs of some 5 KB, in 100 class
folders, and the photographs themselves often enough for 1,000 files; packs both
(`--mode=pack`), and reads them in a shuffled order that is the same for both ways.
Before each turn the system's cache is emptied (`/proc/sys/vm/drop_caches`, as root) or,
where that is not allowed, the files are taken out of it (`posix_fadvise`), which leaves
their folders in; `cold` in the output says which. Turns alternate. FOLDER is where to
write, on the disk that is to be measured; by default a temporary one.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from benchmarks import sidebyside
from flax_densenet.data import images, labeled_images, pipeline, readers, sources
from flax_densenet.data.packed import plan as pack_plan
from flax_densenet.data.packed import reader as packed_reader
from flax_densenet.data.packed import writer as pack_writer

SMALL, CLASSES, SIDE, QUALITY = 20_000, 100, 112, 90
LARGE = 1_000
CACHES = '/proc/sys/vm/drop_caches'


def write_small(photographs, folder):
    """Crops of photographs: every class has the same number."""
    opened = [Image.open(path).convert('RGB') for path in photographs[:100]]
    rng = np.random.default_rng(0)
    for index in range(SMALL):
        image = opened[index % len(opened)]
        left, top = (int(rng.integers(0, max(1, n - SIDE))) for n in image.size)
        place = folder / f'{index % CLASSES:03}'
        place.mkdir(parents=True, exist_ok=True)
        crop = image.crop((left, top, left + SIDE, top + SIDE))
        crop.save(place / f'{index:06}.jpg', quality=QUALITY)


def write_large(photographs, folder):
    """The photographs as they are, each several times."""
    for index, path in zip(range(LARGE), itertools.cycle(photographs), strict=False):
        place = folder / f'{index % 10:03}'
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place / f'{index:06}.jpg')


def empty_cache(folders):
    """Takes files out of the system's cache; returns how."""
    os.sync()
    with contextlib.suppress(OSError):
        pathlib.Path(CACHES).write_text('3')
        return CACHES
    for path in itertools.chain.from_iterable(f.rglob('*') for f in folders):
        if path.is_file():
            with open(path, 'rb') as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return 'posix_fadvise'


def read_raw(make_reader, order, threads):
    """Seconds to read encoded images, the opening of the pack included."""

    def read(indices):
        for index in indices:
            file = reader[index]
            if isinstance(file, str):
                with open(file, 'rb') as opened:
                    opened.read()

    start = time.perf_counter()
    reader = make_reader()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [order[n::threads] for n in range(threads)]))
    return time.perf_counter() - start


def read_decoded(make_reader, order, size):
    """Seconds to read, decode and batch images as training does, in four threads."""
    start = time.perf_counter()
    examples = labeled_images.Examples(make_reader(), order, images.Preparation(size))
    batches = pipeline.eval_batches(examples, batch_size=50)
    count = sum(int(batch['mask'].sum()) for batch in batches)
    batches.close()
    assert count == len(order)
    return time.perf_counter() - start


def compare(folder, packed_folder, size, rounds):
    """`{what: {files, packed: images/s, ratio}}` over alternating rounds."""
    found = sources.SOURCES['folder'](str(folder), bad_images='error', labels='')
    paths, labels = found.reader.paths, found.reader.labels
    order = np.random.default_rng(1).permutation(len(paths))
    ways = {
        'files': lambda: readers.FileReader(paths, labels),
        'packed': lambda: packed_reader.load(str(packed_folder)),
    }
    tasks = {
        'raw, 1 thread': lambda way: read_raw(way, order, 1),
        'raw, 4 threads': lambda way: read_raw(way, order, 4),
        f'decoded to {size}x{size}': lambda way: read_decoded(way, order, size),
    }
    rates = {task: {way: [] for way in ways} for task in tasks}
    for number in range(rounds):
        for task, measure in tasks.items():
            for way in list(ways)[:: 1 if number % 2 == 0 else -1]:
                cold = empty_cache([folder, packed_folder])
                rates[task][way].append(len(order) / measure(ways[way]))
    result = {'images': len(paths), 'bytes': sum(map(os.path.getsize, paths))}
    result['cold'] = cold
    for task, rate in rates.items():
        result[task] = {way: sidebyside.summarize(rate[way]) for way in ways}
        result[task]['ratio'] = sidebyside.ratio(rate['packed'], rate['files'])
    return result


def main(photographs, folder=None, rounds=7):
    photographs = sorted(pathlib.Path(photographs).rglob('*.jpg'))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        place, result = pathlib.Path(place), {}
        for name, write, size, mib in (
            ('small', write_small, 64, 16),
            ('photographs', write_large, 224, 32),
        ):
            write(photographs, place / name)
            out = place / f'{name}-packed'
            options = pack_plan.Options(shard_mib=mib)
            start = time.perf_counter()
            pack_writer.pack(f'folder:{place / name}', str(out), options=options)
            seconds = time.perf_counter() - start
            result[name] = {'seconds to pack': seconds} | compare(
                place / name, out, size, int(rounds)
            )
    print(json.dumps(result, indent=2))


if __name__ == '__main__':
    main(*sys.argv[1:])
