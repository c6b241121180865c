"""The paper's small-image models on SVHN (last column of table 2).

  python launch.py --config=configs/svhn.py:bc_100_12

The models are as in configs/cifar.py. The data is the 604,388 images of the splits
train and extra of TFDS' svhn_cropped, in the range 0 to 1; dropout 0.2 and no
augmentation; 40 epochs. (The paper holds out 6,000 images to choose the epoch; here the
result is the last epoch, as for CIFAR.) --config.data.source=folder:PATH with
--config.data.tfds_train= uses PATH/{train,test}/CLASS/*.
"""

from flax_densenet.configs import cifar


def get_config(model='bc_100_12'):
    config = cifar.make(model)
    config.data.source = 'tfds:svhn_cropped'
    config.data.tfds_train = 'train+extra'
    config.data.mean = (0.0, 0.0, 0.0)
    config.data.std = (1.0, 1.0, 1.0)
    config.train.epochs = 40
    return config
