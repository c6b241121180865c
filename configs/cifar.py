"""The paper's small-image models on CIFAR-10 (arXiv 1608.06993, section 4.1, table 2).

  python launch.py --config=configs/cifar.py                 # bc_100_12+
  python launch.py --config=configs/cifar.py:40_12 --workdir=ckpt/40_12
  python launch.py --config=configs/cifar.py:quick --workdir=ckpt/quick

MODEL is `DEPTH_GROWTH` for the plain network and `bc_DEPTH_GROWTH` for DenseNet-BC;
with `+` at the end, images are shifted by up to 4 pixels and mirrored; without it,
dropout of 0.2 is used instead, as in the paper's columns C10+ and C10. Names in
VARIANTS (BC-L100k12) work as well. `,code` at the end follows the authors' Torch code
where it differs from the text: kernels initialized from the fan-out, dropout after
every convolution but the first, a stem of twice the growth rate for plain networks too.

Reads data/cifar10/{train,test}/CLASS/*; --config.data.source=tfds:cifar10 uses a data
set prepared by TFDS. SGD with Nesterov momentum 0.9 from 0.1, divided by 10 at 50% and
75% of 300 epochs, batch 64, weight decay 1e-4. docs/recipes.md has the paper's error
rates and the cost; configs/cifar100.py and configs/svhn.py are for the other columns.

`quick` is a small network on images that grow, in bfloat16. In float32, its accuracy on
the test images of CIFAR-10 was 86.2% after 13 epochs, in 23 minutes on two CPU cores.
On a CPU with AMX, bfloat16 takes two thirds of the time for the same accuracy
(docs/results.md).
"""

import re

from flax_densenet.configs import base


def get_config(model='bc_100_12+'):
    config = _make_quick() if model == 'quick' else make(model, 'quick')
    config.data.source = 'folder:data/cifar10'
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    return config


def make(model: str, *others: str):
    """The paper's recipe for `[bc_]DEPTH_GROWTH[+][,code]`, without the data.

    Args:
      others: further names that the caller accepts, for the error message.

    Raises:
      ValueError: the name is not of this form.
    """
    name, as_code = base.split_manner(model)
    name, augment = name.removesuffix('+'), name.endswith('+')
    found = re.fullmatch(r'(bc_)?(\d+)_(\d+)', name)
    if found:
        kind, depth, growth = found.groups()
        name = f'{"BC-" if kind else ""}L{depth}k{growth}'
    elif not re.match(r'((B|C|BC)-)?L\d|densenet|rdnet', name):
        others = ''.join(f', {other}' for other in others)
        raise ValueError(
            f'{model} is not known; use bc_100_12+, 40_12 or another depth and growth '
            f'rate{others}, or the name of a model such as BC-L100k12'
        )
    config = base.get_config()
    config.model.variant = name
    config.model.dropout_rate = 0.0 if augment else 0.2
    if as_code:
        config.model.initializer = 'he_fan_out'
        config.model.dropout_after = 'every_conv'
        config.model.stem_features = 2 * int(re.findall(r'k(\d+)$', name)[0])
    config.data.image_size = 32
    config.data.batch_size = 64
    config.data.augment = 'shift_flip' if augment else 'none'
    config.optimizer.name = 'sgd'
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = 'steps'
    config.optimizer.drop_at = (0.5, 0.75)
    config.optimizer.weight_decay = 1e-4
    config.train.epochs = 300
    return config


def _make_quick():
    """A narrow network with few layers at high resolution, and images that grow."""
    config = make('bc_40_16+')
    config.model.block_sizes = (2, 5, 10)
    config.model.dtype = 'bfloat16'
    config.data.size_schedule = ((0.24, 16), (0.78, 24))
    config.data.augment = 'flip'
    config.data.cache = 'memory'
    config.optimizer.schedule = 'one_cycle'
    config.optimizer.weight_decay = 5e-4
    config.train.epochs = 13
    return config
