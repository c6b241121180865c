"""The TensorFlow variant of the birds recipe.

  python launch.py --config=configs/birds_tf.py

Differs from configs/birds.py where TensorFlow or the author's code differ: padding,
initial kernels, an L2 penalty, pixels from 0 to 255, batch norm's constants, batch 8,
Adam 1e-3.
"""

from flax_densenet.configs import birds


def get_config():
    config = birds.get_config()
    config.model.padding = 'same'
    config.model.initializer = 'glorot_normal'
    config.model.momentum = 0.99
    config.model.epsilon = 1e-3
    config.model.unbiased_variance = False
    config.data.mean = (0.0, 0.0, 0.0)
    config.data.std = (1 / 255, 1 / 255, 1 / 255)  # keeps pixels from 0 to 255
    config.data.batch_size = 8
    config.data.split_seed = 123
    config.optimizer.learning_rate = 1e-3
    config.optimizer.l2_penalty = 5e-5
    return config
