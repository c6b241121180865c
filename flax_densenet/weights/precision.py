"""Chooses the precision in which a trained model computes: float32 or bfloat16.

bfloat16 keeps 8 significant bits instead of 24 and is several times faster on
processors with instructions for it. `auto` uses it only if `eval --precision=auto` or
`report --precision=auto` has measured that it costs at most 0.1 percentage points of
accuracy. The measurement for one checkpoint is stored in `precision.json` in the folder
of the run.
"""

import dataclasses
import json
import os
from typing import Any

from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.errors import UserError
from flax_densenet.models import folded
from flax_densenet.system import atomic
from flax_densenet.weights.trained import Trained

CHOICES = ('auto', 'bfloat16', 'float32')
FILE = 'precision.json'
MARGIN = 0.001  # of accuracy, as a fraction


def check(precision: str | None):
    """Raises `UserError` unless it is None or one of CHOICES."""
    if precision not in (None, *CHOICES):
        raise UserError(
            f'--precision={precision} is not known; use {", ".join(CHOICES)}'
        )


def resolve(trained: Trained, path: str | None, precision: str | None) -> Trained:
    """Sets the precision of a model; adds a line to its notes.

    Args:
      path: where the model was loaded from.
      precision: one of CHOICES. None works like `auto`, but adds no line if nothing
        changes.

    Raises:
      UserError: the precision is unknown.
    """
    check(precision)
    if precision is None and trained.precision:
        return trained  # it was chosen before
    if precision in ('float32', 'bfloat16'):
        return to(trained, precision)
    record = load(trained, path)
    reason: str | None
    if record is None:
        reason = 'bfloat16 has not been measured; eval --precision=auto does that'
    elif not is_accurate(record):
        reason = f'bfloat16 is less accurate: {describe(record)}'
    else:
        reason = folded.why_bfloat16_is_slow(trained.module)
    if record is not None and reason is None:
        trained = to(trained, 'bfloat16')
        trained.notes['precision'] = (
            f'computing in bfloat16, measured as accurate ({describe(record)}); '
            '--precision=float32 changes that'
        )
    elif precision:
        trained.notes['precision'] = f'computing in {trained.module.dtype}: {reason}'
    elif trained.module.dtype == 'bfloat16':  # as it was trained
        slow = folded.why_bfloat16_is_slow(trained.module)
        if slow:
            trained.notes['precision'] = (
                f'computing in bfloat16, slower here than float32: {slow}; '
                '--precision=float32 changes that'
            )
    return trained


def to(trained: Trained, precision: str) -> Trained:
    """Makes the model compute in float32 or bfloat16.

    Its notes get a line if bfloat16 is not faster on this machine.
    """
    module = trained.module.clone(dtype=precision)
    reason = folded.why_bfloat16_is_slow(module) if precision == 'bfloat16' else None
    if reason:
        trained.notes['precision'] = f'bfloat16 is slower here than float32: {reason}'
    return dataclasses.replace(trained, module=module, precision=precision)


def is_accurate(record: dict[str, Any]) -> bool:
    """Whether bfloat16 costs at most 0.1 percentage points of accuracy."""
    return record['bfloat16'] >= record['float32'] - MARGIN


def describe(record: dict[str, Any]) -> str:
    """`accuracy 93.30%, float32 93.28%`"""
    ours, theirs = (100 * record[name] for name in ('bfloat16', 'float32'))
    return f'{record["metric"]} {ours:.2f}%, float32 {theirs:.2f}%'


def make_record(trained: Trained, metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Makes the record of a measurement.

    Args:
      metrics: `{precision: metrics}` from `results.Results`, for the same images in
        float32 and bfloat16.
    """
    areas = [found['macro'].get('auroc') for found in metrics.values()]
    # With several labels per image, the accuracy hardly changes with anything.
    several = bool(trained.metadata.get('multi_label')) and None not in areas
    values = {
        name: found['macro']['auroc'] if several else found['accuracy']
        for name, found in metrics.items()
    }
    about = {'step': trained.step, 'count': metrics['float32']['count']}
    return about | {'metric': 'AUROC' if several else 'accuracy'} | values


def save(path: str, record: dict[str, Any]):
    """Writes the record into the folder of a run; does nothing for other weights."""
    if record['step'] is None or not mesh_lib.is_writer():
        return
    try:
        with atomic.replacing(os.path.join(path, FILE)) as file:
            json.dump(record, file, indent=1)
            file.write('\n')
    except OSError as error:
        raise UserError(
            f'{path}/{FILE} cannot be written ({error.strerror}); use '
            '--precision=float32 or bfloat16'
        ) from error


def load(trained: Trained, path: str | None) -> dict[str, Any] | None:
    """The record for this checkpoint; None if there is none.

    Raises:
      UserError: the file exists, but `save` did not write it.
    """
    if path is not None and trained.module.members > 1:
        return _of_members(trained, path)
    if trained.step is None or path is None:
        return None
    return _read(path, trained.step)


def _of_members(trained, path):
    """The mean record of the members of an ensemble; None if one has no record."""
    members = trained.metadata.get('members') or [['', None]]
    records = [_read(os.path.join(path, name), step) for name, step in members]
    if None in records:
        return None
    total = sum(record['count'] for record in records)
    means = {
        name: sum(record[name] * record['count'] for record in records) / total
        for name in ('float32', 'bfloat16')
    }
    return records[0] | {'step': None, 'count': total} | means


def _read(path, step):
    name = os.path.join(path, FILE)
    try:
        with open(name, encoding='utf-8') as file:
            record = json.load(file)
        complete = all(
            isinstance(record[key], float | int) for key in ('float32', 'bfloat16')
        )
        if not complete or not isinstance(record['metric'], str):
            raise ValueError('numbers expected')
        return record if record['step'] == step else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{name} cannot be read ({error}); delete it, or run eval --precision=auto'
        ) from error
