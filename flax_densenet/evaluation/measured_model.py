"""Which model was measured on which data: the first fields of `eval.json`."""

import dataclasses
import re
from typing import Any

from flax_densenet.models import tta as tta_lib

# Fields of `Measured` that are stored only if they differ from these values.
_LATER: dict[str, Any] = {
    **{'precision': '', 'members': 0, 'out_of_fold': False},
    'own': True,
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Which model was measured on which data: the first fields of `eval.json`.

    Attributes:
      data: the data source, as in `config.data.source`.
      epoch: epoch of the checkpoint, counted from 1; None if the model is not a
        checkpoint.
      step: step of the checkpoint, or None.
      tta: test-time augmentation, as in `config.data.tta`.
      weights: path of the weights if the model is not a checkpoint, else None.
      precision: the precision, if it was chosen; empty for the model's own.
      members: number of networks in an ensemble, else 0.
      out_of_fold: whether each image was predicted by the member that was not trained
        on it.
      own: whether these are the run's own test images (or, of an ensemble, its
        out-of-fold images).
    """

    data: str
    epoch: int | None
    step: int | None
    tta: str = 'none'
    weights: str | None = None
    precision: str = ''
    members: int = 0
    out_of_fold: bool = False
    own: bool = True

    @property
    def model(self) -> str:
        """The model in words, for a line of text."""
        if self.out_of_fold:
            which = f'out-of-fold predictions of {self.members} models'
        elif self.members:
            which = f'ensemble of {self.members} models'
        elif self.step is not None:
            which = f'best checkpoint: epoch {self.epoch}, step {self.step}'
        else:
            which = f'weights of {self.weights}' if self.weights else 'imported weights'
        which += tta_lib.describe(self.tta)
        return f'{which}, in {self.precision}' if self.precision else which

    def to_file(self) -> dict[str, Any]:
        """The fields for `eval.json`."""
        found = dataclasses.asdict(self)
        return {k: v for k, v in found.items() if k not in _LATER or v != _LATER[k]}


def from_file(found: dict[str, Any]) -> Measured:
    """Reads the fields from `eval.json`, also from earlier versions.

    Raises:
      KeyError, TypeError, ValueError, IndexError: the file is not one that `eval`
      writes.
    """
    if 'version' not in found:
        return _read_version_1(found)
    known: dict[str, Any] = _LATER | found
    names = [field.name for field in dataclasses.fields(Measured)]
    return Measured(**{name: known[name] for name in names})


# Version 1 described the model in a sentence.
_CHECKPOINT_1 = re.compile(r'best checkpoint: epoch (\d+), step (\d+)(, .*)?')
_WEIGHTS_1 = re.compile(r'(?:weights of (.*?)|imported weights)(, each image seen .*)?')


def _read_version_1(found):
    data, model = found['data'], found['model']
    if match := _CHECKPOINT_1.fullmatch(model):
        epoch, step, mirrored = match.groups()
        return Measured(data, int(epoch), int(step), 'flip' if mirrored else 'none')
    if match := _WEIGHTS_1.fullmatch(model):
        weights, mirrored = match.groups()
        return Measured(data, None, None, 'flip' if mirrored else 'none', weights)
    raise ValueError(f'model={model}')
