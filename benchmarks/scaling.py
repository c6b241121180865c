"""Training steps on several devices and processes: measured here, and a model of more.

  python -m benchmarks.scaling                 # measures on this machine's cores
  python -m benchmarks.scaling --model         # prints the model's table

Measured are steps of one global batch on 1 to 8 fake CPU devices and in 1 to 4
processes (gloo on loopback), which take turns. All share the same cores, so that a step
takes as long at best; what is more is the price of the exchange and of smaller parts.
The model is of GPUs: what is exchanged (`benchmarks.exchange`), over links of published
speeds.
"""

import argparse
import dataclasses
import math
import os
import socket
import subprocess
import sys
import time

from benchmarks import sidebyside

STEPS = 4
SPLITS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4)]  # devices, processes


def _prepare(variant, size, batch, group):
    """A compiled step, a state and a batch, over all devices of all processes."""
    import jax
    import numpy as np

    from flax_densenet.distributed import mesh as mesh_lib
    from flax_densenet.kernels import cpu as cpu_kernels
    from flax_densenet.models import factory, ghost_batch_norm, initialization
    from flax_densenet.train import optimizers, step

    cpu_kernels.load()
    mesh = mesh_lib.make_mesh()
    rows = ghost_batch_norm.resolve(group, rows=batch, devices=mesh.size)
    module = factory.create_model(variant, num_classes=10, batch_norm_group=rows)
    optimizer = optimizers.make_optimizer(
        lambda count: 1e-3, name='adam', momentum=0.9, weight_decay=0.0
    )
    state = step.new_state(initialization.init_variables(module, seed=0), optimizer)
    state = mesh_lib.replicate(state, mesh)
    draw = np.random.default_rng(0)
    share = batch // jax.process_count()
    batch = {
        'image': draw.integers(0, 256, (share, size, size, 3), np.uint8),
        'label': draw.integers(0, 10, share, np.int32),
        'epoch': np.zeros(share, np.int32),
    }
    batch = mesh_lib.to_global(batch, mesh)
    train_step = step.make_train_step(
        module, optimizer, step.StepOptions(mean=(0.5,) * 3, std=(1,) * 3)
    )
    return step.compile_train_step(train_step, state, batch, mesh), state, batch


def _serve(options):
    """One process of a contender; the first one has the others take the same steps."""
    import jax

    # gloo greets on standard output, which is for figures.
    sys.stdout = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    others = []
    if options.processes > 1:
        if options.rank == 0:
            command = [sys.executable, '-m', 'benchmarks.scaling', *sys.argv[1:]]
            others = [
                subprocess.Popen(
                    [*command, f'--rank={rank}'], stdin=subprocess.PIPE, text=True
                )
                for rank in range(1, options.processes)
            ]
        jax.distributed.initialize(
            f'127.0.0.1:{options.port}', options.processes, options.rank
        )
    compiled, state, batch = _prepare(
        options.variant, options.size, options.batch, options.group
    )

    def measure():
        nonlocal state
        for other in others:
            other.stdin.write('go\n')
            other.stdin.flush()
        start = time.perf_counter()
        for _ in range(STEPS):
            state, loss = compiled(state, batch)
            jax.block_until_ready(loss)
        return {'seconds': (time.perf_counter() - start) / STEPS}

    if options.rank:
        for _ in sys.stdin:
            measure()
    else:
        sidebyside.serve(measure)
        for other in others:
            other.stdin.close()
    if options.processes > 1:
        jax.distributed.shutdown()


def _free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def _start(devices, processes, options):
    fields = ('variant', 'size', 'batch', 'group')
    command = [sys.executable, '-m', 'benchmarks.scaling', '--serve']
    command += [f'--{name}={getattr(options, name)}' for name in fields]
    command += [f'--processes={processes}', f'--port={_free_port()}']
    return sidebyside.Contender(
        command,
        stderr=subprocess.DEVNULL,
        JAX_PLATFORMS='cpu',
        XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}',
    )


