"""Several findings per image, as in CheXNet (arXiv 1711.05225) for chest X-rays.

  python launch.py --config=configs/chexnet.py:X-RAYS --config.data.labels=TABLE.csv \\
      --config.init_from=densenet121.pth

X-RAYS is a folder of images, TABLE.csv has their labels: the NIH's
`Data_Entry_2017.csv` unchanged, or a column of 0 and 1 for each label. A patient's
images stay together in the split. DenseNet-121 from ImageNet's weights, Adam 1e-3,
batch 16, mirrored images; the best epoch has the highest mean AUROC. torchxrayvision's
weights come with their own preparation of gray images; with them, set
`--config.data.crop_fraction=1`.
"""

from flax_densenet.configs import base


def get_config(folder='x-rays'):
    config = base.get_config()
    config.data.source = f'folder:{folder}'
    config.data.labels = 'labels.csv'
    config.data.batch_size = 16
    config.data.augment = 'flip'
    config.data.resize = 'crop'
    config.data.crop_fraction = 0.875  # 224 of 256
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = 'steps'
    config.train.epochs = 8
    return config
