"""What a run works with, from its config: checked fields, data, model and optimizer.

Training and whatever else takes training steps (`lr_find`) prepare through this, so
that they mean the same by the same fields.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
import optax

from flax_densenet import losses
from flax_densenet.data import class_balance, dataset, pipeline
from flax_densenet.data.augment import mixing as mixing_lib
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.distributed import zero
from flax_densenet.models import initialization, network
from flax_densenet.train import ema, feature_cache, finetune, progressive_resizing, step
from flax_densenet.weights import transfer, weight_file

LOSS_FIELDS = ('loss', 'label_smoothing', 'focal_gamma')
CHANGE_FIELDS = ('augment', 'color_jitter', 'policy', 'balance')
MIXING_FIELDS = ('erase', 'mixup', 'cutmix')
# The state depends on them; with their defaults.
PHASE_FIELDS = {'freeze': 'none', 'head_warmup_epochs': 0, 'ema': 0.0}


@dataclasses.dataclass
class TrainingRun:
    """What one call of `fit.fit` works with.

    Attributes:
      config: with its open fields filled in.
      schedule: learning rate by step.
      weights: to start from, of `init_from`; None where a checkpoint or the seed gives
        them.
      features: in place of the images, where `cache_features` kept some.
    """

    config: dict[str, Any]
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
        if self.config['train']['ema']:
            live = [name for name, rate in self.plan.rates.items() if rate]
            average = ema.start(variables, live)
        return step.new_state(
            variables,
            self.optimizer,
            multi_label=self.source.multi_label,
            average=average,
        )

    @property
    def loss(self):
        """What the gradient is of."""
        return losses.make_loss(
            **{name: self.config['train'][name] for name in LOSS_FIELDS}
        )

    @property
    def accumulate_steps(self):
        """Micro-batches of a step."""
        return self.config['train']['accumulate_steps']

    @property
    def mixing(self) -> mixing_lib.Mixing:
        """What is done to the images of a micro-batch on the device."""
        fields = {name: self.config['data'][name] for name in MIXING_FIELDS}
        return mixing_lib.from_fields(**fields, rows=self.part_size)

    def size_in(self, epoch: int) -> int:
        """Pixels a side of the training images in an epoch, counted from 1."""
        return progressive_resizing.size_in(
            progressive_resizing.parse(self.config['data']['size_schedule']),
            epoch,
            epochs=self.config['train']['epochs'],
            last=self.source.train.image_size,
        )

    def size_at(self, start: int) -> int:
        """The same for the step behind the first `start` ones."""
        count, rows = len(self.source.train), self.config['data']['batch_size']
        # The first epoch with steps behind them (`step.last_step_of_epoch`).
        return self.size_in(start * rows // count + 1)

    @property
    def part_size(self):
        """Rows that are computed at a time, over all devices; in evaluation too."""
        return self.config['data']['batch_size'] // self.accumulate_steps

    def place_state(self, state):
        """A state on the host, the same on all hosts, to the devices."""
        return mesh_lib.replicate(state.replace(opt_state=()), self.mesh).replace(
            opt_state=zero.place(state.opt_state, self.mesh)
        )

    def place_batch(self, batch):
        """This host's rows of a training batch to the devices."""
        return mesh_lib.to_global(batch, self.mesh, self.accumulate_steps)

    @property
    def preprocessing(self):
        """How the model normalizes images."""
        return {name: tuple(self.config['data'][name]) for name in ('mean', 'std')}

    @property
    def loading(self):
        """How batches are read."""
        fields = {name: self.config['data'][name] for name in ('threads', 'workers')}
        # Each process would get a copy of the features.
        return fields | {'workers': 0} if self.features else fields


def first_variables(run: TrainingRun):
    """`{'params', 'batch_stats'}` on the host, of `init_from` or of the seed."""
    variables = initialization.init_variables(
        run.module,
        seed=run.config['train']['seed'],
        channels=run.config['data']['channels'],
    )
    if run.weights is None:
        return variables
    names = run.source.class_names
    return transfer.first_variables(run.weights, variables, names)


