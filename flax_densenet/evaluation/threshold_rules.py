"""Rules that choose a threshold of probabilities, as `train.threshold` names them.

    youden              the largest sum of sensitivity and specificity
    f1                  the largest F1
    sensitivity=0.95    the largest specificity with at least this sensitivity
    specificity=0.9     the largest sensitivity with at least this specificity
    cost=5:1            the lowest cost, if a false negative costs 5 and a false
                        positive 1

>>> import numpy as np
>>> true = np.array([False, False, True, True])
>>> probability = np.array([0.1, 0.4, 0.6, 0.9])
>>> round(choose(parse('youden'), true, probability), 3)
0.5
"""

import dataclasses
import math

import numpy as np

from flax_densenet.errors import UserError

_KNOWN = 'youden, f1, sensitivity=SHARE, specificity=SHARE or cost=FN:FP'


@dataclasses.dataclass(frozen=True)
class Rule:
    """A parsed rule.

    Attributes:
      name: `youden`, `f1`, `sensitivity`, `specificity` or `cost`.
      numbers: the share, or the costs of a false negative and a false positive.
    """

    name: str
    numbers: tuple[float, ...] = ()


def parse(text: str, field: str = 'train.threshold') -> Rule:
    """Reads a rule.

    >>> parse('cost=5:1')
    Rule(name='cost', numbers=(5.0, 1.0))

    Args:
      field: the setting, for error messages.

    Raises:
      UserError: there is no such rule.
    """
    name, equals, value = text.strip().partition('=')
    try:
        numbers = tuple(float(part) for part in value.split(':')) if equals else ()
    except ValueError:
        numbers = (math.nan,)
    good = {
        'youden': not equals,
        'f1': not equals,
        'sensitivity': len(numbers) == 1 and 0 < numbers[0] <= 1,
        'specificity': len(numbers) == 1 and 0 < numbers[0] <= 1,
        'cost': len(numbers) == 2 and all(0 < n < math.inf for n in numbers),
    }
    if not good.get(name):
        raise UserError(f'{field}={text} is not known; use {_KNOWN}')
    return Rule(name, numbers)


def choose(rule: Rule, true: np.ndarray, probability: np.ndarray) -> float:
    """Chooses the threshold: an image is positive if its probability is above it.

    The threshold is the midpoint between two of the probabilities. If several are
    equally good, it is the highest.

    Args:
      true: bool `[N]`, with both values.
      probability: `[N]`.
    """
    values, positive, negative = _count(true, probability)
    # Counts above each of `values`, from none to all images.
    tp, fp = np.cumsum(positive), np.cumsum(negative)
    tp, fp = (np.concatenate([[0], counts]) for counts in (tp, fp))
    place = _find(rule, tp, fp)
    edges = np.concatenate([[1.0], values, [0.0]])
    return float((edges[place] + edges[place + 1]) / 2)


def _count(true, probability):
    """Distinct probabilities from high to low; positives and negatives at each."""
    values, where = np.unique(-np.asarray(probability, np.float64), return_inverse=True)
    positive, negative = (
        np.bincount(where.ravel(), part, len(values)) for part in (true, ~true)
    )
    return -values, positive, negative


def _find(rule, tp, fp):
    """The number of distinct probabilities that count as positive."""
    sensitivity, specificity = tp / tp[-1], 1 - fp / fp[-1]
    if rule.name == 'youden':
        return _first_best(sensitivity + specificity)
    if rule.name == 'f1':
        return _first_best(2 * tp / (tp + fp + tp[-1]))
    if rule.name == 'cost':
        of_negative, of_positive = rule.numbers
        return _first_best(-(of_negative * (tp[-1] - tp) + of_positive * fp))
    if rule.name == 'sensitivity':
        return int(np.flatnonzero(sensitivity >= rule.numbers[0] - 1e-12)[0])
    enough = specificity >= rule.numbers[0] - 1e-12
    return _first_best(np.where(enough, sensitivity, -1))


def _first_best(values):
    # Sums of the same shares in another order differ by rounding errors.
    return int(np.flatnonzero(values >= values.max() - 1e-12)[0])
