"""Pages that can be shared: without pictures, file names and paths."""

import dataclasses
from typing import Any

from flax_densenet import settings
from flax_densenet.evaluation import results

# Settings that name files, folders or data sets, or contain parts of paths.
_PLACES = frozenset(
    ('init_from', 'data.source', 'data.labels', 'data.groups', 'data.tfds_dir')
    + ('data.subgroups', 'data.label_columns')
)
NAME = 'Report'  # replaces the name of a run, which is that of its folder


def is_private(config: dict[str, Any], chosen: bool | None = None) -> bool:
    """Whether a run's page leaves out what could identify people or places.

    Args:
      config: the saved config of the run.
      chosen: the user's current choice; None: as in the config.
    """
    if chosen is not None:
        return chosen
    return settings.from_saved(config).report.private


def measured(which: results.Measured) -> results.Measured:
    """The measured model, without paths."""
    kind = which.data.partition(':')[0]
    return dataclasses.replace(which, data=kind, weights=None)


def anonymous(found: results.Results) -> results.Results:
    """Results without the folder name of images that show none of the classes."""
    if found.others is None:
        return found
    others = dataclasses.replace(found.others, name='other data')
    return dataclasses.replace(found, others=others)


def hide(values: dict[str, Any], found: results.Results) -> dict[str, Any]:
    """The content of a page, without names of files and folders and without images.

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
    """Settings without those that name a location or contain a path."""
    return {
        name: value
        for name, value in fields.items()
        if name not in _PLACES and not _is_path(value)
    }


def _is_path(value):
    if isinstance(value, list | tuple):
        return any(map(_is_path, value))
    return isinstance(value, str) and ('/' in value or '\\' in value)
