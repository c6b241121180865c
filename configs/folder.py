"""Your own photographs: a folder of images for each class.

  python launch.py --config=configs/folder.py:PATH

with PATH/CLASS/* (a fifth is split off for the test) or PATH/{train,val}/CLASS/*. Uses
random crops and mirroring and a cosine schedule with a warm-up; for a few hundred to a
few thousand images.
"""

from flax_densenet.configs import base


def get_config(path='data/photos'):
    config = base.get_config()
    config.data.source = f'folder:{path}'
    config.data.batch_size = 16
    config.data.augment = 'crop_flip'
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = 'cosine'
    config.optimizer.warmup_epochs = 2.0
    return config
