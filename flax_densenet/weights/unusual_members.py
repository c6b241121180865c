"""The score of unusual images of an ensemble, from the scores of its members.

Each member scores an image with its own statistics, in units of the images that were
held out from it: 0 for a median one, 1 for its limit. The score of the ensemble is the
median of these scores (the lower one, if there is an even number), so an image is
unusual if it is above the limits of a majority of the members.

With M members, a new image is above the limit of each with a probability of at most
1 - share. It is above the limit of the ensemble with a probability of at most
M / (M // 2 + 1) * (1 - share), whatever the distribution, since the expected number of
members that it exceeds is at most M * (1 - share). Members that agree come close to
1 - share, others stay below it.
"""

import dataclasses
from typing import Any

import numpy as np

from flax_densenet.weights import calibration as calibration_lib
from flax_densenet.weights import decision_entry
from flax_densenet.weights import unusual as unusual_lib


@dataclasses.dataclass(frozen=True, eq=False)
class MembersUnusual(decision_entry.Entry):
    """A fitted score of an ensemble (`evaluation.unusual_folds.fit`).

    Attributes:
      members: the score of each member, with the limit from its held-out images.
      calibrations: the calibration in the classifier of each member, or None.
    """

    members: tuple[unusual_lib.Unusual, ...]
    calibrations: tuple[calibration_lib.Calibration | None, ...]

    def check(self, classes: int):
        """Raises `ValueError` with what is wrong."""
        if len(self.members) < 2 or len(self.calibrations) != len(self.members):
            raise ValueError('it needs two or more members with a calibration each')
        for member, calibration in zip(self.members, self.calibrations, strict=True):
            member.check(classes)
            if calibration is not None:
                calibration.check(classes)
        first = self.members[0]
        for name in ('method', 'share', 'several', 'feature_size'):
            if any(getattr(one, name) != getattr(first, name) for one in self.members):
                raise ValueError(f'members differ in {name}')

    @property
    def member_count(self) -> int:
        """The number of members, M."""
        return len(self.members)

    is_flat = False  # was never fitted on mean probabilities

    @property
    def method(self) -> str:
        """One of `unusual.METHODS`."""
        return self.members[0].method

    @property
    def share(self) -> float:
        """The share of held-out images below the limit of each member."""
        return self.members[0].share

    @property
    def train_count(self) -> int:
        """The largest number of training images of a member's fit."""
        return max(member.train_count for member in self.members)

    @property
    def val_count(self) -> int:
        """The number of images that set the limits, each that of one member."""
        return sum(member.val_count for member in self.members)

    @property
    def feature_size(self) -> int | None:
        """The number of features of all members; None if the score needs none."""
        size = self.members[0].feature_size
        return None if size is None else size * len(self.members)

    def arrays(self) -> dict[str, Any]:
        """All arrays of the score, to pass to compiled programs as arguments."""
        pairs = enumerate(self.members, start=1)
        return {str(number): member.arrays() for number, member in pairs}

    def with_arrays(self, arrays) -> 'MembersUnusual':
        """The same score with other arrays, such as traced ones."""
        pairs = enumerate(self.members, start=1)
        members = tuple(one.with_arrays(arrays[str(number)]) for number, one in pairs)
        return dataclasses.replace(self, members=members)

    def score(self, features, logits, *, xp=np):
        """The reported score, float32 `[N]`: unusual above 1.

        Args:
          features: pooled features of all members, side by side, `[N, M * F]`.
          logits: `[N, M, C]`, with the calibration of each member.
          xp: `numpy`, or `jax.numpy` for JAX arrays.
        """
        count = len(self.members)
        rows, size = features.shape
        parts = features.reshape(rows, count, size // count)
        scores = [
            member.score(parts[:, place], self._raw(logits[:, place], place, xp), xp=xp)
            for place, member in enumerate(self.members)
        ]
        return xp.sort(xp.stack(scores), axis=0)[self.place]

    @property
    def place(self) -> int:
        """The place of the reported score among those of the members, from 0."""
        return (len(self.members) - 1) // 2

    def _raw(self, logits, place, xp):
        """The logits of a member before its calibration."""
        found = self.calibrations[place]
        return logits if found is None else found.revert(logits, xp=xp)

    def to_files(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The members for the JSON file, and their arrays by `NUMBER.FIELD`."""
        plain: dict[str, Any] = {'members': [], 'calibrations': []}
        arrays: dict[str, np.ndarray] = {}
        for number, member in enumerate(self.members, start=1):
            fields, own = member.to_files()
            plain['members'].append(fields)
            arrays |= {f'{number}.{name}': array for name, array in own.items()}
        for one in self.calibrations:
            plain['calibrations'].append(None if one is None else one.to_files()[0])
        return plain, arrays

    @classmethod
    def from_files(cls, plain: Any, arrays: dict[str, np.ndarray]) -> 'MembersUnusual':
        """Restores it from the result of `to_files`; raises `ValueError`."""
        given = plain.get('members'), plain.get('calibrations')
        if not all(isinstance(rows, list) for rows in given):
            raise ValueError('members and calibrations must be lists')
        members = []
        for number, fields in enumerate(given[0], start=1):
            start = f'{number}.'
            names = [name for name in arrays if name.startswith(start)]
            own = {name.removeprefix(start): arrays[name] for name in names}
            members.append(unusual_lib.Unusual.from_files(fields, own))
        calibrations = [
            None if one is None else calibration_lib.Calibration.from_files(one, {})
            for one in given[1]
        ]
        return cls(tuple(members), tuple(calibrations))


def from_files(
    plain: Any, arrays: dict[str, np.ndarray]
) -> unusual_lib.Unusual | MembersUnusual:
    """Restores the score of one network or of an ensemble; raises `ValueError`."""
    if isinstance(plain, dict) and 'members' in plain:
        return MembersUnusual.from_files(plain, arrays)
    return unusual_lib.Unusual.from_files(plain, arrays)
