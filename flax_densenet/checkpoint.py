"""Checkpoints of a run: the latest and the best, with all that rebuilds the model.

A workdir holds `checkpoints/<step>/` with four items: `model` (params and batch
statistics), `train` (the rest of the training state), `metadata` (JSON: how to make
the model and prepare its images) and `metrics`. Evaluation reads only `model`.
"""

import json
import math
import numbers
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from flax_densenet.errors import UserError

FOLDER = 'checkpoints'
# Weights hardly compress; the state of an optimizer begins with zeros, which do.
_EXPANSION = 100


def rank(metrics: dict[str, float]) -> tuple[float, float]:
    """Sorts checkpoints and epochs: by test accuracy, then by lower test loss.

    With several labels an image by their mean area under the ROC curve: the share of
    labels that are right says little where most are absent.

    A value that is not a number comes last; unsorted, it could displace the best.
    """
    accuracy, loss = metrics.get('test_accuracy'), metrics.get('test_loss')
    if metrics.get('test_mean_auroc') is not None:
        accuracy = metrics['test_mean_auroc']
    return (
        accuracy if _is_finite(accuracy) else -math.inf,
        -loss if _is_finite(loss) else -math.inf,
    )


def _is_finite(value):
    return isinstance(value, numbers.Real) and -math.inf < value < math.inf


def open_checkpoints(workdir: str) -> ocp.CheckpointManager:
    """Opens (and makes, where absent) the checkpoints of a workdir; close it after.

    Raises:
      UserError: the folder cannot be written.
    """
    policies = ocp.checkpoint_managers
    path = os.path.join(os.path.abspath(workdir), FOLDER)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(
            f'--workdir={workdir} cannot be written ({error.strerror}); choose another'
        ) from error
    return ocp.CheckpointManager(
        path,
        options=ocp.CheckpointManagerOptions(
            # best_fn alone makes orbax write the metrics; with max_to_keep it would
            # delete the latest checkpoint, which a resumed run needs.
            best_fn=rank,
            best_mode='max',
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(1),
                    policies.BestN(
                        get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        ),
    )


def save(
    manager: ocp.CheckpointManager,
    step: int,
    *,
    model: Any,
    train: Any,
    metadata: dict[str, Any],
    metrics: dict[str, float],
):
    """Saves in the background; the arrays may be donated once this returns.

    Args:
      model: `{'params', 'batch_stats'}`.
      train: what else a resumed run needs, a tree of arrays.
      metadata: what JSON can hold.
      metrics: `test_accuracy` and `test_loss` at least; only numbers are kept.
    """
    manager.save(
        step,
        args=ocp.args.Composite(
            model=ocp.args.StandardSave(model),
            train=ocp.args.StandardSave(train),
            metadata=ocp.args.JsonSave(metadata),
        ),
        # A numpy float would fail in the background and be reported one save late.
        metrics={
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, numbers.Real)
        },
    )


def has_checkpoint(workdir: str) -> bool:
    """True where the workdir holds a finished checkpoint."""
    return bool(_steps(workdir))


def _steps(workdir):
    folder = os.path.join(workdir, FOLDER)
    if not os.path.isdir(folder):
        return []
    # Unfinished ones carry another name until they are complete.
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


def find_step(workdir: str, which: str) -> int:
    """The step of the `latest` or the `best` checkpoint.

    Raises:
      UserError: there is none.
    """
    steps = _steps(workdir)
    if not steps:
        raise UserError(
            f'--workdir={workdir} holds no checkpoint; train there first, or name the '
            'folder of a run'
        )
    if which == 'latest':
        return steps[-1]
    return max(steps, key=lambda step: rank(load_json(workdir, step, 'metrics')))


def load_json(workdir: str, step: int, item: str) -> dict[str, Any]:
    """The `metadata` or the `metrics` saved at a step."""
    path = os.path.join(workdir, FOLDER, str(step), item, item)
    try:
        with open(path) as file:
            found = json.load(file)
        if not isinstance(found, dict):
            raise ValueError(f'{item} is no JSON object')
    except (OSError, ValueError, RecursionError) as error:
        raise _not_whole(workdir, step, error) from error
    return found


def _not_whole(workdir, step, error):
    place = os.path.join(workdir, FOLDER, str(step))
    reason = ' '.join(str(error).split())[:400] or type(error).__name__
    return UserError(
        f'the checkpoint {place} is not whole ({reason}); remove that folder to use an '
        'earlier one'
    )


def restore(
    manager: ocp.CheckpointManager, step: int, *, sharding, **items: Any
) -> dict[str, Any]:
    """Restores `model`, `train`, or both.

    Args:
      sharding: of every array restored; given always, since without one orbax takes
        the devices of the run that saved.
      **items: for each item a tree of arrays or ShapeDtypeStructs of its shapes.

    Returns:
      `{item: tree of arrays}`.

    Raises:
      UserError: the checkpoint is not whole, or holds other arrays.
    """

    def target(leaf):
        leaf = _as_shaped(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    args = {
        name: ocp.args.StandardRestore(jax.tree.map(target, tree))
        for name, tree in items.items()
    }
    _check_stored(manager.directory, step, items)
    try:
        if 'model' in items:
            _check_shapes(manager.directory, step, items['model'])
        restored = manager.restore(step, args=ocp.args.Composite(**args))
    # What orbax and tensorstore raise where the files are not those of these arrays.
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        workdir = os.path.dirname(manager.directory)
        raise _not_whole(workdir, step, error) from error
    return {name: restored[name] for name in items}


def _as_shaped(leaf):
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)


def _check_shapes(folder, step, model):
    """Raises where the model's arrays are others than those that are asked for.

    orbax would see it too, in the middle of reading.
    """
    stored = ocp.StandardCheckpointHandler().metadata(folder / str(step) / 'model').tree
    stored, wanted = map(traverse_util.flatten_dict, (stored, model))
    for path in stored.keys() | wanted.keys():
        sides = [tuple(np.shape(side.get(path))) for side in (stored, wanted)]
        if path not in stored or path not in wanted or sides[0] != sides[1]:
            raise ValueError(
                f'{"/".join(path)} is {sides[0]} there, and {sides[1]} in the model '
                'that the metadata tells of'
            )


def _check_stored(folder, step, items):
    """Raises where the files are far too small to hold the arrays.

    An array of which nothing is stored is read as zeros, whatever size it claims; so a
    few bytes of a stranger's could take all memory.
    """
    stored = sum(
        os.path.getsize(os.path.join(place, name))
        for place, _, names in os.walk(os.path.join(folder, str(step)))
        for name in names
    )
    wanted = sum(
        math.prod(np.shape(leaf)) * np.dtype(leaf.dtype).itemsize
        for leaf in map(_as_shaped, jax.tree.leaves(items))
    )
    if wanted > max(2**24, _EXPANSION * stored):
        raise _not_whole(
            os.path.dirname(folder),
            step,
            ValueError(f'its files of {stored} bytes cannot hold {wanted}'),
        )
