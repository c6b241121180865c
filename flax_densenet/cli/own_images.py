"""Whether a run's own images are measured, and what a page of others is called."""

import os
import re
from typing import Any

from flax_densenet.cli import options, trained_model

_LONGEST = 40  # characters of the name of the data


def are_measured(
    invocation: options.Invocation, trained, *, source, trained_on: bool
) -> bool:
    """Whether the measured images are the run's own test images, with its labels.

    Otherwise the results of the run itself are kept (`result_files.keep_own`). True for
    weights that are not a run, which have no images of their own. False for an
    ensemble, whose own results are out of fold.

    Args:
      source: the data, a `dataset.Source`.
      trained_on: whether the model was trained on this data.
    """
    from flax_densenet.data import identity

    if trained.module.members > 1:
        return False
    if trained.step is None:
        return True
    metadata = trained.metadata
    given = {
        name: invocation.overrides[f'data.{name}']
        for name in trained_model.WHICH
        if f'data.{name}' in invocation.overrides
    }
    if not trained_on or not given:
        return trained_on
    if not (metadata.get('identity') or {}).get('names'):  # such as arrays
        rest = given.keys() - {'source', 'labels'}
        return all(metadata['data'].get(name) == given[name] for name in rest)
    has_own = identity.has_same_names(metadata, source)
    return has_own and not identity.has_other_labels(metadata, source)


def name_of(data, own: dict[str, Any]) -> str:
    """A name for other data in a path: that of its folder, file or data set.

    Args:
      data: the `settings.SourceSettings` of the data.
      own: the fields of the data that the model was trained on.
    """
    place = data.source.partition(':')[2] or data.source
    pieces = [place.split(',')[0].rstrip('/').rpartition('/')[2]]
    labels = os.path.basename(data.labels or '')
    if labels and labels != os.path.basename(own.get('labels') or ''):
        pieces.append(os.path.splitext(labels)[0])
    found = re.sub(r'[^\w.-]+', '-', '-'.join(pieces)).strip('-.')
    return found[:_LONGEST] or 'data'


def describe(workdir: str, names: list[str]) -> str:
    """The line that names the files that were written."""
    from flax_densenet.evaluation import result_files

    line = f'{", ".join(names[:-1])} and {names[-1]} are in {workdir}'
    kept = result_files.folder_of_own(workdir)
    if kept != workdir:
        line += f'; those of its own images are in {kept}'
    return line
