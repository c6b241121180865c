"""The paper's small-image models on CIFAR-100 (columns C100 and C100+ of table 2).

  python launch.py --config=configs/cifar100.py:bc_250_24+

The models and everything else are as in configs/cifar.py. Reads
data/cifar100/{train,test}/CLASS/*; --config.data.source=tfds:cifar100 uses a data set
prepared by TFDS.
"""

from flax_densenet.configs import cifar


def get_config(model='bc_100_12+'):
    config = cifar.make(model)
    config.data.source = 'folder:data/cifar100'
    config.data.mean = (0.5071, 0.4865, 0.4409)
    config.data.std = (0.2673, 0.2564, 0.2762)
    return config
