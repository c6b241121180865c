"""Thresholds of probabilities above which a label or a class counts as positive."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from flax_densenet.weights import decision_entry

_LONGEST = 100  # characters of a rule


@dataclasses.dataclass(frozen=True, eq=False)
class Thresholds(decision_entry.Entry):
    """Thresholds of calibrated probabilities, one for each label or class.

    If images have one of two classes, only the positive class has a threshold. A class
    is positive if its probability is above its threshold.

    Attributes:
      rule: how the thresholds were chosen, as in `train.threshold`.
      values: from 0 to 1 for each class; None for a class without a threshold.
      notes: lines about what was chosen and what was not changed.
    """

    rule: str
    values: tuple[float | None, ...]
    notes: tuple[str, ...] = ()

    def check(self, classes: int):
        """Raises `ValueError` with what is wrong."""
        if len(self.values) != classes:
            raise ValueError(f'there are {len(self.values)} values')
        if not all(value is None or 0 <= value <= 1 for value in self.values):
            raise ValueError('a value is not from 0 to 1')
        try:
            describe_rule(self.rule[:_LONGEST])
        except ValueError:
            raise ValueError(f'rule is {self.rule!r:.60}') from None


def describe_rule(rule: str) -> str:
    """Completes "chosen for ..."; the setting `train.threshold` lists the rules.

    >>> describe_rule('sensitivity=0.95')
    'the largest specificity with a sensitivity of at least 95%'
    """
    name, _, value = rule.partition('=')
    if name in ('sensitivity', 'specificity'):
        other = {'sensitivity': 'specificity', 'specificity': 'sensitivity'}[name]
        share = f'{100 * float(value):.6g}%'
        return f'the largest {other} with a {name} of at least {share}'
    if name == 'cost':
        negative, positive = value.split(':')
        return (
            f'the lowest cost, where a false negative costs {negative} and a false '
            f'positive {positive}'
        )
    return {
        'youden': "the largest sum of sensitivity and specificity (Youden's index)",
        'f1': 'the largest F1',
    }.get(name, rule)


def is_positive(probabilities, values: Sequence[float | None]) -> np.ndarray:
    """Which classes are above their thresholds: bool `[..., C]`.

    Args:
      probabilities: `[..., C]`.
      values: C thresholds; a class without one is never positive.
    """
    limits = [2.0 if value is None else value for value in values]
    return np.asarray(probabilities) > np.array(limits)
