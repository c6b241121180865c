"""Summarizes a network: output shapes, parameters and multiply-adds by block."""

import jax
import numpy as np
from flax import linen as nn

from flax_densenet.models import initialization, network


def count_model(module: network.Network, image_shape):
    """Counts output shape, parameters and multiply-adds of each submodule, in order.

    Args:
      module: the network.
      image_shape: (H, W, C).

    Returns:
      `[(name, output shape [H, W, C] or [C], parameters, multiply-adds), ...]`.
      Multiply-adds are for one image, in convolutions and the classifier.
    """
    # The plain layers are submodules, which can be intercepted.
    module = module.plain()
    parts: dict[str, list] = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        path = context.module.path
        if context.method_name == '__call__' and path:
            part = parts.setdefault(path[0], [None, 0, 0])
            # A block returns its features and their statistics.
            part[0] = (output[0] if isinstance(output, tuple) else output).shape[1:]
            own = context.module.variables.get('params', {})
            arrays = [leaf for leaf in own.values() if not isinstance(leaf, dict)]
            part[1] += sum(leaf.size for leaf in arrays)
            if 'kernel' in own:
                kernel = own['kernel'].shape
                positions = np.prod(output.shape[1:-1], dtype=np.int64)
                part[2] += int(np.prod(kernel, dtype=np.int64) * positions)
        return output

    variables = initialization.variable_shapes(module, channels=image_shape[-1])
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(module.apply, variables, image)
    return [(name, *part) for name, part in parts.items()]


def format_summary(module: network.Network, image_shape, *, rates=None) -> str:
    """A table with the output shape, parameters and GMACs of each block, and totals.

    Args:
      module: the network.
      image_shape: (H, W, C).
      rates: the result of `finetune.make_rates`. If some are not 1, the table has a
        column of learning rates and a line with the number of trained parameters.
    """
    rows = count_model(module, image_shape)
    shape = 'x'.join(map(str, image_shape))
    rates = rates or {}
    tuned = any(rate != 1 for rate in rates.values())
    lines = [
        f'{"part":<14}{"output":>16}{"parameters":>14}{"GMACs":>10}'
        + (f'{"learning rate":>15}' if tuned else ''),
        f'{"image":<14}{shape:>16}',
    ]
    for name, output, parameters, operations in rows:
        output = 'x'.join(map(str, output))
        line = f'{name:<14}{output:>16}{parameters:>14,}{operations / 1e9:>10.3f}'
        if tuned:
            rate = f'x {rates[name]:.4g}' if rates[name] else 'frozen'
            line += f'{rate:>15}'
        lines.append(line)
    parameters, operations = (sum(row[i] for row in rows) for i in (2, 3))
    lines.append(f'{"total":<14}{"":>16}{parameters:>14,}{operations / 1e9:>10.3f}')
    if tuned:
        trained = sum(row[2] for row in rows if rates[row[0]])
        lines.append(f'{"trained":<14}{"":>16}{trained:>14,}')
    return '\n'.join(lines)
