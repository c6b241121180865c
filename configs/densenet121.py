"""DenseNet-121, Adam 1e-4, 40 epochs: the default recipe.

  python launch.py --config=configs/densenet121.py

trains on scikit-learn's handwritten digits; --config.data.source=folder:PATH uses your
own images.
"""

from flax_densenet.configs import base


def get_config():
    config = base.get_config()
    config.model.variant = 'densenet121'
    return config