def examples_at(run: TrainingRun, source: dataset.Source, start: int):
    """The training part of a source at its images' size behind `start` steps."""
    size = run.size_at(start)
    return source.train if run.features else source.train.at_size(size)


def example_shapes(run: TrainingRun, start: int) -> dict[str, tuple]:
    """Shape and dtype of an example's arrays behind `start` steps; reads no image."""
    shapes = {'label': ((), np.int32), 'epoch': ((), np.int32)}
    if run.source.multi_label:
        shapes['label'] = (len(run.source.class_names),), np.float32
    if run.features:
        features = run.features.train.features
        return shapes | {'features': ((1, 1, features.shape[1]), features.dtype)}
    preparation = examples_at(run, run.source, start).preparation
    side = preparation.size
    return shapes | {'image': ((side, side, preparation.channels), np.uint8)}


def train_batches(run: TrainingRun, source: dataset.Source, start: int, **loading):
    """The batches of the training part from a step on; see `pipeline.train_batches`.

    All have the size of the first one (`TrainingRun.size_at`).

    Args:
      **loading: in place of the run's own way to read.
    """
    fields = run.config['data']
    return pipeline.train_batches(
        examples_at(run, source, start),
        batch_size=fields['batch_size'],
        seed=run.config['train']['seed'],
        start=start,
        **{name: fields[name] for name in CHANGE_FIELDS},
        bad_images=fields['bad_images'],
        micro_batches=run.accumulate_steps,
        **run.loading | loading,
    )


def cache_features(run: TrainingRun, state: step.TrainState) -> dataset.Source | None:
    """The source with features in place of images that are always the same."""
    if not run.plan.head_only or run.config['train']['cache_features'] == 'off':
        return None
    fields = run.config['data']
    return feature_cache.cache_features(
        run.module,
        {'params': state.params, 'batch_stats': state.batch_stats},
        run.source,
        changes=feature_cache.list_changes(fields),
        limit_gib=fields['cache_limit_gib'],
        batch_size=run.part_size,
        mesh=run.mesh,
        **run.preprocessing,
        **run.loading,
    )


def compile_step(run: TrainingRun, state: step.TrainState, frozen: int, start: int = 0):
    """Compiles `(state, batch) -> (state, loss)`, which donates the state.

    Args:
      frozen: how many of `Network.stages` stay as they are.
      start: steps that were taken; the images' size may depend on them.
    """
    rows, parts = (run.config['data']['batch_size'],), run.accumulate_steps
    by_rows = mesh_lib.split_rows(run.mesh)
    if parts > 1:
        rows, by_rows = (
            (parts, rows[0] // parts),
            mesh_lib.split_micro_batches(run.mesh),
        )
    batch = {
        name: jax.ShapeDtypeStruct((*rows, *shape), dtype, sharding=by_rows)
        for name, (shape, dtype) in example_shapes(run, start).items()
    }
    train_step = step.make_train_step(
        run.module,
        run.optimizer,
        seed=run.config['train']['seed'],
        l2_penalty=run.config['optimizer']['l2_penalty'],
        gradient_clip=run.config['optimizer']['gradient_clip'],
        frozen=frozen,
        class_weights=class_weights(run),
        mix=run.mixing,
        accumulate_steps=parts,
        loss=run.loss,
        ema=run.config['train']['ema'],
        **run.preprocessing,
    )
    start = time.perf_counter()
    compiled = step.compile_train_step(train_step, state, batch, run.mesh)
    print(f'compiled in {time.perf_counter() - start:.1f} s', flush=True)
    return compiled


def class_weights(run):
    """Of `data.balance=loss`, else None."""
    if run.config['data']['balance'] != 'loss':
        return None
    return class_balance.class_weights(
        run.source.train.labels, len(run.source.class_names)
    )
