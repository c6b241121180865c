"""Fine-tunes trained weights on your own photographs, with a new classifier.

  python launch.py --config=configs/finetune.py:densenet121 \
      --config.data.source=folder:photos
  python launch.py --config=configs/finetune.py:PATH --config.data.source=folder:photos

With the name of published weights (`python launch.py weights` lists them), or with
PATH,auto, the batch size, learning rates, epochs, augmentation and frozen layers are
chosen by the number of training images, and printed; `train photos --pretrained` does
the same. PATH is a file of weights or the folder of a run; the model and the
preparation of the images come with it.

Without `,auto`, the settings below apply: the classifier trains alone for the first
epoch, so that its random start does not disturb the rest; then everything trains, lower
blocks more slowly. The recipe is meant for a few hundred to a few thousand images. An
epoch costs as much as one from scratch, but far fewer epochs are needed.

With few images, --config.train.freeze=denseblock3 keeps the first three blocks fixed
and takes about a third of the time; configs/linear_probe.py trains the classifier
alone.
"""

from flax_densenet.configs import base


def get_config(path=''):
    config = base.get_config()
    config.init_from = path.removesuffix(',auto')
    config.data.source = 'folder:data/photos'
    config.data.batch_size = 16
    config.data.augment = 'crop_flip'
    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = 'cosine'
    config.optimizer.layer_decay = 0.8
    config.train.epochs = 20
    config.train.head_warmup_epochs = 1
    if path.endswith(',auto') or _is_name(path):
        # Each of the other values leaves its field open.
        config.train.by_count = True
        config.data.batch_size = 0
        config.data.policy = 'auto'
        config.optimizer.learning_rate = 0.0
        config.optimizer.layer_decay = 0.0
        config.train.epochs = 0
        config.train.head_warmup_epochs = -1
        config.train.patience = -1
        config.train.freeze = 'auto'
    return config


def _is_name(path):
    from flax_densenet.weights import published

    return published.is_name(path)
