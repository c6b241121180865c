"""The recipe to reproduce: four kinds of birds, DenseNet-121 from scratch.

  python launch.py --config=configs/birds.py

with photographs in data/bird_photos/CLASS/* (565 of 4 classes in the original): 80% for
training, 224x224, ImageNet's mean and std, batch 4, cross-entropy, Adam 1e-4, 40
epochs, best model by test accuracy. The photographs are not part of this project;
docs/results.md has results on hymenoptera, a data set of similar size.
"""

from flax_densenet.configs import base


def get_config():
    config = base.get_config()
    config.data.source = 'folder:data/bird_photos'
    config.data.batch_size = 4
    config.optimizer.learning_rate = 1e-4
    config.train.epochs = 40
    return config