def measure(options):
    """Prints the time of a step for each split, in times of one device's."""
    contenders = {split: _start(*split, options) for split in SPLITS}
    for contender in contenders.values():
        contender.measure()  # the first steps are slower
    found = sidebyside.alternate(contenders, options.rounds)
    for contender in contenders.values():
        contender.close()
    print(
        f'{options.variant}, {options.size} px, batch {options.batch}, group', end=' '
    )
    print(
        f'{options.group}, {os.cpu_count()} cores, {options.rounds} rounds of {STEPS}'
    )
    print('| devices | processes | ms a step | times one device (lowest to highest) |')
    print('| --- | --- | --- | --- |')
    one = found[1, 1]['seconds']
    for (devices, processes), figures in found.items():
        times = sidebyside.ratio(figures['seconds'], one)
        middle = sidebyside.summarize(figures['seconds'])['median']
        print(
            f'| {devices * processes} | {processes} | {middle * 1e3:.0f} | '
            f'{times["median"]:.2f} ({times["lowest"]:.2f} to {times["highest"]:.2f}) |'
        )


@dataclasses.dataclass(frozen=True)
class Links:
    """GPUs and how they are connected.

    Attributes:
      rate: images/s of DenseNet-121 that a GPU trains alone.
      inside, between: GB/s that a GPU can send, to one of its machine and of another.
      latency: seconds of a small exchange within a machine; between machines
        `hop` comes on top for each doubling of their number.
    """

    name: str
    rate: float
    inside: float
    between: float
    latency: float = 15e-6
    hop: float = 8e-6


# Published: NVLink 4 900 GB/s both ways; PCIe 4.0 x16 32 GB/s; InfiniBand NDR 400
# Gbit/s for each GPU; Ethernet 100 Gbit/s for the machine's eight; timm's 914 images/s
# on an RTX 3090 (mixed precision, NHWC). Assumed: the latencies, and for an H100 that
# the rate goes with the memory's speed (3,350 against 936 GB/s).
LINKS = (
    Links('H100, NVLink 4, InfiniBand 400 Gbit/s a GPU', 3270, 450, 50),
    Links('RTX 3090, PCIe 4, Ethernet 100 Gbit/s a machine', 914, 32, 100 / 8 / 8),
)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Of a step (`benchmarks.exchange`): bytes, and exchanges one after another."""

    gradients: float
    statistics: float
    operations: int


def ring_seconds(size, count, gpus, links, per_machine=8):
    """Of `count` all-reduces of `size` bytes in all, each device's part in a ring."""
    if gpus == 1:
        return 0.0
    machines = math.ceil(gpus / per_machine)
    speed = links.inside if machines == 1 else min(links.inside, links.between)
    latency = links.latency + links.hop * math.log2(machines)
    return 2 * (gpus - 1) / gpus * size / (speed * 1e9) + count * latency


def step_seconds(gpus, batch, rate, exchange, links, *, own_statistics):
    """Of a step of `batch` images a GPU, nothing exchanged while it computes."""
    seconds = batch / rate + ring_seconds(exchange.gradients, 1, gpus, links)
    if not own_statistics:
        seconds += ring_seconds(exchange.statistics, exchange.operations, gpus, links)
    return seconds


def show_model(exchange: Exchange):
    """Prints efficiency, and the images that each machine of eight must be given."""
    for links in LINKS:
        rate = links.rate
        print(f'\n{links.name}; a GPU alone {rate:,} images/s\n')
        print(
            '| batch a GPU | 8 GPUs: global / own statistics | 64 | 1,024 | '
            'images/s a machine |'
        )
        print('| --- | --- | --- | --- | --- |')
        for batch in (32, 64, 128, 256):
            cells, fed = [], []
            for gpus in (8, 64, 1024):
                times = [
                    step_seconds(gpus, batch, rate, exchange, links, own_statistics=own)
                    for own in (False, True)
                ]
                cells.append(
                    ' / '.join(f'{batch / rate / t * 100:.0f} %' for t in times)
                )
                fed += [8 * batch / t for t in times]
            fed = f'{min(fed):,.0f} to {max(fed):,.0f}'
            print(f'| {batch} | {" | ".join(cells)} | {fed} |')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--variant', default='BC-L40k12')
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--group', type=int, default=0, help='model.batch_norm_group')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--model', action='store_true')
    for name, default in (('gradients', 31.9), ('statistics', 0.291)):
        parser.add_argument(f'--{name}', type=float, default=default, help='MB')
    parser.add_argument('--operations', type=int, default=362)
    parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    for name, default in (('processes', 1), ('rank', 0), ('port', 0)):
        parser.add_argument(
            f'--{name}', type=int, default=default, help=argparse.SUPPRESS
        )
    options = parser.parse_args()
    if options.serve:
        _serve(options)
    elif options.model:
        exchange = Exchange(
            options.gradients * 1e6, options.statistics * 1e6, options.operations
        )
        show_model(exchange)
    else:
        measure(options)


if __name__ == '__main__':
    main()
