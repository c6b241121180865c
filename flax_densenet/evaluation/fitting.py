"""Fits how decisions follow from a model's outputs, on the selection images.

Each function in `FITTERS` makes one entry of `decisions.Decisions` from the outputs for
these images: the calibration, thresholds, and so on.

    chosen = selection.select(trained, source, batch_size=32)
    made = fitting.fit(chosen, selection.Rules(threshold='youden'))
    fitting.save('ckpt/birds', made)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.distributed import processes
from flax_densenet.evaluation import calibrating, choosing, conformal, unusual
from flax_densenet.evaluation import selection as selection_lib
from flax_densenet.weights import decision_entry
from flax_densenet.weights import decisions as decisions_lib

# Functions by the name of their entry, called in this order. Each makes the entry from
# the selection, the rules and what was fitted before; None if there is nothing to keep.
Fitter = Callable[
    [selection_lib.Selection, selection_lib.Rules, decisions_lib.Decisions],
    decision_entry.Entry | None,
]
FITTERS: dict[str, Fitter] = {
    'calibration': calibrating.fit,
    'thresholds': choosing.fit,
    'unusual': unusual.fit_entry,
    'sets': conformal.fit_entry,
}


def fit(
    selection: selection_lib.Selection, rules: selection_lib.Rules
) -> decisions_lib.Decisions:
    """Fits all entries and logs the results.

    Raises:
      UserError: a rule does not fit the model.
    """
    trained = selection.trained
    made = decisions_lib.Decisions(
        step=trained.step,
        model=decisions_lib.fingerprint(trained.variables),
        classes=trained.module.num_classes,
        data=selection.data,
        part=selection.part,
        count=len(selection.labels),
    )
    for name, fitter in FITTERS.items():
        entry = fitter(selection, rules, made)
        if entry is not None:
            field: dict[str, Any] = {name: entry}
            made = dataclasses.replace(made, **field)
    return made


def save(folder: str, made: decisions_lib.Decisions):
    """Writes the decisions into the folder of a run; every host has to call it.

    Raises:
      UserError: the folder cannot be written.
    """
    if mesh_lib.is_writer():
        decisions_lib.save(folder, made)
    processes.barrier('decisions')  # all hosts must find them
