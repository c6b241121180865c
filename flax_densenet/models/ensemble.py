"""Ensembles: several networks of the same kind that average their probabilities.

An `Ensemble` is used like a `Network`: `apply` takes normalized images, feature maps or
pooled features. Its variables are those of its members, stacked along a first axis. The
members are computed one after the other, so only one of them is compiled.

The logits of an ensemble are the logits of the mean probabilities. With a softmax, they
are only defined up to a constant. It is chosen so that the gradient of a logit is the
mean gradient of the members where these agree, as class activation maps need.

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
      logits: logits of the members, `[M, N, C]`.
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
    """Networks that differ only in their variables.

    Anything not defined here comes from `member`: its fields, methods and sizes.

    Attributes:
      member: the network of every member.
      members: number of members, M.
      outputs: the function from logits to probabilities, see `mean_logits`.
    """

    member: Network
    members: int
    outputs: str

    family: ClassVar[str] = 'ensemble'

    def __getattr__(self, name):
        if name.startswith('__') or name == 'member':  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.member, name)

    def clone(self, **changes) -> 'Ensemble':
        """The ensemble with changed fields in all members."""
        return dataclasses.replace(self, member=self.member.clone(**changes))

    def has_usual_head(self) -> bool:
        """False, since published networks have only one head."""
        return False

    def count_parameters(self, *, channels: int = 3) -> int:
        """The number of parameters of all members."""
        return self.members * self.member.count_parameters(channels=channels)

    def apply(
        self, variables, x, *, method='__call__', mutable: Any = False, **options
    ):
        """Applies all members, like `Network.apply`.

        Args:
          variables: the result of `stack`.
          x: images; feature maps for the methods `head` and `pool`, pooled features for
            `classify`.
          method: one of these methods, or `features`; or `classify_each`, to classify
            the pooled features without averaging.

        Returns:
          Logits `[N, num_classes]`, of `classify_each` `[N, M, num_classes]`; or
          feature maps or pooled features of all members, concatenated along the last
          axis.
        """
        if mutable:
            raise ValueError('an ensemble cannot be trained')
        each = method == 'classify_each'
        options = {'method': 'classify' if each else method, **options}
        if method not in ('head', 'pool', 'classify', 'classify_each'):
            found = jax.lax.map(
                lambda one: self.member.apply(one, x, **options), variables
            )
        else:
            parts = split(x, self.members)
            # Only a few operations, and maps need their gradients.
            found = jax.vmap(lambda one, part: self.member.apply(one, part, **options))(
                variables, parts
            )
        if method in ('features', 'pool'):
            return join(found)
        if each:
            return jnp.moveaxis(found.astype(jnp.float32), 0, 1)
        return mean_logits(found.astype(jnp.float32), self.outputs)


def stack(variables: Sequence[Any]):
    """The variables of an ensemble, from those of its members."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *variables)


def unstack(variables) -> list[Any]:
    """The inverse of `stack`."""
    count = len(jax.tree.leaves(variables)[0])
    return [_take(variables, number) for number in range(count)]


def _take(variables, number):
    return jax.tree.map(lambda array: array[number], variables)


def join(found):
    """Concatenates the members' features `[M, N, ..., F]`: `[N, ..., M * F]`."""
    found = jnp.moveaxis(found, 0, -2)
    return found.reshape(*found.shape[:-2], -1)


def split(features, members: int):
    """The inverse of `join`."""
    found = features.reshape(*features.shape[:-1], members, -1)
    return jnp.moveaxis(found, -2, 0)
