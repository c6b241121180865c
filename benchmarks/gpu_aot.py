"""Compiles training steps for an H100 without having one.

  PYTHON -m benchmarks.gpu_aot [WAY ...]

PYTHON needs `jax[cuda13]` (but no driver or GPU). Each of `gpu.WAYS` is compiled in
full, including Pallas kernels: a kernel that needs too much shared memory fails here.
It prints the memory of the step and the bytes that it moves, counted from the program
(`hlo_bytes`). There is no autotuning and no timing, and choices that XLA makes by
measuring may differ on a real GPU.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time

from benchmarks import gpu, hlo_bytes
from benchmarks.gpu_contender import Spec

# As XLA writes it with --xla_dump_to on such a machine; the numbers are the vendor's.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
runtime_version { major: 13 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def make_device():
    """A device to compile for; makes Pallas use it as the current device."""
    from jax._src.pallas.triton import gpu_info
    from jax.experimental import topologies

    from benchmarks import gpu_kernels

    topology = topologies.get_topology_desc(
        platform='cuda', target_config=TARGET, topology='1x1x1'
    )
    (device,) = topology.devices
    gpu_info.get_device_kind = lambda: device.device_kind
    gpu_info.get_device_platform = lambda: 'gpu'
    gpu_kernels.interpret = lambda: False
    return device


def compile_step(spec, device):
    """The compiled training step of a `gpu_contender.Spec`."""
    from benchmarks import gpu_contender

    gpu_contender.prepare_jax(spec)
    import jax
    import numpy as np
    import optax

    from flax_densenet import create_model
    from flax_densenet.models import initialization
    from flax_densenet.train import step

    fields = dict(dtype='bfloat16', **spec.fields, **spec.small)
    module = create_model('densenet121', num_classes=spec.classes, **fields)
    shapes = initialization.variable_shapes(module)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    optimizer = optax.adam(1e-4)
    rows = {
        'image': np.zeros((spec.batch, spec.size, spec.size, 3), np.uint8),
        'label': np.zeros(spec.batch, np.int32),
        'epoch': np.zeros(spec.batch, np.int32),
    }
    train = step.make_train_step(
        module, optimizer, step.StepOptions(mean=(0.5,) * 3, std=(0.25,) * 3)
    )
    where = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        (step.new_state(variables, optimizer), rows),
    )
    return jax.jit(train, donate_argnums=0).lower(*arguments).compile()


def main(names):
    if len(names) > 1:  # in separate processes, since `install` cannot be undone
        for name in names:
            subprocess.run([sys.executable, '-m', 'benchmarks.gpu_aot', name])
        return
    os.environ['JAX_PLATFORMS'] = 'cpu'
    spec = dataclasses.replace(Spec('ours'), **gpu.WAYS[names[0]])
    if os.environ.get('SMALL'):
        spec = dataclasses.replace(spec, **gpu.SMALL)
    start = time.perf_counter()
    compiled = compile_step(spec, make_device())
    counted = hlo_bytes.count(compiled.as_text())
    most = list(counted.items())[:5]
    print(
        json.dumps(
            {
                'way': names[0],
                'temporary_gib': round(
                    compiled.memory_analysis().temp_size_in_bytes / 2**30, 2
                ),
                'mb_per_image': round(sum(counted.values()) / spec.batch / 1e6, 1),
                'most': {k: round(v / spec.batch / 1e6, 1) for k, v in most},
                'seconds': round(time.perf_counter() - start),
            }
        ),
        flush=True,
    )


if __name__ == '__main__':
    main(sys.argv[1:] or list(gpu.WAYS))
