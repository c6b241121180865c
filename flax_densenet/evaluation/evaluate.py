"""Trained models, measured on labeled images."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from flax_densenet import losses as losses_lib
from flax_densenet.data import labeled_images, notes, pipeline, soft_labels, unreadable
from flax_densenet.data import parts as parts_lib
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.errors import UserError, list_first
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.models import densenet, folded, network
from flax_densenet.models import tta as tta_lib
from flax_densenet.weights import operating_points
from flax_densenet.weights.trained import Trained, normalize


def forward(module, variables, batch, *, mean, std, mutable=False, **options):
    """`module.apply`: logits of a batch of images, or of their cached features.

    Args:
      batch: `image`, or `features` (`feature_cache.cache_features`), which pass only
      through the classifier.
      **options: options of the other layers, such as `train` and `frozen`.
    """
    if 'features' in batch:
        features = batch['features'][:, 0, 0]
        return module.apply(variables, features, method='classify', mutable=mutable)
    images = normalize(batch['image'], mean=mean, std=std)
    return module.apply(variables, images, mutable=mutable, **options)


def forward_views(module, variables, batch, *, tta, multi_label, **options):
    """`forward` of all views of the images (`tta.views_of`), averaged."""
    if tta == 'none':
        return forward(module, variables, batch, **options)
    found = [
        forward(module, variables, batch | {'image': images}, **options)
        for images in tta_lib.views_of(batch['image'], tta)
    ]
    return tta_lib.mean_logits(jnp.stack(found), multi_label=multi_label)


@functools.partial(jax.jit, static_argnames=('module', 'mean', 'std', 'tta'))
def eval_step(variables, batch, *, module, mean, std, tta='none'):
    """Sums over the rows with mask 1 (correct, loss, count), and the logits."""
    several = batch['label'].ndim == 2
    logits = forward_views(
        module, variables, batch, tta=tta, multi_label=several, mean=mean, std=std
    )
    mask = batch['mask']
    losses, correct = losses_lib.measure(logits, batch['label'])
    sums = {
        'correct': jnp.sum(correct * mask),
        'loss': jnp.sum(losses * mask),
        'count': jnp.sum(mask),
    }
    return sums, logits


def evaluate(
    module: densenet.DenseNet,
    variables,
    examples: labeled_images.Examples,
    *,
    batch_size: int,
    mesh,
    mean,
    std,
    bad_images: str = 'error',
    threads: int = 4,
    workers: int = 0,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Accuracy and mean cross-entropy; every example counts exactly once.

    Args:
      variables: `{'params', 'batch_stats'}`, replicated over the mesh.
      batch_size: over all devices; a multiple of their number.
      bad_images: `skip` leaves out images that can no longer be read.
      between: called after each batch; an exception from it ends the evaluation.

    Returns:
      `{'accuracy': 0 to 1, 'loss', 'count'}`, with the positions `unread` if images
      were left out. With several labels per image also `auroc`, a list with None for
      labels that have only one value, and its mean `mean_auroc`.
    """
    sums: list[Any] = []
    seen: list[Any] = []
    left_out: list[int] = []
    steps = _eval_steps(
        module,
        variables,
        examples,
        batch_size=batch_size,
        mesh=mesh,
        mean=mean,
        std=std,
        bad_images=bad_images,
        left_out=left_out,
        threads=threads,
        workers=workers,
    )
    for step, logits, batch in steps:
        if batch['label'].ndim == 2:
            parts = (logits, batch['label'], batch['mask'])
            seen.append([mesh_lib.gather(part) for part in parts])
        if len(sums) > 1:  # at most two batches in flight, so memory stays constant
            jax.block_until_ready(sums[-2])
        sums.append(step)
        between()
    # Summed on the host in double precision: a million losses in float32 would not
    # add up to the printed digits.
    total = {name: 0.0 for name in sums[0]}
    for step in jax.device_get(sums):
        for name, value in step.items():
            total[name] += float(value)
    if total['count'] != len(examples) and bad_images != 'skip':
        raise AssertionError(f'{total["count"]} of {len(examples)} examples counted')
    metrics: dict[str, Any] = {
        'accuracy': total['correct'] / total['count'],
        'loss': total['loss'] / total['count'],
        'count': int(total['count']),
    }
    if left_out:
        metrics['unread'] = left_out
    if seen:
        logits, labels, mask = (
            np.concatenate(part) for part in zip(*seen, strict=True)
        )
        labels = soft_labels.known_labels(labels)
        areas = metrics_lib.auroc(logits[mask > 0], labels[mask > 0])
        metrics |= {'auroc': areas, 'mean_auroc': metrics_lib.mean_auroc(areas)}
    return metrics


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The outputs of a trained model for labeled images, on every host.

    Attributes:
      logits: float32 `[N, C]`, from the network itself: neither calibrated nor scaled
        by operating points.
      labels: int32 `[N]`, or float32 `[N, L]` of 0, 1 and NaN, also for soft ones.
      features: pooled features, float32 `[N, F]`, if they were requested.
      own_logits: with the features, the logits of the images themselves, if `logits`
        are means: over views (`data.tta`), or over M members, float32 `[N, M, C]`.
    """

    logits: np.ndarray
    labels: np.ndarray
    features: np.ndarray | None = None
    own_logits: np.ndarray | None = None


def compute_outputs(
    trained: Trained,
    examples: labeled_images.Examples,
    *,
    batch_size: int,
    threads: int = 4,
    workers: int = 0,
    features: bool = False,
    title: str = 'test',
) -> Outputs:
    """Computes the outputs of a trained model for labeled images, in their order.

    Applies the test-time augmentation of the model's metadata (`views`), unlike
    `evaluate`.

    Args:
      batch_size: over all devices; a multiple of their number.
      features: whether to return pooled features and `own_logits` as well, from the
        same pass; they belong to the images themselves, not to other views of them.
      title: title of the progress bar.

    Raises:
      UserError: a logit is not finite.
    """
    parts = []
    module: network.Network | _Folded = trained.module
    variables = trained.variables
    if trained.precision == 'bfloat16':  # as `Predictor` computes
        with mesh_lib.computing(trained.mesh):
            arrays = folded.fold(trained.module, variables)
        module = _Folded(trained.module)
        variables = mesh_lib.replicate(arrays, trained.mesh)
    steps = _eval_steps(
        module,
        variables,
        examples,
        batch_size=batch_size,
        mesh=trained.mesh,
        mean=trained.mean,
        std=trained.std,
        tta=trained.tta,
        step=_features_step if features else eval_step,
        threads=threads,
        workers=workers,
    )
    with tqdm(total=len(examples), desc=title, leave=False, disable=None) as bar:
        for own, logits, batch in steps:
            made = logits, batch['label'], *(own if features else ())
            mask = mesh_lib.gather(batch['mask']) > 0
            parts.append([mesh_lib.gather(part)[mask] for part in made])
            bar.update(len(parts[-1][0]))
    logits, labels, *more = (np.concatenate(part) for part in zip(*parts, strict=True))
    if len(logits) != len(examples):
        raise AssertionError(f'{len(logits)} of {len(examples)} examples computed')
    logits = logits.astype(np.float32)
    if not np.isfinite(logits).all():
        raise UserError(
            'the outputs of the model are not finite: its training diverged; train '
            'again with a lower optimizer.learning_rate'
        )
    return Outputs(logits, soft_labels.known_labels(labels), *more)


@functools.partial(jax.jit, static_argnames=('module', 'mean', 'std', 'tta'))
def _features_step(variables, batch, *, module, mean, std, tta='none'):
    """Pooled features (with `own_logits`) of a batch of images, and the logits."""
    apply = functools.partial(module.apply, variables, mutable=False)
    pooled, logits = [], []
    for view in tta_lib.views_of(batch['image'], tta):
        maps = apply(normalize(view, mean=mean, std=std), method='features')
        pooled.append(apply(maps, method='pool'))
        logits.append(apply(pooled[-1], method='classify'))
    own = [pooled[0]]
    if module.members > 1:
        own.append(apply(pooled[0], method='classify_each'))
    elif len(logits) > 1:
        own.append(logits[0])
    if len(logits) > 1:
        several = batch['label'].ndim == 2
        logits = [tta_lib.mean_logits(jnp.stack(logits), multi_label=several)]
    return tuple(part.astype(jnp.float32) for part in own), logits[0]


def finish_logits(trained: Trained, logits: np.ndarray) -> np.ndarray:
    """Converts logits of the network to those of predictions, float32 `[N, C]`.

    They are calibrated if the model has a calibration. Otherwise, if it has operating
    points, their sigmoids are the scores.
    """
    if trained.calibration:
        return trained.calibration.apply(np.float64(logits)).astype(np.float32)
    if trained.points is not None:
        return operating_points.scale_logits(logits, trained.points).astype(np.float32)
    return logits


def compute_logits(
    trained: Trained, examples: labeled_images.Examples, **loading
) -> tuple[np.ndarray, np.ndarray]:
    """`finish_logits` of `compute_outputs`, and the labels.

    Args:
      **loading: arguments of `compute_outputs`.
    """
    found = compute_outputs(trained, examples, **loading)
    return finish_logits(trained, found.logits), found.labels


@dataclasses.dataclass(frozen=True)
class _Folded:
    """A network with the variables of `folded.fold`."""

    module: network.Network

    @property
    def members(self) -> int:
        return self.module.members

    def apply(self, arrays, images, *, mutable, method=None):
        if method is None:
            return folded.logits(self.module, arrays, images)
        if method == 'features':
            return folded.features(self.module, arrays, images)
        return self.module.apply(arrays['head'], images, method=method)


def _eval_steps(
    module,
    variables,
    examples,
    *,
    mesh,
    mean,
    std,
    tta='none',
    step=None,
    left_out=None,
    **loading,
):
    """Yields sums, logits and the batch, for each batch in turn.

    Args:
      step: `eval_step`, or another function whose first result replaces the sums.
      left_out: a list that gets the positions of images that were left out.
      **loading: arguments of `pipeline.eval_batches`.
    """
    batches = pipeline.eval_batches(examples, **loading)
    try:
        for batch in batches:
            batch = mesh_lib.to_global(batch, mesh)
            with mesh_lib.computing(mesh):
                sums, logits = (step or eval_step)(
                    variables, batch, module=module, mean=mean, std=std, tta=tta
                )
            yield sums, logits, batch
        if isinstance(batches, unreadable.CountedBatches):
            left_out += sorted(batches.unread)
    finally:
        batches.close()


def match_classes(
    examples: labeled_images.Examples, names, trained_names, *, count: int = 0
) -> labeled_images.Examples:
    """Renumbers the labels of a source to the classes of a model.

    Labels are matched by class name, so a folder with fewer classes can be used. A
    model without class names needs as many classes as it has outputs, in order.

    Args:
      names: classes of the source.
      trained_names: names of the model's classes, or None.
      count: number of the model's classes, if they have no names.

    Raises:
      UserError: a class that the model does not know.
    """
    if trained_names is None:
        if len(names) != count:
            raise UserError(
                f'data.source has {len(names)} classes, the weights have {count} '
                'without names, so they cannot be matched; name them with '
                '--class_names=FILE or A,B,...'
            )
        notes.say(
            'the weights have no class names, so the outputs are assumed to be the '
            f'classes of the data in this order: {list_first(names)}'
        )
        return examples
    names = _without_zeros(names, trained_names)
    unknown = [name for name in names if name not in trained_names]
    if unknown:
        plain = {parts_lib.plain_case(name): name for name in trained_names}
        similar = plain.get(parts_lib.plain_case(unknown[0]))
        raise UserError(
            f'data.source: class {unknown[0]} is not one of the classes that the model '
            f'was trained on ({list_first(trained_names)}); rename '
            + (f'it to {similar}' if similar else 'or remove it')
        )
    if tuple(names) == tuple(trained_names):
        return examples
    places = [trained_names.index(name) for name in names]
    return labeled_images.Relabeled(examples, places, len(trained_names))


def _without_zeros(names, trained_names):
    """Names such as 001 as 1, if the model has these: of an earlier version."""
    unknown = [name for name in names if name not in trained_names]
    if not unknown or not all(name.isascii() and name.isdecimal() for name in unknown):
        return names
    plain = [(name.lstrip('0') or '0') if name in unknown else name for name in names]
    if len(set(plain)) < len(plain) or not set(plain) <= set(trained_names):
        return names
    notes.say(
        f'data.source: the classes {list_first(unknown)} are measured as those of the '
        f'model without zeros in front ({list_first(trained_names)})'
    )
    return plain


def format_metrics(name: str, metrics: dict[str, float]) -> str:
    """`Test_acc: 93.3%, Test_loss: 0.270`, as in the line of an epoch."""
    accuracy, loss = metrics['accuracy'] * 100, metrics['loss']
    text = f'{name}_acc: {accuracy:.1f}%, {name}_loss: {loss:.3f}'
    if 'mean_auroc' not in metrics:
        return text
    return f'{text}, {name}_auroc: {format_auroc(metrics["mean_auroc"])}'


def format_auroc(area: float | None) -> str:
    """`0.843`; a dash for None."""
    return '-' if area is None else f'{area:.3f}'
