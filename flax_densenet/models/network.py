"""The base class of the networks: what they compute, and what they can report.

Code that needs to know something about a network asks it; nothing outside `models`
tests its class. If another package treats each kind of network differently (names of
arrays in PyTorch, an ONNX graph), it has a table with `Network.family` as keys.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from flax import linen as nn

from flax_densenet.errors import UserError


class Network(nn.Module):
    """A classifier of images `[N, H, W, C]`; create one with `create_model`.

    Subclasses define `setup`, `pyramid` and `pool`, and the methods below that raise
    `NotImplementedError`. Methods marked `nn.nowrap` are plain Python: they read the
    fields and need no variables.

    Attributes:
      num_classes: width of the classifier. With 0 there is no classifier, and the
        model returns the pooled features.
      family: the kind of network, a key in the tables of other packages.
      has_batch_norm: whether the images of a batch affect each other in training.
      architecture_fields: names of the fields that set the shapes of the variables.
      growth_field: name of the field with the growth rate or rates.
      head_fields: names of the fields that describe the heads of imported weights. They
        are not settings: training creates a head of one layer.
      members: number of networks, which is 1 except for an `ensemble`.
    """

    num_classes: int

    family: ClassVar[str]
    has_batch_norm: ClassVar[bool]
    architecture_fields: ClassVar[tuple[str, ...]]
    growth_field: ClassVar[str]
    head_fields: ClassVar[tuple[str, ...]] = ()
    members: ClassVar[int] = 1

    def __call__(self, x, train: bool = False, frozen: int = 0):
        """Maps normalized images `[N, H, W, C]` to logits `[N, num_classes]`.

        With `num_classes=0`, the result is the pooled features `[N, F]`. In training,
        pass `rngs={'dropout': key}` if there is dropout or stochastic depth, and
        `mutable=['batch_stats']` if there is batch norm.

        Args:
          x: normalized images, float `[N, H, W, C]`.
          train: use batch statistics, dropout and stochastic depth.
          frozen: how many of `stages`, counted from the stem, compute as in evaluation
            while the others train: batch norm uses its running statistics, which do not
            change, and nothing is dropped. It is an argument rather than a field
            because it describes the training, not the model.

        Raises:
          UserError: the images are smaller than `smallest_image_size`.
        """
        return self.head(self.features(x, train, frozen))

    def features(self, x, train: bool = False, frozen: int = 0):
        """Maps images to the last feature map, `[N, H', W', F]`."""
        return self.pyramid(x, train, frozen)[-1]

    def head(self, x):
        """Maps the output of `features` to logits `[N, num_classes]`."""
        return self.classify(self.pool(x))

    def classify(self, x):
        """Maps the output of `pool`, `[N, F]`, to logits `[N, num_classes]`."""
        return self.classifier(x) if self.num_classes else x

    def pool(self, x):
        """Maps the output of `features` to the classifier's input, float32 `[N, F]`."""
        raise NotImplementedError

    def pyramid(self, x, train: bool = False, frozen: int = 0) -> list[Any]:
        """Maps images to feature maps of several sizes, from fine to coarse."""
        raise NotImplementedError

    @nn.nowrap
    def stages(self) -> list[tuple[str, ...]]:
        """Names of the submodules in order of depth: stem, dense blocks, head.

        The stage of a block includes what follows it: the transition or, after the last
        block, the final norm.
        """
        raise NotImplementedError

    @nn.nowrap
    def plain(self) -> 'Network':
        """The same network made of submodules only, so that each can be inspected."""
        return self

    @nn.nowrap
    def pack(self, params) -> dict[str, Any]:
        """Collections of variables that make inference faster, from host parameters.

        With them, `apply` has no gradients. Only a network without batch norm has any;
        the others are folded.
        """
        return {}

    @nn.nowrap
    def smallest_image_size(self) -> int:
        """The smallest height and width in pixels that leave a pixel in the last block.

        29 for the ImageNet variants, 4 for the CIFAR variants, 32 for RDNet.
        """
        raise NotImplementedError

    @nn.nowrap
    def last_map_side(self, size: int) -> int:
        """Side length of the last feature map, for square images of side `size`."""
        raise NotImplementedError

    @nn.nowrap
    def check_image_size(self, size: Sequence[Any]):
        """Raises `UserError` if (height, width) is too small for the network."""
        raise NotImplementedError

    @nn.nowrap
    def takes_any_size(self) -> bool:
        """Whether the same arithmetic fits images of every height and width."""
        raise NotImplementedError

    @nn.nowrap
    def count_parameters(self, *, channels: int = 3) -> int:
        """The number of parameters, computed from the fields without creating any.

        >>> from flax_densenet import create_model
        >>> create_model('densenet121', num_classes=1000).count_parameters()
        7978856
        """
        raise NotImplementedError

    @nn.nowrap
    def check_fields(self):
        """Raises `UserError` for values that this kind of network cannot have.

        `factory.create_model` checks the types of all fields before calling it.
        """
        raise NotImplementedError

    @nn.nowrap
    def fields(self) -> dict[str, Any]:
        """`{name: value}` of the network's fields."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ('parent', 'name')
        }

    @nn.nowrap
    def has_usual_head(self) -> bool:
        """Whether the head is one layer after mean pooling, as in published weights."""
        return True

    @nn.nowrap
    def architecture(self) -> dict[str, Any]:
        """`{name: value}` of the fields in `architecture_fields`."""
        return {name: getattr(self, name) for name in self.architecture_fields}


def check_choices(model: Network, **choices: Sequence[str]):
    """Raises `UserError` if the value of a field is not one of its choices.

    Args:
      model: the network.
      **choices: the valid values of each field.
    """
    for name, valid in choices.items():
        value = getattr(model, name)
        if value not in valid:
            raise UserError(
                f'model.{name}={value} is not known; use {", ".join(valid)}'
            )


def check_ranges(model: Network, **valid: tuple[bool, str]):
    """Raises `UserError` for the first field with an invalid value.

    Args:
      model: the network.
      **valid: whether the value of each field is in its range, and the range in words.
    """
    for name, (is_valid, span) in valid.items():
        if not is_valid:
            raise UserError(f'model.{name}={getattr(model, name)} must be {span}')
