"""Fine-tuning: which depths of the model train when, and how fast.

Settings count in the model's stages (`Network.stages`): the stem, each dense block with
what follows it, the head.

>>> from flax_densenet import create_model
>>> model = create_model('BC-L10k4', num_classes=3)
>>> rates = make_rates(model, freeze='denseblock1', layer_decay=0.5)
>>> [rates[name] for name in ('conv0', 'transition1', 'denseblock3', 'classifier')]
[0.0, 0.0, 0.5, 1.0]
"""

import dataclasses
import math

import jax
import optax

from flax_densenet import settings as settings_lib
from flax_densenet.errors import UserError
from flax_densenet.models import network


def count_frozen(module: network.Network, freeze: str) -> int:
    """The number of `Network.stages` that each value of `train.freeze` keeps fixed."""
    blocks = [f'denseblock{n + 1}' for n in range(len(module.block_sizes))]
    counts = {'none': 0, 'backbone': len(blocks) + 1}
    counts |= {name: number for number, name in enumerate(blocks, start=2)}
    if freeze not in counts:
        raise UserError(f'train.freeze={freeze} is not known; use {", ".join(counts)}')
    return counts[freeze]


def make_rates(
    module: network.Network,
    *,
    freeze: str = 'none',
    layer_decay: float = 1.0,
    head_multiplier: float = 1.0,
) -> dict[str, float]:
    """The factor on the learning rate for each part of the model; 0: frozen.

    Args:
      freeze: `none`, `backbone` (all but the classifier) or `denseblock<N>`: from the
        stem up to block N and its transition. The transition is included because its
        batch norm sees only frozen features. In the same way norm5 belongs to the last
        block, so freezing that block is the same as `backbone`.
      layer_decay: above 0, at most 1. A stage learns at this share of the next stage's
        rate: the head at 1, the last block at `layer_decay`, ..., the stem at
        `layer_decay ** (blocks + 1)`.
      head_multiplier: above 0; multiplies only the head's rate.

    Raises:
      UserError: a value is invalid.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(
            f'optimizer.layer_decay={layer_decay:g} must be above 0 and at most 1'
        )
    if not 0 < head_multiplier < math.inf:
        raise UserError(
            f'optimizer.head_multiplier={head_multiplier:g} must be above 0; '
            'train.freeze keeps parts as they are'
        )
    frozen, stages = count_frozen(module, freeze), module.stages()
    rates: dict[str, float] = {}
    for depth, names in enumerate(stages):
        rate = layer_decay ** (len(stages) - 1 - depth) if depth >= frozen else 0.0
        rates |= dict.fromkeys(names, rate)
    rates[stages[-1][0]] = head_multiplier
    return rates


@dataclasses.dataclass(frozen=True)
class Plan:
    """What trains when.

    Attributes:
      rates: see `make_rates`.
      frozen: number of `Network.stages` that stay fixed for the whole run.
      head_epochs: number of epochs at the start in which the head trains alone.
      stages: `Network.stages`.
    """

    rates: dict[str, float]
    frozen: int
    head_epochs: int
    stages: list[tuple[str, ...]]

    @property
    def head_only(self) -> bool:
        """Whether only the head trains, in all epochs."""
        return self.frozen == len(self.stages) - 1

    def frozen_in(self, epoch: int) -> int:
        """The number of frozen stages in an epoch, counted from 1."""
        return len(self.stages) - 1 if epoch <= self.head_epochs else self.frozen

    def __str__(self):
        parts = []
        if self.frozen:
            parts.append(
                f'frozen: {self.stages[0][0]} to {self.stages[self.frozen - 1][-1]}'
            )
        if self.head_epochs:
            parts.append(f'up to epoch {self.head_epochs} the classifier trains alone')
        return '; '.join(parts)


def plan_of(
    module: network.Network,
    settings: settings_lib.Settings,
    *,
    has_weights: bool = True,
) -> Plan:
    """`make_plan` with arguments from the settings."""
    train, optimizer = settings.train, settings.optimizer
    return make_plan(
        module,
        epochs=train.epochs,
        freeze=train.freeze,
        head_warmup_epochs=train.head_warmup_epochs,
        layer_decay=optimizer.layer_decay,
        head_multiplier=optimizer.head_multiplier,
        has_weights=has_weights,
    )


def make_plan(
    module: network.Network,
    *,
    epochs: int,
    freeze: str = 'none',
    head_warmup_epochs: int = 0,
    layer_decay: float = 1.0,
    head_multiplier: float = 1.0,
    has_weights: bool = True,
) -> Plan:
    """Checks and combines the settings that decide what trains.

    Args:
      has_weights: whether the parameters come from a checkpoint or `init_from`.

    Raises:
      UserError: a value is wrong, or random parameters would be frozen.
    """
    rates = make_rates(
        module, freeze=freeze, layer_decay=layer_decay, head_multiplier=head_multiplier
    )
    if not 0 <= head_warmup_epochs < epochs:
        raise UserError(
            f'train.head_warmup_epochs={head_warmup_epochs} must be 0 or above, and '
            f'below train.epochs={epochs}'
        )
    if not has_weights and (freeze != 'none' or head_warmup_epochs):
        field = f'head_warmup_epochs={head_warmup_epochs}'
        if freeze != 'none':
            field = f'freeze={freeze}'
        raise UserError(
            f'train.{field} would keep random parameters as they are; name trained '
            'ones with --config.init_from=PATH'
        )
    frozen, stages = count_frozen(module, freeze), module.stages()
    if frozen == len(stages) - 1:
        head_warmup_epochs = 0  # the head trains alone anyway
    return Plan(rates, frozen, head_warmup_epochs, stages)


def make_optimizer(make, rates: dict[str, float], *, head_steps: int = 0):
    """An optimizer for the parts with a rate above 0, each at its own rate.

    Args:
      make: function from a step of training to an optimizer that starts at this step.
      rates: from `make_rates`. The updates are multiplied by them, including decoupled
        weight decay, as with a smaller learning rate. The shape of the state depends
        only on which rates are 0.
      head_steps: number of steps in which only the head gets gradients.

    Returns:
      A GradientTransformation. `init` takes all parameters, `update` the gradients of
      the parts that train in this step.
    """
    trained = [name for name, rate in rates.items() if rate]
    optimizer = make(0)
    if head_steps:
        *rest, head = trained  # the head is the last stage, with one part
        optimizer = _head_first(head, rest, optimizer, make(head_steps))
    if all(rate == 1 for rate in rates.values()):
        return optimizer

    def init(params):
        return optimizer.init(_pick(params, trained))

    def update(gradients, state, params=None):
        updates, state = optimizer.update(gradients, state, params)
        updates = {name: _scale(tree, rates[name]) for name, tree in updates.items()}
        return updates, state

    return optax.GradientTransformation(init, update)


def _head_first(head, rest, of_head, of_rest):
    """Two optimizers; the one for the rest starts when it first gets gradients.

    If it counted the head's steps too, Adam would treat its moments, still near 0, as
    settled, and its first steps would be 0.1 / sqrt(0.001) = 3.2 times the learning
    rate.
    """

    def init(params):
        return {
            'head': of_head.init(_pick(params, [head])),
            'rest': of_rest.init(_pick(params, rest)),
        }

    def update(gradients, state, params):
        updates, state = {}, dict(state)
        groups = {'head': ([head], of_head), 'rest': (rest, of_rest)}
        for group, (names, optimizer) in groups.items():
            if names[0] in gradients:
                found, state[group] = optimizer.update(
                    _pick(gradients, names), state[group], _pick(params, names)
                )
                updates |= found
        return updates, state

    return optax.GradientTransformation(init, update)


def _pick(tree, names):
    return {name: tree[name] for name in names}


def _scale(tree, rate):
    if rate == 1:
        return tree
    return jax.tree.map(lambda leaf: leaf * rate, tree)
