"""The training step: a pure function of the state and the global batch.

The step counter is the only clock: the learning rate and the dropout key are functions
of it, so a resumed run continues as if it had not stopped.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax import flatten_util
from jax.extend import core as jax_core
from jax.extend.core import primitives

from flax_densenet import losses as losses_lib
from flax_densenet.data.augment import mixing
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.distributed import zero
from flax_densenet.evaluation import evaluate
from flax_densenet.models import network
from flax_densenet.system import process
from flax_densenet.train import ema as ema_lib


@flax.struct.dataclass
class TrainState:
    """The state that a checkpoint holds: arrays only.

    Attributes:
      step: int32, number of steps taken.
      running: sums over the examples of one epoch; see `new_running`.
      average: average of parameters and statistics (`ema.start`), or None.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    running: Any
    average: Any = None


def new_running(correct=np.int32) -> dict[str, np.ndarray]:
    """Sums of loss, correct and count `[this epoch, next epoch]`, and the epoch.

    A batch may hold the end of one epoch and the start of the next; each example is
    counted in its own epoch.

    Args:
      correct: dtype; float32 if an image can be partly right (several labels).
    """
    return {
        'epoch': np.zeros((), np.int32),
        'loss': np.zeros(2, np.float32),
        'correct': np.zeros(2, correct),
        'count': np.zeros(2, np.int32),
    }


def new_state(
    variables,
    optimizer: optax.GradientTransformation,
    *,
    multi_label: bool = False,
    average=None,
) -> TrainState:
    """The state before the first step, on the host.

    Args:
      variables: `{'params', 'batch_stats'}`.
      multi_label: whether an image can have several labels.
      average: from `ema.start`, or None.
    """
    return TrainState(
        step=np.zeros((), np.int32),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=_first_opt_state(optimizer, variables['params']),
        running=new_running(np.float32 if multi_label else np.int32),
        average=average,
    )


def _first_opt_state(optimizer, params):
    """`optimizer.init(params)` on the host; compiles nothing if it is all constants."""
    traced, shapes = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
    filled = {
        equation.outvars[0]: np.full(
            equation.outvars[0].aval.shape,
            equation.invars[0].val,
            equation.outvars[0].aval.dtype,
        )
        for equation in traced.jaxpr.eqns
        if equation.primitive is primitives.broadcast_in_dim_p
        and isinstance(equation.invars[0], jax_core.Literal)
    }
    leaves = [
        np.asarray(out.val, out.aval.dtype)
        if isinstance(out, jax_core.Literal)
        else filled.get(out)
        for out in traced.jaxpr.outvars
    ]
    if any(leaf is None for leaf in leaves):
        return jax.device_get(jax.jit(optimizer.init)(params))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _add_to_running(running, epoch, losses, correct, counted):
    """Adds the rows of a batch; the first row of a later epoch shifts the sums.

    Rows with `counted` 0 (instead of 1) add nothing.
    """
    first = epoch.min()
    later = first > running['epoch']

    def add(sums, values):
        sums = jnp.where(later, jnp.stack([sums[1], jnp.zeros_like(sums[1])]), sums)
        values = values.astype(sums.dtype)
        now = jnp.sum(values * (epoch == first), dtype=sums.dtype)
        rest = jnp.sum(values * (epoch != first), dtype=sums.dtype)
        return sums + jnp.stack([now, rest])

    return {
        'epoch': jnp.maximum(running['epoch'], first),
        'loss': add(running['loss'], losses),
        'correct': add(running['correct'], correct),
        'count': add(running['count'], counted),
    }


def _kernel_penalty(params):
    """The sum of the squares of all convolution kernels."""
    flat = traverse_util.flatten_dict(params)
    return sum(
        jnp.sum(jnp.square(leaf))
        for path, leaf in flat.items()
        if path[-1] == 'kernel' and leaf.ndim == 4
    )


