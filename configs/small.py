"""A small network for a few hundred photographs, without trained weights, in minutes.

  python launch.py --config=configs/small.py:PATH
  python launch.py sweep --config=configs/small.py:PATH --sweep=train.seed=0,1,2

with PATH/CLASS/* (a fifth is split off for the test) or PATH/{train,val}/CLASS/*.
DenseNet-BC with 0.3 million parameters at 96 pixels; DenseNet-121 would have eight
million to learn from so few images. Computes in bfloat16: on a CPU with AMX twice as
fast as float32, and as accurate (docs/results.md). Uses random crops and mirroring, and
Adam with the one-cycle schedule. Trained weights (configs/finetune.py) reach more if
they are available.
"""

from flax_densenet.configs import base


def get_config(path='data/photos'):
    config = base.get_config()
    config.model.variant = 'densenet121'
    config.model.growth_rate = 16
    config.model.block_sizes = (2, 4, 6, 4)
    config.model.dtype = 'bfloat16'
    config.data.source = f'folder:{path}'
    config.data.image_size = 96
    config.data.resize = 'crop'
    config.data.batch_size = 16
    config.data.augment = 'crop_flip'
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = 'one_cycle'
    config.train.epochs = 60
    return config
