"""Trained weights as they are, and a new classifier for your own photographs.

  python launch.py --config=configs/linear_probe.py:PATH \
      --config.data.source=folder:photos

PATH is a file of weights or the folder of a run; the model and the preparation of the
images come with it. The features of all images are computed once, in the time that
evaluating them takes; then an epoch takes some 0.2 ms an image on a CPU. A quick answer
to how far given weights carry, and often good with few images; configs/finetune.py goes
further.
"""

from flax_densenet.configs import base


def get_config(path=''):
    config = base.get_config()
    config.init_from = path
    config.data.source = 'folder:data/photos'
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = 'cosine'
    config.train.epochs = 50
    config.train.freeze = 'backbone'
    return config
