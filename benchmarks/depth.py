"""Growth with depth: one dense block of 6 to 48 layers, forward and backward.

  python -m benchmarks.depth

Growth 32, 64 channels in, batch 8 of 28x28: seconds, and the temporary memory that the
compiled program asks for. Prints JSON; the exponent is the slope in log-log.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from flax_densenet import create_model, init_variables

LAYERS = (6, 12, 24, 48)


def make(layers, **fields):
    """A compiled gradient of one block, and its arguments."""
    module = create_model(
        'densenet121',
        num_classes=0,
        stem='cifar',
        stem_features=64,
        block_sizes=(layers,),
        **fields,
    )
    variables = init_variables(module, 0)
    images = jax.random.normal(jax.random.key(0), (8, 28, 28, 3))

    def loss(params):
        pooled, _ = module.apply(
            {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
        )
        return jnp.square(pooled).sum()

    params = jax.device_put(variables['params'])
    return jax.jit(jax.grad(loss)).lower(params).compile(), params


def _seconds(compiled, params):
    start = time.perf_counter()
    jax.block_until_ready(compiled(params))
    return time.perf_counter() - start


def main(rounds=5):
    result = {'layers': LAYERS}
    kinds = {'ours': {}, 'linen': {'fast': False}}
    programs = {
        (name, layers): make(layers, **fields)
        for name, fields in kinds.items()
        for layers in LAYERS
    }
    times = {key: [] for key in programs}
    for program in programs.values():
        _seconds(*program)
    for _ in range(rounds):
        for key, program in programs.items():
            times[key].append(_seconds(*program))
    for name in kinds:
        own = {
            'seconds': [statistics.median(times[name, n]) for n in LAYERS],
            'temporary_mib': [
                programs[name, n][0].memory_analysis().temp_size_in_bytes / 2**20
                for n in LAYERS
            ],
        }
        for figure in list(own):
            slope = np.polyfit(np.log(LAYERS), np.log(own[figure]), 1)[0]
            own[figure + '_exponent'] = round(float(slope), 3)
        result[name] = own
    print(json.dumps(result))


if __name__ == '__main__':
    main()
