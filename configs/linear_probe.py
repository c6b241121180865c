"""Trains only a new classifier for your own photographs, on fixed trained weights.

  python launch.py --config=configs/linear_probe.py:PATH \
      --config.data.source=folder:photos

PATH is a file of weights or the folder of a run; the model and the preparation of the
images come with it. The features of all images are computed once, which takes as long
as evaluating them; then an epoch takes about 0.2 ms per image on a CPU. This quickly
shows how useful the weights are, and is often good with few images; configs/finetune.py
goes further.
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
