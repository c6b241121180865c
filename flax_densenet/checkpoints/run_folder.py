"""Reads the files about training in a run's folder, written by `fit.fit`."""

import dataclasses
import json
import os
from typing import Any

import numpy as np

from flax_densenet import settings
from flax_densenet.checkpoints import epoch_records
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.errors import UserError

METRICS_FILE, CONFIG_FILE = 'metrics.jsonl', 'config.json'
ENVIRONMENT_FILE = 'environment.json'


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The record of a run's training; empty for weights of other programs.

    Attributes:
      records: lines of `metrics.jsonl`.
      config: content of `config.json`.
      environment: content of `environment.json`.
    """

    name: str
    records: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]


def load_run(workdir: str) -> RunRecord:
    """Reads the existing files of a run's folder.

    Raises:
      UserError: one of them holds anything other than JSON objects.
    """
    records = []
    for line in _read(workdir, METRICS_FILE).splitlines():
        if line.endswith('}'):
            records.append(_parse(workdir, METRICS_FILE, line))
    config, environment = (
        _parse(workdir, name, _read(workdir, name) or '{}')
        for name in (CONFIG_FILE, ENVIRONMENT_FILE)
    )
    name = os.path.basename(os.path.abspath(workdir))
    return RunRecord(name, records, settings.with_current_names(config), environment)


def _parse(workdir, name, text):
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{os.path.join(workdir, name)} is not valid JSON ({error})'
        ) from error
    if not isinstance(found, dict):
        raise UserError(f'{os.path.join(workdir, name)} is not a JSON object')
    return found


def _read(workdir, name):
    try:
        with open(os.path.join(workdir, name), encoding='utf-8') as file:
            return file.read()
    except FileNotFoundError:
        return ''
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f'{os.path.join(workdir, name)} cannot be read ({error})'
        ) from (error)


def curves(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The columns that all records have, by name.

    `held_accuracy`, `held_loss` and `held_mean_auroc` are for the images that choose
    the best epoch: validation or test images, with `part` `val` or `test`.
    """
    if not records:
        return None
    found = {
        name: [record.get(name) for record in records]
        for name in ('epoch', 'train_accuracy', 'train_loss', 'learning_rate')
    } | {
        f'held_{name}': [epoch_records.get(record, name) for record in records]
        for name in ('accuracy', 'loss', 'mean_auroc')
    }
    best = max(records, key=checkpoint_reader.rank)
    return {
        **{name: values for name, values in found.items() if None not in values},
        'best': best['epoch'],
        'part': epoch_records.part_of(records[-1]),
    }


def flatten(config: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """`{'model.variant': ...}` from nested fields."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            fields |= flatten(value, f'{prefix}{name}.')
        else:
            fields[prefix + name] = value
    return fields


def median(records: list[dict[str, Any]], name: str) -> float:
    """The values of a column."""
    return float(np.median([record[name] for record in records]))
