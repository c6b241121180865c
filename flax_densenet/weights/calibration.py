"""Calibrates probabilities: changes logits before the softmax or the sigmoids.

    calibrated = scale * logits + bias

A temperature T (Guo et al., arXiv 1706.04599) is a scale of 1 / T. Platt scaling has a
scale and a bias for each label. Both are linear, so exported files include them in the
last layer of the classifier.

>>> import numpy as np
>>> half = Calibration(('temperature',), (0.5,), (0.0,))
>>> half.apply(np.array([[2.0, 0.0]])).tolist()
[[1.0, 0.0]]
"""

import dataclasses
from typing import Any

import numpy as np

from flax_densenet.models import layers
from flax_densenet.weights import decision_entry

METHODS = ('none', 'temperature', 'platt')


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration(decision_entry.Entry):
    """How logits are calibrated.

    Attributes:
      methods: one of METHODS: a single one for all classes, or one for each label.
      scale: a single factor for all classes, or one for each label.
      bias: as many numbers as `scale`.
      notes: lines about what was fitted and what was not changed.
    """

    methods: tuple[str, ...]
    scale: tuple[float, ...]
    bias: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def check(self, classes: int):
        """Raises `ValueError` with what is wrong."""
        if len(self.methods) not in (1, classes):
            raise ValueError(f'methods has {len(self.methods)} values')
        if not len(self.methods) == len(self.scale) == len(self.bias):
            raise ValueError('methods, scale and bias differ in length')
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f'{method!r:.60} is not a method')
        # Beyond these limits, every probability would be 0, 1 or 0.5.
        if not all(1e-3 <= value <= 1e3 for value in self.scale):
            raise ValueError('scale is out of range')
        if not all(abs(value) <= 1e3 for value in self.bias):
            raise ValueError('bias is out of range')

    @property
    def changes(self) -> bool:
        """Whether it changes any logits; False if no method helped."""
        return any(method != 'none' for method in self.methods)

    @property
    def temperature(self) -> float | None:
        """The temperature for all classes; None if each label has its own values."""
        return 1 / self.scale[0] if len(self.scale) == 1 else None

    def apply(self, logits, *, xp=np):
        """Calibrated logits `[..., C]`, with the dtype of `logits`.

        Args:
          logits: `[..., C]`, floating point.
          xp: `numpy`, or `jax.numpy` for JAX arrays.
        """
        logits = xp.asarray(logits)
        scale, bias = self._numbers_for(logits)
        return logits * scale + bias

    def revert(self, logits, *, xp=np):
        """The inverse of `apply`."""
        logits = xp.asarray(logits)
        scale, bias = self._numbers_for(logits)
        return (logits - bias) / scale

    def _numbers_for(self, logits):
        shape = (1,) * (logits.ndim - 1) + (-1,)
        return (
            np.array(numbers, logits.dtype).reshape(shape)
            for numbers in (self.scale, self.bias)
        )

    def fold(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Variables with the calibration in the last layer of the classifier.

        Args:
          variables: `{'params', 'batch_stats'}` as numpy or JAX arrays.
        """
        return _with_last_layer(variables, self.scale, self.bias)

    def unfold(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The inverse of `fold`."""
        scale = [1 / value for value in self.scale]
        bias = [-b * s for b, s in zip(self.bias, scale, strict=True)]
        return _with_last_layer(variables, scale, bias)


def _with_last_layer(variables, scale, bias):
    params = dict(variables['params'])
    classifier = params['classifier']
    *others, last = layers.linear_layers(classifier)
    scale, bias = np.float64(scale), np.float64(bias)
    kernel, old = (np.asarray(last[name]) for name in ('kernel', 'bias'))
    last = dict(last) | {
        'kernel': (kernel * scale).astype(kernel.dtype),
        'bias': (old * scale + bias).astype(old.dtype),
    }
    params['classifier'] = (
        dict(classifier) | {f'layer{len(others) + 1}': last} if others else last
    )
    return dict(variables) | {'params': params}


def describe(calibration: Calibration) -> str:
    """How probabilities are calibrated, in words.

    >>> describe(Calibration(('temperature',), (0.5,), (0.0,)))
    'temperature 2.00'
    """
    if not calibration.changes:
        return 'not calibrated'
    if calibration.temperature is not None:
        return f'temperature {calibration.temperature:.2f}'
    counts = [
        f'{calibration.methods.count(method)} {word}'
        for method, word in (
            ('platt', 'with Platt scaling'),
            ('temperature', 'with a temperature'),
            ('none', 'not changed'),
        )
        if method in calibration.methods
    ]
    return f'{len(calibration.methods)} labels: {", ".join(counts)}'
