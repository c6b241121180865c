"""RDNet, a DenseNet of 2024 (Kim et al., "DenseNets Reloaded", arXiv 2403.19588).

  python launch.py --config=configs/rdnet.py              # rdnet_tiny, ImageNet
  python launch.py --config=configs/rdnet.py:rdnet_small  # or rdnet_base, rdnet_large

reads data/imagenet/{train,val}/CLASS/*; --config.data.source=folder:PHOTOS uses your
own images. To fine-tune published weights, a file that timm saved (rdnet_tiny.nv_in1k):

  python launch.py --config=configs/finetune.py:model.safetensors \
      --config.data.source=folder:photos --config.model.drop_path_rate=0.1

The authors' settings: 300 epochs of ImageNet in batches of 512, AdamW at 1e-3 with a
cosine schedule, 20 epochs of warm-up, weight decay 0.05, stochastic depth of 0.15,
0.35, 0.4 and 0.5 for tiny, small, base and large, at 224x224. They report 82.8, 83.7,
84.4 and 84.8% accuracy on ImageNet's validation images. They also use the following,
which is not set here: RandAugment, mixup 0.8, CutMix 1, label smoothing 0.1, random
erasing 0.25, color jitter, weight decay on kernels only, and a final learning rate of
1e-6 instead of 0. Not trained here: the gradient of four images took 1.4 s on two CPU
cores, so GPUs are needed.
"""

from flax_densenet.configs import base

_DROP_PATH = {
    'rdnet_tiny': 0.15,
    'rdnet_small': 0.35,
    'rdnet_base': 0.4,
    'rdnet_large': 0.5,
}


def get_config(variant='rdnet_tiny'):
    config = base.get_config()
    config.model.variant = variant
    config.model.drop_path_rate = _DROP_PATH.get(variant, 0.0)
    config.data.source = 'folder:data/imagenet'
    config.data.batch_size = 512
    config.data.resize = 'crop'
    config.data.crop_fraction = 0.9
    config.data.interpolation = 'bicubic'
    config.data.augment = 'crop_flip'
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = 'cosine'
    config.optimizer.warmup_epochs = 20.0
    config.optimizer.weight_decay = 0.05
    config.train.epochs = 300
    return config
