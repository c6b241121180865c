"""Pages that can be passed on: without pictures, file names and paths."""

import dataclasses
from typing import Any

from flax_densenet import settings
from flax_densenet.evaluation import results

# Settings that name files, folders or data sets, or that hold parts of paths.
_PLACES = frozenset(
    ('init_from', 'data.source', 'data.labels', 'data.groups', 'data.tfds_dir')
    + ('data.subgroups', 'data.label_columns')
)
NAME = 'Report'  # in place of a run's, which is that of a folder


def is_private(config: dict[str, Any], chosen: bool | None = None) -> bool:
    """Whether a run's page leaves out what could tell whose images these are.

    Args:
      config: of the run, as it was saved.
      chosen: what the user says now; None: as in the config.
    """
    if chosen is not None:
        return chosen
    return settings.from_saved(config).report.private


def measured(which: results.Measured) -> results.Measured:
    """Which model was measured, without paths."""
    kind = which.data.partition(':')[0]
    return dataclasses.replace(which, data=kind, weights=None)


def anonymous(found: results.Results) -> results.Results:
    """Results without the name of the folder of images that are none of the classes."""
    if found.others is None:
        return found
    others = dataclasses.replace(found.others, name='other data')
    return dataclasses.replace(found, others=others)


def hide(values: dict[str, Any], found: results.Results) -> dict[str, Any]:
    """What a page says, without names of files and folders and without images.

    Args:
      values: of the page's template.
      found: what it shows.
    """
    folds, fitted = values['folds'], values['fitted']
    if found.decisions is not None:
        fitted = fitted.replace(f' of {found.decisions.data}', '')
    if folds:
        folds = folds | {'rows': [row | {'link': ''} for row in folds['rows']]}
    return values | {
        'folds': folds,
        'fitted': fitted,
        'name': NAME,
        'data_name': values['data_name'].partition(':')[0],
        'samples': [],
        'steps': [],
        'command_line': None,
        **{name: hide_fields(values[name]) for name in ('fields', 'changed')},
    }


def hide_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that name a place or hold a path."""
    return {
        name: value
        for name, value in fields.items()
        if name not in _PLACES and not _is_path(value)
    }


def _is_path(value):
    if isinstance(value, list | tuple):
        return any(map(_is_path, value))
    return isinstance(value, str) and ('/' in value or '\\' in value)
