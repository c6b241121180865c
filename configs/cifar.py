"""The paper's small-image models and recipe (section 4.1) on CIFAR-10.

  python launch.py --config=configs/cifar.py            # BC-L100k12
  python launch.py --config=configs/cifar.py:L40k12     # another of VARIANTS

reads data/cifar10/{train,test}/CLASS/*; --config.data.source=tfds:cifar10 takes a set
prepared by TFDS. SGD with Nesterov momentum from 0.1, divided by 10 at 50 % and 75 %
of 300 epochs, batch 64, weight decay 1e-4, shifts and mirroring. The paper reports
4.51 % error with BC-L100k12, 5.24 % with L40k12.
"""

from configs import base


def get_config(variant='BC-L100k12'):
    config = base.get_config()
    config.model.variant = variant
    config.data.source = 'folder:data/cifar10'
    config.data.image_size = 32
    config.data.batch_size = 64
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.augment = 'shift_flip'
    config.optimizer.name = 'sgd'
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = 'steps'
    config.optimizer.weight_decay = 1e-4
    config.train.epochs = 300
    return config