@dataclasses.dataclass(frozen=True, eq=False)
class StepOptions:
    """What a training step does besides the model and the optimizer.

    Attributes:
      mean, std: `[C]`, to normalize images.
      seed: seed of dropout and mixing.
      l2_penalty: factor of the squared kernels in the loss.
      gradient_clip: maximum global norm of the gradient; 0 for no limit.
      frozen: number of the model's stages that stay fixed. Only the parameters after
        them are differentiated, so there is no backward pass through the others, and
        only the parameters after them reach the optimizer and the penalty.
      class_weights: float `[C]`, weight of each class's images in the loss; None: all
        1.
      mix: erases boxes and mixes the images of a (micro-)batch, by the step's key.
      accumulate_steps: micro-batches of the batch, see `make_gradients`.
      loss: the loss to minimize.
      ema: decay of the state's average, if it has one.
    """

    mean: Sequence[float]
    std: Sequence[float]
    seed: int = 0
    l2_penalty: float = 0.0
    gradient_clip: float = 0.0
    frozen: int = 0
    class_weights: Any = None
    mix: mixing.Mixing | None = None
    accumulate_steps: int = 1
    loss: losses_lib.Loss = losses_lib.CROSS_ENTROPY
    ema: float = 0.0


def make_train_step(
    module: network.Network,
    optimizer: optax.GradientTransformation,
    options: StepOptions,
):
    """Makes `(state, batch) -> (state, loss)`, a pure function of the global batch.

    Under `jax.jit` over a mesh, batch norm takes the statistics of the whole batch
    without further code. The reported loss is the cross-entropy; another `loss`, the
    penalty and the class weights act only through the gradient.

    If the loss or the norm of the gradient is not finite, the step leaves parameters,
    statistics, their average and the optimizer unchanged, counts none of the batch, and
    reports a loss that is not finite either.
    """
    differentiate = make_gradients(module, options)
    live = _live_parts(module, options.frozen)
    advance = _make_advance(optimizer, live=live, ema=options.ema)

    def train_step(state: TrainState, batch):
        gradients, (losses, correct, batch_stats) = differentiate(state, batch)
        # As one vector, like the optimizer: otherwise 364 sums would be compiled.
        norm = jnp.linalg.norm(flatten_util.ravel_pytree(gradients)[0])
        reported = losses.mean()
        finite = jnp.isfinite(norm) & jnp.isfinite(reported)
        if options.gradient_clip:
            scale = jnp.minimum(1, options.gradient_clip / norm)
            gradients = jax.tree.map(lambda leaf: leaf * scale, gradients)
        counted = jnp.full(correct.shape, finite, jnp.int32)
        losses, correct = (
            jnp.where(finite, values, jnp.zeros_like(values))
            for values in (losses, correct)
        )
        running = _add_to_running(
            state.running, batch['epoch'], losses, correct, counted
        )
        state = advance(state, gradients, batch_stats, finite)
        state = dataclasses.replace(state, step=state.step + 1, running=running)
        return state, jnp.where(finite, reported, jnp.nan)

    return train_step


def _make_advance(optimizer, *, live, ema):
    """Makes `(state, gradients, batch_stats, finite) -> state`, an update if finite.

    Args:
      live: names of the model's parts that train.
      ema: see `StepOptions`.
    """

    def advance(state, gradients, batch_stats, finite):
        def move(old):
            params, opt_state, _, average = old
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            params = optax.apply_updates(params, updates)
            if average is not None:
                found = {k: v for k, v in batch_stats.items() if k in live}
                average = ema_lib.update(
                    average, params, found, decay=ema, step=state.step
                )
            return params, opt_state, batch_stats, average

        trained = {name: state.params[name] for name in gradients}
        params, opt_state, batch_stats, average = _only_if(
            finite, move, (trained, state.opt_state, state.batch_stats, state.average)
        )
        return state.replace(
            params=state.params | params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            average=average,
        )

    return advance


def _only_if(condition, advance, old):
    """`advance(old)` if the condition holds, else `old`.

    On a CPU, a branch costs 4% of the 121's step and nothing in compilation; selecting
    each element costs 10% of both. A GPU would have to ask its host which branch to
    take.
    """
    if jax.default_backend() == 'cpu':
        return jax.lax.cond(condition, advance, lambda old: old, old)
    return jax.tree.map(functools.partial(jax.lax.select, condition), advance(old), old)


