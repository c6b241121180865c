"""The files with the results of a measurement, and where a run's own are.

`eval.json` and `predictions.csv` in the folder of a run are of the last measurement. If
that is of other images than the run's own, its own results are in the subfolder `OWN`.
"""

import json
import os
from typing import Any

from flax_densenet.errors import UserError
from flax_densenet.evaluation import measured_model

EVAL_FILE, PREDICTIONS_FILE = 'eval.json', 'predictions.csv'
OWN = 'own'


def keep_own(folder: str, measured: measured_model.Measured):
    """Moves a run's own results to `OWN` before those of other images replace them."""
    if measured.own:
        return
    try:
        before = load(folder)
    except UserError:  # nothing that can be used
        return
    if before is None or not before[0].own:
        return
    kept = os.path.join(folder, OWN)
    os.makedirs(kept, exist_ok=True)
    for name in (PREDICTIONS_FILE, EVAL_FILE):  # complete once eval.json is there
        if os.path.isfile(os.path.join(folder, name)):
            os.replace(os.path.join(folder, name), os.path.join(kept, name))


def clear_kept(folder: str, measured: measured_model.Measured):
    """Removes what `keep_own` kept, once a run's own images are measured again."""
    kept = os.path.join(folder, OWN)
    if not measured.own or not os.path.isdir(kept):
        return
    for name in (EVAL_FILE, PREDICTIONS_FILE):
        path = os.path.join(kept, name)
        if os.path.isfile(path):
            os.unlink(path)
    if not os.listdir(kept):
        os.rmdir(kept)


def folder_of_own(folder: str) -> str:
    """The folder with the results of a run's own images: `OWN` in it, or itself."""
    kept = os.path.join(folder, OWN)
    return kept if os.path.isfile(os.path.join(kept, EVAL_FILE)) else folder


def load(folder: str) -> tuple[measured_model.Measured, dict[str, Any]] | None:
    """Reads `eval.json` as written by `results.save`, also by earlier versions.

    Returns:
      The model and data that were measured, and all fields of the file; None if there
      is no such file.

    Raises:
      UserError: the file cannot be read or is not one that `results.save` writes.
    """
    path = os.path.join(folder, EVAL_FILE)
    try:
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path} cannot be read ({error}); run eval again') from error
    try:
        return measured_model.from_file(found), found
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f'{path} is not a file that eval writes ({error!r}); run eval again'
        ) from error
