"""Resuming a run: whether its data is still the same, and what else has changed."""

import os
from collections.abc import Mapping
from typing import Any

from flax_densenet import settings as settings_lib
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import run_folder
from flax_densenet.data import dataset, identity
from flax_densenet.errors import UserError
from flax_densenet.system import paths

# They change how things are computed, not the results; `checks` and `check_data` cover
# the other settings.
_NO_MATTER = (
    *('data.threads', 'data.workers', 'data.cache', 'data.cache_limit_gib'),
    *('data.source', 'data.labels', 'data.tfds_dir', 'init_from'),
    *('model.fast', 'model.kernel', 'model.remat'),
    *('train.report', 'train.tensorboard', 'train.checkpoint_every'),
    *('train.unusual', 'train.unusual_share', 'train.unusual_images'),
    *('train.calibrate', 'train.threshold', 'train.positive_class'),
    'train.cache_features',
)
# Replacing an image can move its neighbors across the boundary of a random split.
_FEW = 2
# Settings that the schedule of the learning rate depends on.
_SCHEDULE = (
    *('train.epochs', 'optimizer.learning_rate', 'optimizer.schedule'),
    *('optimizer.drop_at', 'optimizer.warmup_epochs'),
)


def check(
    workdir: str, source: dataset.Source, settings: settings_lib.Settings
) -> list[str]:
    """Describes what differs from the last start of a run, in a line each.

    Args:
      settings: with all open fields filled in.

    Raises:
      UserError: the run cannot resume with this data.
    """
    latest = checkpoint_reader.find_latest(workdir)
    saved = checkpoint_reader.load_json(workdir, latest, 'metadata')
    lines = (
        check_data(workdir, saved, source, settings.data.labels),
        describe_changes(find_changes(workdir, settings)),
    )
    return [line for line in lines if line]


def check_data(
    workdir: str, saved: Mapping[str, Any], source: dataset.Source, labels: str
) -> str:
    """Compares the images with those of the checkpoint.

    Data that moved counts as the same data, and so does data in which some images were
    replaced. With another number of images, the epochs would not match.

    Args:
      saved: metadata of the checkpoint.
      labels: `data.labels`.

    Returns:
      A line about the differences; empty if there are none.

    Raises:
      UserError: the run cannot resume with these images.
    """
    before = saved['data'].get('source') or ''
    new_run = (
        f'start another run from its weights: --config.init_from={workdir} and another '
        '--workdir'
    )
    relation = identity.compare(saved, source)
    same_names = identity.has_same_names(saved, source)
    moved = not _is_same_place(before, source.name)
    if (
        not relation.own
        and not same_names
        and not _may_have_moved(saved, source, before)
    ):
        if not moved:
            raise UserError(
                f'--workdir={workdir} holds a run on other images than those of '
                f'data.source={source.name} now: none has the same name and content as '
                f'before; bring the data back as it was, or {new_run}'
            )
        raise UserError(
            f'--workdir={workdir} holds a run with data.source={before}, not '
            f'{source.name}, and these are other images; give the data of the run (if '
            f'it moved to another place, link to it from there), or {new_run}'
        )
    counts = saved.get('images')
    if counts and not identity.has_same_counts(counts, source):
        *first, last = map(str, identity.count(source).values())
        raise UserError(
            f'--workdir={workdir} holds a run on {identity.describe_counts(counts)}, '
            f'data.source={source.name} has {", ".join(first)} and {last}: images were '
            f'added or removed; bring the data back as it was, or {new_run}'
        )
    _check_labels(workdir, saved['data'].get('labels') or '', labels, new_run)
    changed = identity.find_changed_part(saved, source)
    if changed > _FEW:
        raise UserError(
            f'--workdir={workdir} holds a run with another split of data.source='
            f'{source.name}: {changed} of the training images that the checkpoint '
            'remembers would be test images; give the same data.groups, data.split, '
            f'data.duplicates and table, or {new_run}'
        )
    if identity.has_other_labels(saved, source):
        return (
            f'warning: data.source={source.name} has other labels for the images than '
            'before; the run continues with the current ones'
        )
    if moved:
        return f'the data has moved from {before} to {source.name}; the run continues'
    known = (saved.get('identity') or {}).get('names')
    if known and (not same_names or not relation.own):
        return (
            f'data.source={source.name} has as many images as before, but not the '
            'same ones; the run continues with the current ones'
            + (f'; {changed} training images are test images now' if changed else '')
        )
    if known and relation.line:  # the same names
        return f'{relation.line}; the run continues with the current ones'
    return ''


def _is_same_place(before, now):
    return before == now or paths.real_source(before) == paths.real_source(now)


def _may_have_moved(saved, source, before):
    """Compares numbers and path, for a checkpoint without a record of its images."""
    if (saved.get('identity') or {}).get('names'):
        return False
    kind, _, name = before.partition(':')
    gone = kind in paths.SOURCE_KINDS and not os.path.exists(paths.expand(name))
    same_kind = kind == source.name.partition(':')[0]
    counts = saved.get('images') or {}
    return gone and same_kind and identity.has_same_counts(counts, source)


def _check_labels(workdir, before, now, new_run):
    """Raises for another table of labels, unless it only moved."""
    if before == now:
        return
    if before and now:
        one, other = (os.path.realpath(paths.expand(path)) for path in (before, now))
        if one == other or not os.path.exists(one):
            return
    raise UserError(
        f'--workdir={workdir} holds a run with data.labels={before}, not {now}; give '
        f'the table of the run, or {new_run}'
    )


def find_changes(
    workdir: str, settings: settings_lib.Settings
) -> dict[str, tuple[Any, Any]]:
    """Relevant settings that differ from the last start, by name.

    Returns:
      The previous and the current value of each.
    """
    before = run_folder.flatten(run_folder.load_run(workdir).config)
    now = settings_lib.flatten(settings)
    return {
        name: (before[name], value)
        for name, value in now.items()
        if name in before
        and name not in _NO_MATTER
        and _plain(before[name]) != _plain(value)
    }


def _plain(value):
    """As JSON stores it, with lists for tuples."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def describe_changes(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """The line about settings that changed since the last start; empty for none."""
    if not changes:
        return ''
    shown = ', '.join(
        f'{name}={_plain(now)} (before {_plain(before)})'
        for name, (before, now) in changes.items()
    )
    line = f'resuming with other settings: {shown}'
    if any(name in _SCHEDULE for name in changes):
        line += (
            '; epoch numbers continue, and the learning rate follows the new schedule'
        )
    return line


def explain_other_state(
    workdir: str, step: int, changes: Mapping[str, tuple[Any, Any]]
) -> UserError:
    """The error if a checkpoint's arrays do not fit the settings."""
    named = {
        name: pair
        for name, pair in changes.items()
        if name.startswith(('optimizer.', 'train.', 'model.')) and name not in _SCHEDULE
    }
    why = f'those of {run_folder.CONFIG_FILE}'
    if named:
        why = ', '.join(f'{name}={_plain(old)}' for name, (old, _) in named.items())
    return UserError(
        f'--workdir={workdir}: the state of step {step} does not fit these settings; '
        f'resume with {why}, or start another run from its weights: '
        f'--config.init_from={workdir} and another --workdir'
    )
