"""Every field of the program, once, with its unit and effect; recipes override it.

`python launch.py` without --config takes this one: DenseNet-121 on scikit-learn's
handwritten digits.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    # None leaves a field open: as init_from's weights have it, else the variant's own.
    optional = config_dict.placeholder
    config = ConfigDict()
    # Start from these weights: a file of torch (.pth), safetensors or Keras (.h5,
    # .keras), a folder as the Hugging Face Hub has them (config.json and
    # model.safetensors), or the workdir of a run. A checkpoint in --workdir comes
    # first. The classifier starts anew where the classes differ.
    config.init_from = ''

    config.model = ConfigDict()
    # densenet121, 161, 169, 201, 264, densenetblur121d, densenet264d, or
    # [B-|C-|BC-]L<depth>k<growth rate>, or rdnet_tiny, small, base, large; None: as
    # init_from has it, else densenet121.
    config.model.variant = optional(str)
    config.model.growth_rate = optional(int)  # feature maps that a layer adds
    config.model.block_sizes = optional(tuple)  # layers of each block, '(6,12,24,16)'
    config.model.bottleneck = optional(int)  # 1x1 width in growth rates; 0: no 1x1
    config.model.compression = optional(float)  # share that a transition keeps
    # imagenet (7x7/2, pool), deep (3x3/2, 3x3, 3x3, pool) or cifar (3x3)
    config.model.stem = optional(str)
    config.model.stem_features = optional(int)
    config.model.blur_pool = optional(bool)  # the stem's pooling blurs where it halves
    config.model.dropout_rate = 0.0
    # conv3x3 (each of a block, as PyTorch's ports) or every_conv (also the 1x1 and the
    # transitions', as the authors' code; with the plain layers, which are slower).
    config.model.dropout_after = optional(str)
    # Share of images that the last layer's new maps are left out of in training
    # (stochastic depth); falls evenly to 0 in the first. On CPUs by kernel=xla: slower.
    config.model.drop_path_rate = optional(float)
    config.model.epsilon = optional(float)  # in batch norm, added to the variance; 1e-5
    # Share of the running statistics kept at each step; 0.9, Keras has 0.99.
    config.model.momentum = optional(float)
    # Running variance as torch (True) or as Keras (False).
    config.model.unbiased_variance = optional(bool)
    config.model.dtype = 'float32'  # of activations; or bfloat16
    config.model.padding = optional(str)  # torch, or same, as TensorFlow pads
    config.model.initializer = 'he_fan_in'  # he_fan_out, glorot_normal
    config.model.fast = True  # the fast dense block; False: plain layers
    config.model.kernel = 'auto'  # of the fast block: native (C++, CPU), xla, auto
    # none keeps activations, block computes them again: less memory; with the fast
    # block, by xla, also faster, and its default. RDNet's is none.
    config.model.remat = optional(str)
    # Batch norm's statistics in training: 0 of the global batch (of a micro-batch, with
    # train.accumulate_steps); n of each n consecutive rows of it; -1 of the rows of
    # each device, which then exchange none. The running ones are averages over groups.
    config.model.batch_norm_group = 0
    # Of RDNet alone, as growth_rate, stem, blur_pool, dropout_after, momentum,
    # unbiased_variance, padding, fast, kernel and batch_norm_group are of DenseNet.
    config.model.growth_rates = optional(tuple)  # feature maps of a layer, by block
    config.model.halvings = optional(tuple)  # transitions that halve, counted from 1
    config.model.squeeze_blocks = optional(tuple)  # with squeeze-excitation, from 1
    config.model.layer_scale = optional(float)  # first factor of a layer; 0: none
    config.model.patch_size = optional(int)  # pixels, of the stem's patches

    config.data = ConfigDict()
    # digits, folder:PATH (PATH/CLASS/* or PATH/{train,val}/CLASS/*), packed:DIR (made
    # by --mode=pack), tar:PATH (webdataset's shards) or tfds:NAME[:CONFIG].
    config.data.source = 'digits'
    # Table (CSV) of several labels an image, for folder:PATH, whose images it names: a
    # column for each label with 1, 0 or nothing (not known);
    # flax_densenet/data/label_table.py.
    config.data.labels = ''
    # How an image is prepared; None (0) leaves it to init_from's weights, else to the
    # value named first.
    config.data.image_size = 0  # pixels a side; digits 32, others 224
    config.data.resize = optional(str)  # stretch, or crop: a square in the center
    config.data.crop_fraction = optional(float)  # 1.0; its share of the shorter side
    config.data.interpolation = optional(str)  # bilinear, bicubic
    config.data.channels = 0  # 3 for color, 1 for gray
    # (image / 255 - mean) / std, a number for each channel; ImageNet's.
    config.data.mean = optional(tuple)
    config.data.std = optional(tuple)
    config.data.batch_size = 32  # images of a step, over all devices and hosts
    config.data.test_fraction = 0.2  # split off where the source has no test part
    config.data.split_seed = 0  # of that split
    # What is done to training images, in this order; samples.png shows it.
    # flip, shift_flip (CIFAR), crop_flip (ImageNet): a part of the whole photograph
    config.data.augment = 'none'
    # Brightness, contrast, saturation and hue, '(0.4,0.4,0.4,0.1)': factors from 1 - x
    # to 1 + x, the hue turns by so much of the circle; 0.4 alone is of the first three.
    config.data.color_jitter = ()
    # trivialaugment (one operation, of any strength), randaugment (two of strength 9 of
    # 30) or randaugment-N-M: turned, sheared, moved, recolored, as torchvision does.
    config.data.policy = 'none'
    config.data.erase = 0.0  # share of images that a box is erased from
    # Images in pairs of a batch, over each other (mixup) or a box of one in the other
    # (CutMix), with both labels in the loss: alpha of the shares' Beta(alpha, alpha),
    # 0.2 (mixup), 1.0 (CutMix), 0 for none; with both, each batch has one of them. The
    # training accuracy counts the label with the larger share.
    config.data.mixup = 0.0
    config.data.cutmix = 0.0
    # Smaller images at first, '((0.5,16),(0.8,24))': 16 pixels a side for half of the
    # epochs, 24 up to 80 % of them, then image_size, at which all tests are.
    config.data.size_schedule = ()
    # Classes of different sizes: sampler draws all equally often (an epoch has as many
    # images as before), loss weighs all classes alike in the gradient; none of both.
    config.data.balance = 'none'
    # What a trained model sees of an image: none, the image; flip, also its mirror
    # image, and probabilities are the mean of both, in twice the time. Of --mode=eval,
    # report and predict, which can change it, and of serve; not of the test after each
    # epoch, which chooses the best one.
    config.data.tta = 'none'
    config.data.bad_images = 'error'  # or skip: leaves them out and lists them
    # The same image in training and test: report tells of it, drop leaves it out of
    # training, ignore does not look; a split of ours keeps copies on one side.
    config.data.duplicates = 'report'
    # memory: keeps images as they are resized, up to the limit; the parts of crop_flip
    # are then cut from these.
    config.data.cache = 'none'
    config.data.cache_limit_gib = 4.0
    config.data.threads = 4  # decoding threads, where workers is 0
    config.data.workers = 0  # decoding processes, for many cores
    config.data.tfds_dir = optional(str)  # where TFDS keeps its sets; None: its own
    config.data.tfds_train = ''  # its splits to train on, 'train+extra'; '': train

    config.optimizer = ConfigDict()
    config.optimizer.name = 'adam'  # adamw, sgd (Nesterov), lamb (large batches)
    config.optimizer.learning_rate = 1e-4  # the highest of the schedule
    # cosine (to 0), steps (/10, below), or one_cycle: up from 1/25 over warmup_epochs
    # (0: over 0.3 of training), then down to nearly 0.
    config.optimizer.schedule = 'constant'
    config.optimizer.drop_at = (0.5, 0.75)  # shares of training where steps divides
    config.optimizer.warmup_epochs = 0.0  # the rate rises from 0 over these
    config.optimizer.momentum = 0.9  # of sgd
    config.optimizer.weight_decay = 0.0  # decoupled with adamw and lamb
    # What weight decay is of: all parameters, as in the paper, or kernels, which leaves
    # out norms and biases; lamb's trust ratio is of the same.
    config.optimizer.decay = 'all'
    config.optimizer.l2_penalty = 0.0  # times the squares of kernels, in the loss
    config.optimizer.gradient_clip = 0.0  # longest gradient, over all; 0: any length
    # Each device keeps its part of the optimizer's state (ZeRO-1) and not all of it:
    # of Adam's 8 bytes for each parameter a share; the updates are exchanged instead.
    config.optimizer.shard_state = False

    # Each stage (stem, dense blocks with their transitions, classifier) learns at this
    # share of the next one's rate: at 0.8 the last block at 0.8, the one before 0.64.
    config.optimizer.layer_decay = 1.0
    config.optimizer.head_multiplier = 1.0  # of the classifier's learning rate

    config.train = ConfigDict()
    config.train.epochs = 40
    # Micro-batches that a step takes data.batch_size in, one after another, in about
    # the memory of one; batch norm takes the statistics of each. One update a step.
    config.train.accumulate_steps = 1
    # What the gradient is of: cross_entropy; focal, which weighs down what is right
    # already (arXiv 1708.02002); bce, a sigmoid for each class (arXiv 2110.00476),
    # though answers stay the softmax's. With data.labels the first and the last are the
    # same. train_loss and test_loss, by which runs and epochs are compared, stay the
    # plain cross-entropy.
    config.train.loss = 'cross_entropy'
    config.train.focal_gamma = 2.0  # of focal; 0 makes it cross_entropy
    # Share of the target that goes evenly to all classes, 0.1; of several labels each
    # moves by half of it towards a half.
    config.train.label_smoothing = 0.0
    # Share that an average of parameters and batch norm statistics keeps at each step,
    # 0.999, at first at most (1 + steps) / (10 + steps); 0: none. The averaged model is
    # what is tested, kept, reported and exported; training goes on with its own values.
    config.train.ema = 0.0
    # Ends after so many epochs in a row without a better one (by which the best
    # checkpoint is chosen); 0: never. The schedule is that of all epochs.
    config.train.patience = 0
    config.train.seed = 0  # of parameters, order, augmentation and dropout
    # What keeps its parameters and batch norm statistics: none, backbone (all but the
    # classifier) or denseblock2 (from the stem to this block and its transition).
    config.train.freeze = 'none'
    config.train.head_warmup_epochs = 0  # these train the classifier alone, then freeze
    # auto: a frozen backbone's features are computed once and kept in memory, where no
    # field of data changes the images and up to data.cache_limit_gib; off: in each
    # epoch.
    config.train.cache_features = 'auto'
    # Saves within epochs too: '500 steps', '10 minutes'; nothing: at their ends alone.
    config.train.checkpoint_every = ''
    # A loss or gradient that is not finite: stop shows where it came up and ends the
    # run; skip leaves the step out, at most 10 in a row and 10 or 1 % of an epoch.
    config.train.on_nonfinite = 'stop'
    # On GPUs, bit for bit the same result each time, for some of the speed; on CPUs it
    # always is.
    config.train.deterministic = False
    # Figures, samples and fields for `tensorboard --logdir ckpt`, in the run's folder.
    config.train.tensorboard = True
    # Ends with report.html, a page on the best checkpoint; --mode=report makes it too.
    config.train.report = True
    return config


def split_manner(argument: str) -> tuple[str, bool]:
    """`NAME` or `NAME,code` of the paper's recipes: the name, and whether as the code.

    Where text and code of the paper differ, a recipe follows the one or the other.
    """
    name, _, manner = argument.partition(',')
    if manner not in ('', 'code'):
        raise ValueError(f'{manner} is not known; use {name} or {name},code')
    return name, bool(manner)