def make_gradients(module: network.Network, options: StepOptions):
    """Makes `(state, batch) -> (gradients, (losses, correct, batch_stats))`.

    Gradients are for the parameters after the first `frozen` of `Network.stages`;
    losses and correct are for each row (`losses.measure`, whatever `loss` is);
    `batch_stats` are the new ones.

    With `accumulate_steps` above 1 the arrays of the batch are `[accumulate_steps,
    rows, ...]`, as `mesh.to_global` makes them, and so are losses and correct. The
    micro-batches are computed one after another, in the memory of one, and the gradient
    is that of the mean loss over all rows. Each has its own batch statistics (and
    dropout key). The running statistics move once, to the average of where each
    micro-batch would have moved them, as with `DenseNet.batch_norm_group` of this many
    rows.
    """
    live, mix = _live_parts(module, options.frozen), options.mix

    def gradients_of(state: TrainState, batch):
        key = step_key(options.seed, state.step)
        if options.accumulate_steps == 1:
            return of_rows(state, batch, key)

        def of_part(number, part):
            return of_rows(state, part, jax.random.fold_in(key, number))

        return _accumulate(of_part, state.batch_stats, live, batch)

    def of_rows(state, batch, key):
        trained = {name: state.params[name] for name in state.params if name in live}
        labels, mixed = batch['label'], None
        if mix and 'image' in batch:
            mixed = mixing.mix(batch['image'], key, mix, mean=options.mean)
            batch = batch | {'image': mixed.images}

        def loss_of(params):
            logits, updated = evaluate.forward(
                module,
                {'params': state.params | params, 'batch_stats': state.batch_stats},
                batch,
                mean=options.mean,
                std=options.std,
                mutable=['batch_stats'],
                train=True,
                frozen=options.frozen,
                rngs={'dropout': key},
            )

            def measure(labels):
                losses, correct = losses_lib.measure(logits, labels)
                learned = losses_lib.apply_class_weights(
                    options.loss.losses(logits, labels), labels, options.class_weights
                )
                return losses, learned, correct

            results = measure(labels)
            if mixed and mix.pairs:
                others = measure(labels[mixed.partners])
                results = mixing.blend(results, others, mixed.weights)
            losses, learned, correct = results
            total = learned.mean()
            if options.l2_penalty:
                total += options.l2_penalty * _kernel_penalty(params)
            return total, (losses, correct, updated['batch_stats'])

        return jax.grad(loss_of, has_aux=True)(trained)

    return gradients_of


def _live_parts(module, frozen):
    """Names of the model's parts that train."""
    return {name for stage in module.stages()[frozen:] for name in stage}


def step_key(seed: int, step):
    """The random key of a step; for a micro-batch its number is folded in."""
    return jax.random.fold_in(jax.random.key(seed), step)


def _accumulate(gradients_of, batch_stats, live, batch):
    """Gradients of all parts of a batch, from a function for one part, in a loop.

    Args:
      gradients_of: `(number, part) -> (gradients, (losses, correct, batch_stats))`.
      batch_stats: before the step.
      live: names of the model's parts that are not frozen.
      batch: arrays of which each entry along the first axis is a part.
    """
    count = len(batch['label'])

    def results_of(number, part):
        gradients, (*rows, updated) = gradients_of(number, part)
        # Frozen values keep their bits, which an average might change.
        return (gradients, {k: v for k, v in updated.items() if k in live}), rows

    def add(sums, numbered):
        found, rows = results_of(*numbered)
        return jax.tree.map(jnp.add, sums, found), rows

    parts = jnp.arange(count), batch
    shapes, _ = jax.eval_shape(results_of, *jax.tree.map(lambda leaf: leaf[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, rows = jax.lax.scan(add, zeros, parts)
    gradients, averages = jax.tree.map(lambda leaf: leaf / count, sums)
    return gradients, (*rows, batch_stats | averages)


def compile_train_step(train_step, state, batch, mesh):
    """Compiles for the shapes of `state` and `batch`; the step donates the state.

    With `features` in the batch, only the head of the state passes through the step and
    is donated.
    """
    whole = mesh_lib.replicated(mesh)
    shards = zero.layout(state.opt_state, mesh)
    layout = TrainState(whole, whole, whole, shards, whole, whole)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=(layout, whole))
    # Passing the other 600 arrays of the 121 takes 4 ms, the step of the head 0.5 ms.
    head_only = 'features' in batch
    with mesh_lib.computing(mesh):
        lowered = step.lower(_head_of(state) if head_only else state, batch)
    compiled = lowered.compile()
    process.release_memory()
    if not head_only:
        return compiled

    def head_step(state, batch):
        head, loss = compiled(_head_of(state), batch)
        params = state.params | head.params
        return head.replace(params=params, batch_stats=state.batch_stats), loss

    return head_step


def _head_of(state):
    params = {'classifier': state.params['classifier']}
    return state.replace(params=params, batch_stats={})


def last_step_of_epoch(epoch: int, count: int, batch_size: int) -> int:
    """The step after which all examples of epochs 1 to `epoch` have been seen."""
    return -(-epoch * count // batch_size)
