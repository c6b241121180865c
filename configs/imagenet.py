"""The paper's ImageNet models and recipe (arXiv 1608.06993, section 4.1, table 3).

  python launch.py --config=configs/imagenet.py:121     # or 161, 169, 201, 264

SGD with Nesterov momentum 0.9 from 0.1, divided by 10 after epochs 30 and 60 of 90, in
batches of 256, weight decay 1e-4; random crops and mirroring in training, a center crop
of 224 pixels from 256 in the test. `:121,code` draws kernels from the fan-out, as the
authors' Torch code does; that code also jitters colors and lighting. Reads
data/imagenet/{train,val}/CLASS/*; --config.data.source=packed:FOLDER reads what the
command pack made of it, tfds:imagenet2012 a data set prepared by TFDS. If a batch does
not fit in memory, use --config.train.accumulate_steps=4. On several GPUs, batch norm
uses the statistics of all 256 images; the authors' code used those of each GPU, as
--config.model.batch_norm_group=-1 does.

docs/recipes.md has the paper's error rates. Training takes several GPU-days and was not
done here.
"""

from flax_densenet.configs import base


def get_config(model='121'):
    depth, as_code = base.split_manner(model)
    config = base.get_config()
    config.model.variant = f'densenet{depth.removeprefix("densenet")}'
    if as_code:
        config.model.initializer = 'he_fan_out'
    config.data.source = 'folder:data/imagenet'
    config.data.image_size = 224
    config.data.resize = 'crop'
    config.data.crop_fraction = 0.875
    config.data.batch_size = 256
    config.data.augment = 'crop_flip'
    config.optimizer.name = 'sgd'
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = 'steps'
    config.optimizer.drop_at = (30 / 90, 60 / 90)
    config.optimizer.weight_decay = 1e-4
    config.train.epochs = 90
    return config
