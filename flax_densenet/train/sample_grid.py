"""`samples.png`: the first training images, with all augmentations applied."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from flax_densenet.data import bands, deep_picture
from flax_densenet.data.augment import mixing
from flax_densenet.train import feature_cache, step, training_run

SINGLE = 8  # images that are shown individually


def save(
    run: training_run.TrainingRun, save_samples: Callable[..., None]
) -> np.ndarray:
    """Draws the images of the first step into the run's folder.

    Args:
      save_samples: a function such as `report.plots.save_samples`.

    Returns:
      The first `SINGLE` images, uint8 `[N, H, W, 3]`.
    """
    batches = training_run.train_batches(run, run.source, 0)
    try:
        batch = next(batches)
    finally:
        batches.close()
    batch = _first_part(run, batch)
    save_samples(
        run.workdir,
        batch,
        run.source.class_names,
        changes=feature_cache.list_changes(run.settings.augmentation),
        **run.preprocessing,
    )
    images = batch['image'][:SINGLE]
    if images.dtype != np.uint16:  # mixed images may lie between two values
        images = np.clip(np.rint(images), 0, 255).astype(np.uint8)
    return bands.to_visible(deep_picture.to_uint8(images))


def _first_part(run, batch):
    """The first micro-batch of the first step as the network gets it.

    With several hosts, the one that draws shows its own rows, mixed with each other.
    """
    parts = run.accumulate_steps
    batch = {name: x[: len(x) // parts] for name, x in batch.items()}
    if not run.mixing:
        return batch
    key = step.step_key(run.settings.train.seed, 0)
    key = key if parts == 1 else jax.random.fold_in(key, 0)
    mean = run.preprocessing['mean']
    mix = jax.jit(functools.partial(mixing.mix, mixing=run.mixing, mean=mean))
    images, partners, weights = jax.device_get(mix(batch['image'], key))
    return {
        'image': images,
        'label': batch['label'],
        'partner_label': batch['label'][partners],
        'weight': np.asarray(weights),
    }
