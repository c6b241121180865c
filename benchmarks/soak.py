"""Checks whether memory grows: plots it during minutes of short epochs.

  python -m benchmarks.soak --minutes=60 --out=soak.png

Each epoch trains, evaluates, saves and writes its record, as any run does; handles and
threads are counted too.
"""

import argparse
import json
import os
import tempfile
import threading
import time

from configs import base
from flax_densenet.system import signals
from flax_densenet.train import fit, loop


def _fields():
    config = base.get_config()
    config.model.variant = 'BC-L10k4'
    config.data.image_size = 8
    config.data.augment = 'shift_flip'
    config.train.epochs = 10**6
    config.train.checkpoint_every = '20 steps'
    config.train.report = False
    return {n: v.to_dict() if hasattr(v, 'to_dict') else v for n, v in config.items()}


def _measure():
    return {
        'minutes': time.monotonic() / 60,
        'memory_gib': loop.memory_gib(),
        'handles': len(os.listdir('/proc/self/fd')),
        'threads': threading.active_count(),
    }


def _watch(stop, minutes, seen):
    """Asks training to stop, like a signal, when the time is over."""
    while not seen or seen[-1]['minutes'] - seen[0]['minutes'] < minutes:
        seen.append(_measure())
        time.sleep(1)
    stop.signum = 15


def plot_soak(seen):
    """Plots memory, file handles and threads over minutes."""
    from matplotlib.figure import Figure

    minutes = [one['minutes'] - seen[0]['minutes'] for one in seen]
    figure = Figure(figsize=(8, 5), layout='constrained')
    above, below = figure.subplots(2, sharex=True)
    above.plot(minutes, [one['memory_gib'] for one in seen])
    above.set(ylabel='resident memory in GiB', ylim=(0, None))
    for name in ('handles', 'threads'):
        below.plot(minutes, [one[name] for one in seen], label=name)
    below.set(xlabel='minutes', ylim=(0, None))
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=60)
    parser.add_argument('--out', default='soak.png')
    options = parser.parse_args()
    stop, seen = signals.Stop(), []
    threading.Thread(
        target=_watch, args=(stop, options.minutes, seen), daemon=True
    ).start()
    with tempfile.TemporaryDirectory() as folder:
        try:
            fit.fit(_fields(), folder, stop=stop)
        except signals.Stopped as stopped:
            print(stopped)
        with open(os.path.join(folder, 'metrics.jsonl')) as file:
            records = [json.loads(line) for line in file]
    plot_soak(seen).savefig(options.out, dpi=110)
    half = records[len(records) // 2 :]
    growth = half[-1]['memory_gib'] - half[0]['memory_gib']
    print(
        f'{len(records)} epochs; memory after the first '
        f'{records[0]["memory_gib"]:.3f}, '
        f'in the middle {half[0]["memory_gib"]:.3f}, at the end '
        f'{half[-1]["memory_gib"]:.3f} GiB: {growth * 1024:+.1f} MiB in the second '
        f'half; handles {seen[len(seen) // 2]["handles"]} and {seen[-1]["handles"]}; '
        f'{options.out}'
    )


if __name__ == '__main__':
    main()
