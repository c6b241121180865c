"""One contender of `benchmarks.gpu`, a process that takes turns (see `sidebyside`).

  python -m benchmarks.gpu_contender '{"kind": "ours", "way": "pallas", ...}'

The fields are those of `Spec`. Ours also runs without grain, which reads images, since
all data are random and on the device.
"""

import dataclasses
import importlib.util
import json
import re
import sys
import time
import types
from typing import Any

from benchmarks import contenders, sidebyside


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a contender runs.

    Attributes:
      kind: ours, linen, torch, torch_compile, torch_max (torch.compile with its longest
        search), or copy (from device memory to device memory).
      task: train, infer, or profile (ours only, to standard error).
      way: a key of `gpu_ways.WAYS`, or '' for the package itself.
      pool: a key of `gpu_ways.POOLS`.
      batch, size, classes: batch size, image side in pixels, number of classes.
      steps: number of steps in a turn.
      fields: fields of the model besides dtype; for ours and linen only.
      small: block_sizes, growth_rate and stem_features of a small model for tests.
    """

    kind: str
    task: str = 'train'
    way: str = ''
    pool: str = 'scatter'
    batch: int = 256
    size: int = 224
    classes: int = 1000
    steps: int = 20
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    small: dict[str, Any] = dataclasses.field(default_factory=dict)


def _serve(spec, steps, facts, peak):
    """Serves turns of `steps(n)`, which returns when n steps are done."""
    steps(3)

    def measure():
        start = time.perf_counter()
        steps(spec.steps)
        seconds = time.perf_counter() - start
        return {
            'images_per_second': spec.steps * spec.batch / seconds,
            'peak_gib': peak() / 2**30,
            'facts': facts,
        }

    sidebyside.serve(measure)


def prepare_jax(spec):
    """Makes `step` importable without grain, which its import of `data` needs."""
    if importlib.util.find_spec('grain') is None:
        stub = types.ModuleType('grain')
        stub.transforms = types.SimpleNamespace(RandomMap=object, Map=object)
        sys.modules['grain'] = stub
    import jax

    from flax_densenet.kernels import dense_block

    # On a CPU, this tests the code that would run on a GPU.
    dense_block.use_native = lambda *args, **options: False
    if spec.way or spec.pool != 'scatter':
        from benchmarks import gpu_ways

        gpu_ways.install(spec.way or 'concat', spec.pool)
    return jax.devices()[0]


def _peak(device):
    return (device.memory_stats() or {}).get('peak_bytes_in_use', 0)


def _facts(spec, device, compiled, seconds):
    import jax

    from benchmarks import hlo_bytes
    from flax_densenet import create_model

    module = create_model('densenet121', num_classes=spec.classes, **spec.small)
    counted = hlo_bytes.count(compiled.as_text())
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        'device': device.device_kind,
        'version': f'JAX {jax.__version__}',
        'compile_s': round(seconds, 1),
        'temporary_gib': memory.temp_size_in_bytes / 2**30 if memory else None,
        'memory_gib': (device.memory_stats() or {}).get('bytes_limit', 0) / 2**30,
        'mb_per_image': sum(counted.values()) / spec.batch / 1e6,
        'least_mb': hlo_bytes.least(module, spec.size) / 1e6,
        'xla_mb_per_image': cost.get('bytes accessed', 0) / spec.batch / 1e6,
    }


def _ours(spec):
    device = prepare_jax(spec)
    import jax

    fields = dict(dtype='bfloat16', **spec.fields, **spec.small)
    start = time.perf_counter()
    if spec.task == 'infer':
        from flax_densenet import create_model, init_variables

        module = create_model('densenet121', num_classes=spec.classes, **fields)
        variables = jax.device_put(init_variables(module, 0))
        shape = (spec.batch, spec.size, spec.size, 3)
        images = jax.random.normal(jax.random.key(0), shape)
        compiled = jax.jit(module.apply).lower(variables, images).compile()

        def steps(count):
            for _ in range(count):
                logits = compiled(variables, images)
            jax.block_until_ready(logits)

    else:
        contenders.SHAPES['gpu'] = (spec.batch, spec.size, spec.classes)
        compiled, state, rows = contenders.make_ours('gpu', **fields)

        def steps(count):
            nonlocal state
            for _ in range(count):
                state, _ = compiled(state, rows)
            jax.block_until_ready(state)

    facts = _facts(spec, device, compiled, time.perf_counter() - start)
    if spec.task == 'profile':
        from benchmarks import profile_step

        steps(2)
        names = _names(compiled)
        return sidebyside.serve(
            lambda: {
                'found': profile_step.by_operation(lambda: steps(1), 4, names),
                'facts': facts,
            }
        )
    return _serve(spec, steps, facts, lambda: _peak(device))


def _names(compiled):
    """Names for operations: our kernels by name, library calls by target."""
    pattern = r'%?(\S+) = .*custom_call_target="([^"]+)"(?:.*op_name="([^"]*)")?'
    names = {}
    for operation, target, path in re.findall(pattern, compiled.as_text()):
        *_, kernel, last = ['', '', *path.split('/')]
        names[operation] = kernel if last == 'pallas_call' else target.split('$')[-1]
    return names


def _copy(spec):
    """Measures a copy: gigabytes per second, read and written, as 'images'."""
    device = prepare_jax(spec)
    import jax
    import jax.numpy as jnp

    values = spec.batch * 2**19  # 256: 0.25 GiB of bfloat16, five times an H100's L2
    add = jax.jit(lambda x: x + 1)
    x = jnp.arange(values, dtype=jnp.bfloat16)

    def steps(count):
        y = x
        for _ in range(count):
            y = add(y)
        jax.block_until_ready(y)

    steps(3)

    def measure():
        start = time.perf_counter()
        steps(10 * spec.steps)
        seconds = time.perf_counter() - start
        moved = 2 * x.nbytes * 10 * spec.steps
        return {
            'gb_per_second': moved / seconds / 1e9,
            'facts': {'device': device.device_kind},
        }

    sidebyside.serve(measure)


def _torchvision(cuda):
    from benchmarks import torch_models

    if not cuda:
        return torch_models.import_torchvision()
    import torchvision

    return torchvision


def _torch(spec):
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device('cuda' if cuda else 'cpu')
    torch.backends.cudnn.benchmark = True
    small = dict(spec.small)
    if small:
        small = {
            'block_config': tuple(small['block_sizes']),
            'growth_rate': small['growth_rate'],
            'num_init_features': small['stem_features'],
        }
    models = _torchvision(cuda).models
    model = models.DenseNet(num_classes=spec.classes, **small)
    if not small:
        model = models.densenet121(weights=None)
    layout = torch.channels_last
    model = model.to(device, memory_format=layout)
    images = torch.randn(spec.batch, 3, spec.size, spec.size, device=device)
    images = images.to(memory_format=layout)
    labels = torch.randint(0, spec.classes, (spec.batch,), device=device)
    run = model
    if spec.kind != 'torch':
        mode = 'max-autotune-no-cudagraphs' if spec.kind == 'torch_max' else 'default'
        run = torch.compile(model, mode=mode)
    step = _torch_step(spec, torch, model, run, images, labels)

    def steps(count):
        for _ in range(count):
            step()
        if cuda:
            torch.cuda.synchronize()

    start = time.perf_counter()
    steps(1)
    facts = {
        'device': torch.cuda.get_device_name() if cuda else 'cpu',
        'version': f'torch {torch.__version__}',
        'memory_gib': torch.cuda.mem_get_info()[1] / 2**30 if cuda else 0,
        'compile_s': round(time.perf_counter() - start, 1),
    }
    _serve_torch(spec, torch, steps, facts, cuda)


def _torch_step(spec, torch, model, run, images, labels):
    autocast = torch.autocast(images.device.type, torch.bfloat16)
    if spec.task == 'infer':
        model.eval()

        def step():
            with torch.inference_mode(), autocast:
                run(images)

        return step
    # One kernel for all parameters, the fastest option.
    optimizer = torch.optim.Adam(
        model.parameters(), lr=1e-4, fused=images.device.type == 'cuda'
    )

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = torch.nn.functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _serve_torch(spec, torch, steps, facts, cuda):
    """Serves turns and returns cached memory between them; see `benchmarks.gpu`."""

    def peak():
        if not cuda:
            return 0
        found = torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
        return found

    steps(3)
    peak()

    def measure():
        steps(1)  # allocates the memory again
        start = time.perf_counter()
        steps(spec.steps)
        seconds = time.perf_counter() - start
        return {
            'images_per_second': spec.steps * spec.batch / seconds,
            'peak_gib': peak() / 2**30,
            'facts': facts,
        }

    sidebyside.serve(measure)


KINDS = {
    'ours': _ours,
    'linen': lambda spec: _ours(
        dataclasses.replace(spec, fields=spec.fields | {'fast': False})
    ),
    'torch': _torch,
    'torch_compile': _torch,
    'torch_max': _torch,
    'copy': _copy,
}

if __name__ == '__main__':
    chosen = Spec(**json.loads(sys.argv[1]))
    KINDS[chosen.kind](chosen)
