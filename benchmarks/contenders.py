"""One contender of `benchmarks.run`, a process that takes turns (see `sidebyside`).

  python -m benchmarks.contenders NAME TASK

NAME: ours, linen (the plain layers), torch, torch_contiguous, keras; ours_bf16 and
torch_bf16 (autocast) compute in bfloat16, all others in float32. TASK: train, infer
(DenseNet-121, batch 16, 224x224), cifar or cifar_plain (training BC-L100k12, or
L40k12 with dropout, batch 64, 32x32), rdnet or rdnet_infer (RDNet-T, batch 8, 224x224,
compared with timm). The data are random and on the device; `decode` measures decoding.
"""

import functools
import resource
import sys
import time

import numpy as np

from benchmarks import sidebyside

SHAPES = {
    'train': (16, 224, 1000),
    'infer': (16, 224, 1000),
    'cifar': (64, 32, 10),
    'cifar_plain': (64, 32, 10),
    'rdnet': (8, 224, 1000),
    'rdnet_infer': (8, 224, 1000),
}
STEPS = {
    'train': 2,
    'infer': 4,
    'cifar': 4,
    'cifar_plain': 4,
    'rdnet': 2,
    'rdnet_infer': 4,
}
# task -> name and fields of its model
MODELS = {
    'cifar': ('BC-L100k12', {}),
    'cifar_plain': ('L40k12', {'dropout_rate': 0.2}),
    'rdnet': ('rdnet_tiny', {}),
    'rdnet_infer': ('rdnet_tiny', {}),
}


def _peak_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _serve(task, step):
    """Serves turns of `step()`, which returns when its work is done."""
    batch = SHAPES[task][0]
    step()  # compiles, and touches all memory

    def measure():
        start = time.perf_counter()
        for _ in range(STEPS[task]):
            step()
        seconds = time.perf_counter() - start
        return {
            'images_per_second': STEPS[task] * batch / seconds,
            'peak_gib': _peak_gib(),
        }

    sidebyside.serve(measure)


def make_ours(task, **fields):
    """(compiled training step, state, batch), as in `fit.fit`."""
    import jax

    from flax_densenet import create_model, init_variables
    from flax_densenet.distributed import mesh as mesh_lib
    from flax_densenet.train import optimizers
    from flax_densenet.train import step as step_lib

    batch, size, classes = SHAPES[task]
    variant, own = MODELS.get(task, ('densenet121', {}))
    module = create_model(variant, num_classes=classes, **own | fields)
    optimizer = optimizers.make_optimizer(
        1e-4, name='adam', momentum=0.0, weight_decay=0.0
    )
    mesh = mesh_lib.make_mesh()
    variables = init_variables(module, 0)
    state = mesh_lib.replicate(step_lib.new_state(variables, optimizer), mesh)
    rng = np.random.default_rng(0)
    rows = {
        'image': rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        'label': rng.integers(0, classes, batch).astype(np.int32),
        'epoch': np.zeros(batch, np.int32),
    }
    rows = mesh_lib.to_global(rows, mesh)
    train_step = step_lib.make_train_step(
        module, optimizer, step_lib.StepOptions(mean=(0.5,) * 3, std=(0.25,) * 3)
    )
    compiled = step_lib.compile_train_step(train_step, state, rows, mesh)
    jax.block_until_ready(state)
    return compiled, state, rows


def _ours(task, **fields):
    from flax_densenet import create_model, init_variables
    from flax_densenet.models import folded
    from flax_densenet.system import process

    process.keep_memory()  # as launch.py does
    import jax

    if task == 'infer' and not fields:
        from benchmarks import inference

        return _serve(task, inference.make_ours(SHAPES[task][0]))
    if task.endswith('infer'):
        batch, size, classes = SHAPES[task]
        variant, _ = MODELS.get(task, ('densenet121', {}))
        module = create_model(variant, num_classes=classes, **fields)
        variables = init_variables(module, 0)
        images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
        apply = module.apply
        if module.fast:  # as a Predictor does
            variables = folded.fold(module, variables)
            apply = functools.partial(folded.logits, module)
        variables, apply = jax.device_put(variables), jax.jit(apply)
        return _serve(task, lambda: jax.block_until_ready(apply(variables, images)))
    compiled, state, rows = make_ours(task, **fields)

    def step():
        nonlocal state
        state, _ = compiled(state, rows)
        jax.block_until_ready(state)

    step()
    process.release_memory()  # as `train.loop` does
    return _serve(task, step)


def _ours_bf16(task):
    if task != 'infer':
        return _ours(task, dtype='bfloat16')
    from flax_densenet.system import process

    process.keep_memory()  # as launch.py does
    from benchmarks import inference

    return _serve(task, inference.make_ours_bf16(SHAPES[task][0]))


def _torch(task, channels_last=True, bfloat16=False):
    import torch

    from benchmarks import torch_models

    torch.set_num_threads(2)
    batch, size, classes = SHAPES[task]
    if task == 'cifar':
        model = torch_models.make_cifar(100, 12)
    elif task == 'cifar_plain':
        model = torch_models.make_cifar_plain(40, 12, dropout=0.2)
    elif task.startswith('rdnet'):
        model = torch_models.make_rdnet(classes)
    else:
        model = torch_models.import_torchvision().models.densenet121(weights=None)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    images = torch.randn(batch, 3, size, size).to(memory_format=layout)
    labels = torch.randint(0, classes, (batch,))

    def autocast():
        return torch.autocast('cpu', torch.bfloat16, enabled=bfloat16)

    if task.endswith('infer'):
        model.eval()

        def step():
            with torch.inference_mode(), autocast():
                model(images)

        return _serve(task, step)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return _serve(task, step)


def _keras(task):
    import keras

    batch, size, classes = SHAPES[task]
    model = keras.applications.DenseNet121(weights=None, classes=classes)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, size, size, 3)).astype(np.float32)
    labels = rng.integers(0, classes, batch)
    if task == 'infer':
        return _serve(task, lambda: model.predict_on_batch(images))
    model.compile(
        keras.optimizers.Adam(1e-4), 'sparse_categorical_crossentropy', jit_compile=True
    )
    return _serve(task, lambda: float(model.train_on_batch(images, labels)))


CONTENDERS = {
    'ours': _ours,
    'linen': lambda task: _ours(task, fast=False),
    'torch': _torch,
    'ours_bf16': _ours_bf16,
    'torch_bf16': lambda task: _torch(task, bfloat16=True),
    'torch_contiguous': lambda task: _torch(task, channels_last=False),
    'keras': _keras,
}

if __name__ == '__main__':
    CONTENDERS[sys.argv[1]](sys.argv[2])
