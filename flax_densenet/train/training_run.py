"""A prepared run: its data, model and optimizer, from its settings.

Training and everything else that takes training steps (`lr_find`) use this, so that the
same settings mean the same in both.
"""

import dataclasses
import logging
import time
from typing import Any

import jax
import numpy as np
import optax

from flax_densenet import losses
from flax_densenet import settings as settings_lib
from flax_densenet.data import class_balance, dataset, pipeline
from flax_densenet.data.augment import mixing as mixing_lib
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.distributed import zero
from flax_densenet.errors import UserError
from flax_densenet.models import initialization, network
from flax_densenet.settings import sizes
from flax_densenet.train import ema, feature_cache, finetune, progressive_resizing, step
from flax_densenet.weights import transfer, weight_file

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainingRun:
    """The objects that one call of `fit.fit` uses.

    Attributes:
      settings: with their open fields filled in.
      schedule: learning rate by step.
      weights: the weights of `init_from` to start from; None if they come from a
        checkpoint or the seed.
      features: replace the images, if `cache_features` kept them.
    """

    settings: settings_lib.Settings
    workdir: str
    source: dataset.Source
    module: network.Network
    mesh: Any
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    metadata: dict[str, Any]
    weights: weight_file.Weights | None
    plan: finetune.Plan
    features: dataset.Source | None = None

    def new_state(self, variables):
        """The state before the first step, on the host."""
        average = None
        if self.settings.train.ema:
            live = [name for name, rate in self.plan.rates.items() if rate]
            average = ema.start(variables, live)
        return step.new_state(
            variables,
            self.optimizer,
            multi_label=self.source.multi_label,
            average=average,
        )

    @property
    def batch_size(self) -> int:
        """Images per step, over all devices and hosts."""
        return self.settings.loader.batch_size

    @property
    def accumulate_steps(self) -> int:
        """Micro-batches per step."""
        return self.settings.train.accumulate_steps

    @property
    def mixing(self) -> mixing_lib.Mixing:
        """The mixing of a micro-batch's images on the device."""
        return mixing_lib.from_settings(self.settings.augmentation, rows=self.part_size)

    def step_options(self, frozen: int) -> step.StepOptions:
        """Options of the step while the first `frozen` stages stay fixed."""
        train, optimizer = self.settings.train, self.settings.optimizer
        return step.StepOptions(
            **self.preprocessing,
            seed=train.seed,
            l2_penalty=optimizer.l2_penalty,
            gradient_clip=optimizer.gradient_clip,
            frozen=frozen,
            class_weights=class_weights(self),
            mix=self.mixing,
            accumulate_steps=train.accumulate_steps,
            loss=make_loss(self.settings, self.source),
            ema=train.ema,
        )

    def size_in(self, epoch: int) -> sizes.Size:
        """The size of the training images in an epoch, counted from 1."""
        return progressive_resizing.size_in(
            progressive_resizing.parse(self.settings.augmentation.size_schedule),
            epoch,
            epochs=self.settings.train.epochs,
            last=self.source.train.image_size,
        )

    def size_at(self, start: int) -> sizes.Size:
        """The size of the training images after `start` steps."""
        count, rows = len(self.source.train), self.batch_size
        # The first epoch that ends after these steps (`step.last_step_of_epoch`).
        return self.size_in(start * rows // count + 1)

    @property
    def part_size(self):
        """Rows computed at a time, over all devices; in evaluation too."""
        return self.batch_size // self.accumulate_steps

    def place_state(self, state):
        """Copies a state, the same on all hosts, from the host to the devices."""
        return mesh_lib.replicate(state.replace(opt_state=()), self.mesh).replace(
            opt_state=zero.place(state.opt_state, self.mesh)
        )

    def place_batch(self, batch):
        """Copies this host's rows of a training batch to the devices."""
        return mesh_lib.to_global(batch, self.mesh, self.accumulate_steps)

    @property
    def preprocessing(self):
        """How the model normalizes images."""
        return self.settings.preparation.normalization

    @property
    def loading(self):
        """How batches are read."""
        loader = self.settings.loader
        # Otherwise each process would get a copy of the features.
        workers = 0 if self.features else loader.workers
        return {'threads': loader.threads, 'workers': workers}


def first_variables(run: TrainingRun):
    """`{'params', 'batch_stats'}` on the host, from `init_from` or the seed."""
    variables = initialization.init_variables(
        run.module,
        seed=run.settings.train.seed,
        channels=run.settings.preparation.channels,
    )
    if run.weights is None:
        return variables
    names = run.source.class_names
    return transfer.first_variables(run.weights, variables, names)


def examples_at(run: TrainingRun, source: dataset.Source, start: int):
    """The training part of a source, with its image size after `start` steps."""
    size = run.size_at(start)
    return source.train if run.features else source.train.at_size(size)


def example_shapes(run: TrainingRun, start: int) -> dict[str, tuple]:
    """Shape and dtype of an example's arrays after `start` steps; reads no image."""
    shapes: dict[str, Any] = {'label': ((), np.int32), 'epoch': ((), np.int32)}
    if run.source.multi_label:
        shapes['label'] = (len(run.source.class_names),), np.float32
    if run.features:
        train: Any = run.features.train
        features = train.features
        return shapes | {'features': ((1, 1, features.shape[1]), features.dtype)}
    preparation = examples_at(run, run.source, start).preparation
    shape = *preparation.shape, preparation.channels
    return shapes | {'image': (shape, preparation.dtype)}


def train_batches(run: TrainingRun, source: dataset.Source, start: int, **loading):
    """The training batches from a step on; see `pipeline.train_batches`.

    All have the size of the first one (`TrainingRun.size_at`).

    Args:
      **loading: replaces the run's own loading options.
    """
    augmentation = run.settings.augmentation
    return pipeline.train_batches(
        examples_at(run, source, start),
        batch_size=run.batch_size,
        seed=run.settings.train.seed,
        start=start,
        augment=augmentation.augment,
        color_jitter=augmentation.color_jitter,
        policy=augmentation.policy,
        balance=run.settings.loader.balance,
        bad_images=run.settings.data.bad_images,
        micro_batches=run.accumulate_steps,
        **run.loading | loading,
    )


def cache_features(run: TrainingRun, state: step.TrainState) -> dataset.Source | None:
    """The source with features in place of the images, if these never change."""
    if not run.plan.head_only or run.settings.train.cache_features == 'off':
        return None
    return feature_cache.cache_features(
        run.module,
        {'params': state.params, 'batch_stats': state.batch_stats},
        run.source,
        changes=feature_cache.list_changes(run.settings.augmentation),
        limit_gib=run.settings.data.cache_limit_gib,
        batch_size=run.part_size,
        mesh=run.mesh,
        **run.preprocessing,
        **run.loading,
    )


def compile_step(run: TrainingRun, state: step.TrainState, frozen: int, start: int = 0):
    """Compiles `(state, batch) -> (state, loss)`, which donates the state.

    Args:
      frozen: number of `Network.stages` that stay fixed.
      start: number of steps taken before; the image size may depend on it.
    """
    parts, by_rows = run.accumulate_steps, mesh_lib.split_rows(run.mesh)
    rows: tuple[int, ...] = (run.batch_size,)
    if parts > 1:
        rows = parts, run.batch_size // parts
        by_rows = mesh_lib.split_micro_batches(run.mesh)
    batch = {
        name: jax.ShapeDtypeStruct((*rows, *shape), dtype, sharding=by_rows)
        for name, (shape, dtype) in example_shapes(run, start).items()
    }
    train_step = step.make_train_step(
        run.module, run.optimizer, run.step_options(frozen)
    )
    _LOGGER.info('compiling the training step, once; this can take a minute')
    began = time.perf_counter()
    compiled = step.compile_train_step(train_step, state, batch, run.mesh)
    _LOGGER.info(f'compiled in {time.perf_counter() - began:.1f} s')
    return compiled


def make_loss(settings, source) -> losses.Loss:
    """The loss of a run.

    Raises:
      UserError: one of its fields has a wrong value.
    """
    text = settings.loss.pos_weight
    if text.strip() and not source.multi_label:
        raise UserError(
            f'train.pos_weight={text} is for several labels per image; for one class '
            'per image use data.balance=loss'
        )
    weights: tuple[float, ...] = ()
    if source.multi_label:
        weights = class_balance.positive_weights(
            text, source.train.labels, source.class_names
        )
    return losses.make_loss(**vars(settings.loss) | {'pos_weight': weights})


def class_weights(run):
    """The class weights of `data.balance=loss`, else None."""
    if run.settings.loader.balance != 'loss':
        return None
    return class_balance.class_weights(
        run.source.train.labels, len(run.source.class_names)
    )
