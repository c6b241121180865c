"""Features of a frozen backbone, computed once for all epochs (a linear probe)."""

import dataclasses
import functools
import logging
import time

import jax
import numpy as np
from tqdm import tqdm

from flax_densenet import settings
from flax_densenet.data import dataset, labeled_images, pipeline
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.errors import UserError
from flax_densenet.evaluation import evaluate
from flax_densenet.models import densenet, initialization

_LOGGER = logging.getLogger(__name__)

CACHES = ('auto', 'off')
_GIB = 2**30


class FeatureExamples:
    """Labeled features in memory: `{'features': [1, 1, F], 'label': ...}`.

    Each example is a map of one pixel.
    """

    preparation = None  # there are no images to prepare

    def __init__(self, features, labels):
        self.features = features
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __repr__(self):
        return f'features of {len(self)} images'

    def __getitem__(self, position):
        return {
            'features': self.features[position, None, None],
            'label': self.labels[position],
        }


def check_cache(name: str):
    """Raises for an unknown `train.cache_features`."""
    if name not in CACHES:
        raise UserError(
            f'train.cache_features={name} is not known; use {", ".join(CACHES)}'
        )


def list_changes(augmentation: settings.AugmentationSettings) -> list[str]:
    """The settings that change training images, as data.NAME=VALUE."""
    return [
        f'data.{name}={value}'
        for name, value in vars(augmentation).items()
        if value not in ('none', 0, ())
    ]


def _why_not(module, source, changes, limit_gib):
    """Why features cannot be kept; empty if they can."""
    if changes:
        return f'{changes[0]} changes the images'
    shapes = initialization.variable_shapes(module)['params']
    width = shapes['classifier']['kernel'].shape[0]
    need = (len(source.train) + len(source.selection)) * width * 4 / _GIB
    if need > limit_gib:
        return (
            f'they would take {need:.2f} GiB, more than '
            f'data.cache_limit_gib={limit_gib:g}'
        )
    return ''


def cache_features(
    module: densenet.DenseNet,
    variables,
    source: dataset.Source,
    *,
    changes: list[str],
    limit_gib: float,
    batch_size: int,
    mesh,
    mean,
    std,
    **loading,
) -> dataset.Source | None:
    """Replaces the images by their pooled features, computed in evaluation mode.

    The source has two parts: the training images, and the images that choose the best
    epoch.

    This takes one pass over the images; after that, an epoch of the head takes seconds.
    Each of several hosts gets the features of all images, since any of them may be in
    its share of a batch.

    Args:
      variables: `{'params', 'batch_stats'}`, replicated over the mesh.
      changes: what changes the training images (`list_changes`).
      limit_gib: most memory that the features may take.
      batch_size: over all devices.
      **loading: `threads` and `workers` of `pipeline.eval_batches`.

    Returns: The source, or None if the features cannot be kept; then one line gives the
      reason.
    """
    reason = _why_not(module, source, changes, limit_gib)
    if reason:
        _LOGGER.info(f'each epoch computes the features again: {reason}')
        return None
    backbone = module.clone(num_classes=0)

    @functools.partial(jax.jit, out_shardings=mesh_lib.replicated(mesh))
    def compute(variables, batch):
        features = evaluate.forward(backbone, variables, batch, mean=mean, std=std)
        return features, batch['label'], batch['position']

    start, parts = time.perf_counter(), []
    for examples in (source.train, source.selection):
        batches = pipeline.eval_batches(
            labeled_images.Numbered(examples), batch_size=batch_size, **loading
        )
        parts.append(_collect(compute, variables, batches, len(examples), mesh))
        batches.close()
    _LOGGER.info(
        f'features of {sum(map(len, parts))} images, {parts[0].features.shape[1]} '
        f'each, computed in {time.perf_counter() - start:.1f} s; the classifier '
        'trains on them'
    )
    return dataclasses.replace(source, train=parts[0], test=parts[1], val=None)


def _collect(compute, variables, batches, count, mesh):
    known, features, labels = np.zeros(count, bool), None, None
    with tqdm(total=count, desc='features', leave=False, disable=None) as bar:
        for batch in batches:
            batch = mesh_lib.to_global(batch, mesh)
            with mesh_lib.computing(mesh):
                computed = compute(variables, batch)
            found, label, place = jax.device_get(computed)
            if features is None:
                features = np.empty((count, found.shape[1]), found.dtype)
                labels = np.empty((count, *label.shape[1:]), label.dtype)
            # Rows that fill up the last batch repeat the last example.
            features[place], labels[place], known[place] = found, label, True
            bar.update(len(place))
    if not known.all():
        raise AssertionError(f'{known.sum()} of {count} examples have features')
    return FeatureExamples(features, labels)
