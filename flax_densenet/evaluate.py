"""Trained models: rebuilt from a workdir, and measured on labelled images."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_densenet import checkpoint, data, model, sharding
from flax_densenet.errors import UserError


def normalise(images, *, mean, std):
    """uint8 `[N, H, W, 3]` to float32 `(images / 255 - mean) / std`, on the device."""
    # Double precision only in the division of constants, which numpy would do anyhow.
    mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, -1) for v in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def forward(module, variables, batch, *, mean, std, mutable=False, **options):
    """`module.apply`: logits of a batch of images, or of features cached of them.

    Args:
      batch: `image`, or `features` (`features.cache_features`), which go through the
        head alone.
      **options: of the other layers, as `train` and `frozen`.
    """
    if 'features' in batch:
        return module.apply(
            variables, batch['features'], method='head', mutable=mutable
        )
    images = normalise(batch['image'], mean=mean, std=std)
    return module.apply(variables, images, mutable=mutable, **options)


@functools.partial(jax.jit, static_argnames=('module', 'mean', 'std'))
def eval_step(variables, batch, *, module, mean, std):
    """Sums over the rows of a batch whose mask is 1: correct, loss, count."""
    logits = forward(module, variables, batch, mean=mean, std=std)
    label, mask = batch['label'], batch['mask']
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    correct = logits.argmax(-1) == label
    return {
        'correct': jnp.sum(correct * mask),
        'loss': jnp.sum(losses * mask),
        'count': jnp.sum(mask),
    }


def evaluate(
    module: model.DenseNet,
    variables,
    examples: data.Examples,
    *,
    batch_size: int,
    mesh,
    mean,
    std,
    threads: int = 4,
    workers: int = 0,
) -> dict[str, float]:
    """Accuracy and mean cross-entropy; every example counts exactly once.

    Args:
      variables: `{'params', 'batch_stats'}`, replicated over the mesh.
      batch_size: over all devices, which it must divide over.

    Returns:
      `{'accuracy': 0 to 1, 'loss', 'count'}`.
    """
    batches = data.eval_batches(
        examples, batch_size=batch_size, threads=threads, workers=workers
    )
    sums = []
    for batch in batches:
        batch = sharding.to_global(batch, mesh)
        step = eval_step(variables, batch, module=module, mean=mean, std=std)
        if len(sums) > 1:  # at most two batches on their way, so memory stays flat
            jax.block_until_ready(sums[-2])
        sums.append(step)
    batches.close()
    # Summed on the host in double precision: a million losses in float32 would not
    # add up to the printed digits.
    total = {name: 0.0 for name in sums[0]}
    for step in jax.device_get(sums):
        for name, value in step.items():
            total[name] += float(value)
    if total['count'] != len(examples):
        raise AssertionError(f'{total["count"]} of {len(examples)} examples counted')
    return {
        'accuracy': total['correct'] / total['count'],
        'loss': total['loss'] / total['count'],
        'count': len(examples),
    }


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model with what it needs to be used.

    Attributes:
      module: the DenseNet.
      variables: `{'params', 'batch_stats'}`, replicated over `mesh`.
      metadata: as `train.make_metadata` wrote it.
      metrics: test accuracy and loss when it was saved.
    """

    module: model.DenseNet
    variables: Any
    metadata: dict[str, Any]
    metrics: dict[str, float]
    step: int
    mesh: Any

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.metadata['class_names'])


def load_trained(workdir: str, which: str = 'best', *, mesh=None) -> Trained:
    """Rebuilds the `best` or the `latest` model of a run; needs no config file.

    Raises:
      UserError: the workdir holds no (whole) checkpoint.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    step = checkpoint.find_step(workdir, which)
    metadata = checkpoint.load_json(workdir, step, 'metadata')
    module = model.create_model(
        num_classes=len(metadata['class_names']), **_tuples(metadata['model'])
    )
    with checkpoint.open_checkpoints(workdir) as manager:
        restored = checkpoint.restore(
            manager,
            step,
            sharding=sharding.replicated(mesh),
            model=model.variable_shapes(module),
        )
    return Trained(
        module=module,
        variables=restored['model'],
        metadata=metadata,
        metrics=checkpoint.load_json(workdir, step, 'metrics'),
        step=step,
        mesh=mesh,
    )


def _tuples(fields):
    """JSON's lists back to the tuples that hashable modules need."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def match_classes(examples: data.Examples, names, trained_names) -> data.Examples:
    """Examples of a source whose classes are some of those a model was trained on.

    Labels are matched by class name, so a folder with fewer classes can be used.

    Raises:
      UserError: a class that the model does not know.
    """
    unknown = [name for name in names if name not in trained_names]
    if unknown:
        raise UserError(
            f'data.source: class {unknown[0]} is not one of those that the model was '
            f'trained on ({", ".join(trained_names)}); rename or remove it'
        )
    if tuple(names) == tuple(trained_names):
        return examples
    return data.Relabelled(examples, [trained_names.index(name) for name in names])


def format_metrics(name: str, metrics: dict[str, float]) -> str:
    """`Test_acc: 93.3%, Test_loss: 0.270`, as in the line of an epoch."""
    accuracy, loss = metrics['accuracy'] * 100, metrics['loss']
    return f'{name}_acc: {accuracy:.1f}%, {name}_loss: {loss:.3f}'
