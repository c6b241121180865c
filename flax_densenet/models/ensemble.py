"""Several networks of the same kind as one, whose probabilities are averaged.

An `Ensemble` is used like a `Network`: `apply` takes normalized images, feature maps or
pooled features. Its variables are those of its members, stacked along a first axis. The
members are computed one after the other, so a program is compiled for one of them.

The logits of an ensemble are those of the mean probabilities. A softmax leaves the sum
of logits open: it is chosen so that the gradient of a logit is the mean of the members'
gradients where these agree, which is what maps of evidence need.

>>> import jax.numpy as jnp
>>> logits = mean_logits(jnp.array([[[2.0, 0.0]], [[0.0, 2.0]]]), 'softmax')
>>> bool(jnp.allclose(logits[:, 0], logits[:, 1]))
True
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from flax_densenet.models import tta
from flax_densenet.models.network import Network


def mean_logits(logits, outputs: str):
    """Logits `[N, C]` of the mean probabilities.

    Args:
      logits: of the members, `[M, N, C]`.
      outputs: `softmax`, `sigmoid`, or `none` for the mean of the logits.
    """
    if outputs == 'none':
        return logits.mean(0)
    mean = tta.mean_logits(logits, multi_label=outputs == 'sigmoid')
    if outputs == 'softmax':
        mean = mean + logsumexp(logits, axis=-1, keepdims=True).mean(0)
    return mean


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Networks that differ in their variables alone.

    What is not defined here is that of `member`: its fields, methods and sizes.

    Attributes:
      member: the network of each of them.
      members: how many there are, M.
      outputs: what makes probabilities of a member's logits, see `mean_logits`.
    """

    member: Network
    members: int
    outputs: str

    family: ClassVar[str] = 'ensemble'

    def __getattr__(self, name):
        if name.startswith('__') or name == 'member':  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.member, name)

    def clone(self, **changes) -> 'Ensemble':
        """The ensemble with other fields of its members."""
        return dataclasses.replace(self, member=self.member.clone(**changes))

    def has_usual_head(self) -> bool:
        """False: no published network has the heads of several."""
        return False

    def count_parameters(self, *, channels: int = 3) -> int:
        """Number of parameters of all members."""
        return self.members * self.member.count_parameters(channels=channels)

    def apply(
        self, variables, x, *, method='__call__', mutable: Any = False, **options
    ):
        """`Network.apply` of all members.

        Args:
          variables: of `stack`.
          x: images; for the methods `head` and `pool` maps of `features`, for
            `classify` what `pool` returns.
          method: one of these, or `features`.

        Returns:
          Logits; maps and pooled features have those of all members side by side.
        """
        if mutable:
            raise ValueError('an ensemble is not trained')
        options = {'method': method, **options}
        if method not in ('head', 'pool', 'classify'):
            found = jax.lax.map(
                lambda one: self.member.apply(one, x, **options), variables
            )
        else:
            parts = split(x, self.members)
            # Few operations, whose gradients maps need.
            found = jax.vmap(lambda one, part: self.member.apply(one, part, **options))(
                variables, parts
            )
        if method in ('features', 'pool'):
            return join(found)
        return mean_logits(found.astype(jnp.float32), self.outputs)


def stack(variables: Sequence[Any]):
    """Variables of an ensemble from those of its members."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *variables)


def unstack(variables) -> list[Any]:
    """The inverse of `stack`."""
    count = len(jax.tree.leaves(variables)[0])
    return [_take(variables, number) for number in range(count)]


def _take(variables, number):
    return jax.tree.map(lambda array: array[number], variables)


def join(found):
    """Features of the members, `[M, N, ..., F]`, side by side: `[N, ..., M * F]`."""
    found = jnp.moveaxis(found, 0, -2)
    return found.reshape(*found.shape[:-2], -1)


def split(features, members: int):
    """The inverse of `join`."""
    found = features.reshape(*features.shape[:-1], members, -1)
    return jnp.moveaxis(found, -2, 0)
