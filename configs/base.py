"""All settings, each with its type, default and meaning; recipes change the defaults.

`python launch.py` without --config uses this file: DenseNet-121 on scikit-learn's
handwritten digits. `python launch.py settings` prints the comments below: a comment
describes the field under it, or in front of it.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    # None leaves a field open: init_from's weights decide, else the variant.
    optional = config_dict.placeholder
    config = ConfigDict()

    # Start from these weights: a file of PyTorch (.pth), safetensors or Keras (.h5,
    # .keras), a folder of the Hugging Face Hub (config.json and model.safetensors), the
    # folder of a run, or the name of published weights such as densenet121 or
    # hf:OWNER/NAME (see the command weights). A checkpoint in --workdir comes first.
    # The classifier starts from random values if the classes differ.
    config.init_from = ''

    # The network. Fields that are not set come from init_from, or else from the
    # variant.
    config.model = ConfigDict()
    # densenet121, densenet161, densenet169, densenet201, densenet264, densenetblur121d,
    # densenet264d, [B-|C-|BC-]L<depth>k<growth rate> such as BC-L100k12, or rdnet_tiny,
    # rdnet_small, rdnet_base, rdnet_large. If not set: as in init_from, else
    # densenet121.
    config.model.variant = optional(str)
    # Feature maps that each layer adds. DenseNet only.
    config.model.growth_rate = optional(int)
    # Layers of each block, '(6,12,24,16)'.
    config.model.block_sizes = optional(tuple)
    # Width of the 1x1 convolutions, in growth rates. 0: no 1x1 convolutions.
    config.model.bottleneck = optional(int)
    # Share of the feature maps that a transition keeps.
    config.model.compression = optional(float)
    # First layers: imagenet (7x7 with stride 2, then pooling), deep (three 3x3, then
    # pooling) or cifar (3x3). DenseNet only.
    config.model.stem = optional(str)
    # Feature maps after the stem.
    config.model.stem_features = optional(int)
    # Blur when the stem halves the resolution. DenseNet only.
    config.model.blur_pool = optional(bool)
    # Share of values to drop in training.
    config.model.dropout_rate = 0.0
    # Where to drop: conv3x3 (after each 3x3 convolution of a block, as in PyTorch's
    # versions) or every_conv (also after the 1x1 and in the transitions, as in the
    # authors' code; slower, with the plain layers). DenseNet only.
    config.model.dropout_after = optional(str)
    # Stochastic depth: share of images for which the last layer's new maps are left out
    # in training; falls evenly to 0 in the first layer. On CPUs it needs kernel=xla,
    # which is slower.
    config.model.drop_path_rate = optional(float)
    # Added to the variance in batch norm. Usually 1e-5.
    config.model.epsilon = optional(float)
    # Share of batch norm's running statistics to keep at each step. PyTorch's is 0.9,
    # Keras' 0.99. DenseNet only.
    config.model.momentum = optional(float)
    # Batch norm's running variance is unbiased, as in PyTorch; False as in Keras.
    # DenseNet only.
    config.model.unbiased_variance = optional(bool)
    # Precision of activations: float32 or bfloat16.
    config.model.dtype = 'float32'
    # torch, or same, as in TensorFlow. DenseNet only.
    config.model.padding = optional(str)
    # Initial kernels: he_fan_in, he_fan_out or glorot_normal.
    config.model.initializer = 'he_fan_in'
    # Use the fast dense block, or the fast layers of RDNet; False uses plain layers.
    config.model.fast = True
    # Implementation of the fast block or layers: native (C++, for CPUs), xla, or auto.
    config.model.kernel = 'auto'
    # none keeps activations for the gradient; block recomputes them, which saves
    # memory. With the fast dense block on xla, block is also faster, and its default;
    # RDNet's default is none.
    config.model.remat = optional(str)
    # Images from which batch norm computes its statistics in training. 0: the global
    # batch, or a micro-batch with train.accumulate_steps. n: each n consecutive images.
    # -1: the images of each device; then the devices exchange no statistics. The
    # running statistics are averages over these groups. DenseNet only.
    config.model.batch_norm_group = 0
    # Feature maps that each layer adds, by block. RDNet only.
    config.model.growth_rates = optional(tuple)
    # Transitions that halve the resolution, counted from 1. RDNet only.
    config.model.halvings = optional(tuple)
    # Blocks with squeeze-and-excitation, counted from 1. RDNet only.
    config.model.squeeze_blocks = optional(tuple)
    # Initial scale of each layer's output. 0: no scale. RDNet only.
    config.model.layer_scale = optional(float)
    # Width of the stem's patches in pixels. RDNet only.
    config.model.patch_size = optional(int)

    # The images, how they are prepared, and how they are loaded.
    config.data = ConfigDict()
    # digits; folder:PATH (PATH/CLASS/* or PATH/{train,val,test}/CLASS/*); packed:FOLDER
    # (made by the command pack); tar:PATH (webdataset shards); hf:NAME[:CONFIG[:SPLIT]]
    # (a data set of the Hugging Face Hub); parquet:FOLDER (Parquet files); or
    # tfds:NAME[:CONFIG].
    config.data.source = 'digits'
    # CSV table with several labels per image, for the images of folder:PATH: a column
    # for each label with 1, 0 or nothing (not known). The accepted forms are described
    # in flax_densenet/data/label_table.py.
    config.data.labels = ''
    # What the table holds: several labels per image (labels), one class per image
    # (classes), or auto, which prints what it found.
    config.data.label_kind = 'auto'
    # Columns of the labels or of the class, such as "('cat','dog')". (): detected. For
    # hf: and parquet:, the single column of the label.
    config.data.label_columns = ()
    # Meaning of an empty cell of a label: unknown (or ignore), negative or positive.
    config.data.blank_labels = 'unknown'
    # Meaning of -1 in a cell of a label: unknown (or ignore), negative, positive, or
    # soft: a target between 0 and 1 in the loss, and unknown for everything else.
    config.data.uncertain_labels = 'unknown'
    # Range of soft targets; each target is drawn once. '(0.55,0.85)' leans to positive
    # as in arXiv 1911.06475, '(0.15,0.45)' to negative; '(0.7,0.7)' is a fixed target.
    config.data.soft_labels = (0.55, 0.85)
    # Images of one group are never split between parts: auto (a column, field or
    # feature of patients such as patient_id, else paths such as patient001/),
    # column:NAME, path, path:REGEX (its first capture group names the group), or none.
    # Works for any source; a line reports what was found and how many groups are in
    # several parts.
    config.data.groups = 'auto'
    # The report divides the test images by these columns of data.labels: auto (age,
    # sex, site, view and other columns with few values or with numbers, but none that
    # identifies people), names such as age,sex, none, or named parts of the paths:
    # path:(?P<site>[a-z]+)_.
    config.data.subgroups = 'auto'
    # Column of data.labels that says which images are for training, validation and
    # testing: auto (a column of train, val and test, or one named split, fold, ...,
    # else folders of these names in the paths of the images), column:NAME,
    # column:NAME=TRAIN,VAL,TEST (the values of the three parts, several as 0+1+2), or
    # none.
    config.data.split = 'auto'
    # Values of images with more than 8 bits that become black and white, '(0,4095)'. If
    # not set: as in init_from, else found from the images and printed. (): 0 to 65535;
    # DICOM files by their own window.
    config.data.window = optional(tuple)
    # Bits of the values in image files: 8 reduces all images to 8 bits; 9 to 16 keep
    # what a file has until it is normalized, and 12 stands for the window (0,4095).
    # 0: as in init_from, else found from the images.
    config.data.bit_depth = 0
    # Pixels: one number for a square, or height and width, '(100,50)'. 0: as in
    # init_from, else 32 for digits and 224 for other sources.
    config.data.image_size = config_dict.FieldReference(0, field_type=object)
    # stretch, or crop: the largest part in the center with the shape of
    # data.image_size. If not set: as in init_from, else stretch.
    config.data.resize = optional(str)
    # Share of that part's height and width that resize=crop keeps. If not set: as in
    # init_from, else 1.0.
    config.data.crop_fraction = optional(float)
    # bilinear or bicubic. If not set: as in init_from, else bilinear.
    config.data.interpolation = optional(str)
    # 3 for color, 1 for grayscale: images are converted. Any other number keeps the
    # channels of the files, which must have as many: 2 for gray with transparency, 4
    # for RGBA, or the bands of TIFF files. 0: as in init_from, else 3.
    config.data.channels = 0
    # Subtracted from the image, whose values are 0 to 1: one number per channel. If not
    # set: as in init_from, else ImageNet's.
    config.data.mean = optional(tuple)
    # The image is divided by it after data.mean: one number per channel. If not set: as
    # in init_from, else ImageNet's.
    config.data.std = optional(tuple)
    # Images per step, over all devices and hosts.
    config.data.batch_size = 32
    # Share of the images to split off for testing if the source has no test part.
    config.data.test_fraction = 0.2
    # Share of the training images to split off for validation, such as 0.1. They choose
    # the best epoch, so that the test images choose nothing and are measured once, at
    # the end. 0: as the source has it; without a validation part, the test images
    # choose the best epoch as well.
    config.data.val_fraction = 0.0
    # Seed of these splits, and of the folds.
    config.data.split_seed = 0
    # Folds of cross-validation; the command crossval sets it (docs/crossval.md). If the
    # source has a test part, it is in no fold. 0: no folds.
    config.data.folds = 0
    # The fold to test on, from 1 to data.folds. The model is trained on the others.
    config.data.fold = 0
    # Random crops and flips of training images: none, flip, shift_flip (as for CIFAR)
    # or crop_flip (as for ImageNet). samples.png in the run's folder shows them.
    config.data.augment = 'none'
    # Random changes of brightness, contrast, saturation and hue, such as
    # '(0.4,0.4,0.4,0.1)': factors from 1 - x to 1 + x; the hue shifts by up to this
    # share of the color wheel. A single number sets the first three. Applied after
    # data.augment.
    config.data.color_jitter = ()
    # Random operations such as rotation and shear, as in torchvision: none,
    # trivialaugment (one, of any strength), randaugment (two, of strength 9 of 30) or
    # randaugment-N-M. Applied after data.color_jitter.
    config.data.policy = 'none'
    # Share of training images in which a random box is erased.
    config.data.erase = 0.0
    # Blend pairs of training images and their labels: alpha of the Beta(alpha, alpha)
    # distribution of the shares, such as 0.2. 0: off. If data.cutmix is also set, each
    # batch uses one of the two. Training accuracy counts the label with the larger
    # share.
    config.data.mixup = 0.0
    # Paste a box of one training image into another and mix their labels: alpha as for
    # data.mixup, such as 1.0. 0: off.
    config.data.cutmix = 0.0
    # Smaller images at the start of training: '((0.5,16),(0.8,24))' trains with 16
    # pixels for the first half of the epochs, then 24 until 80% of them, then
    # data.image_size. If that is not square, each size is height and width,
    # '((0.5,(16,8)),)'. Evaluation always uses data.image_size.
    config.data.size_schedule = ()
    # For classes of unequal size: none; sampler draws all classes equally often (an
    # epoch keeps its number of images); or loss gives all classes equal weight. With
    # data.labels, sampler draws positives of each label, and images without any,
    # equally often; instead of loss use train.pos_weight=auto.
    config.data.balance = 'none'
    # Test-time augmentation: none, or flip, which also predicts the mirrored image and
    # averages the probabilities, in twice the time. Used by eval, report and predict,
    # which can override it, and by serve; not used in the evaluation after each epoch.
    config.data.tta = 'none'
    # Images that cannot be read: error stops; skip leaves them out and lists them.
    config.data.bad_images = 'error'
    # Images that are in both training and test: report prints a warning, drop leaves
    # them out of training, ignore does not look for them. A split made by this program
    # keeps copies of an image on the same side.
    config.data.duplicates = 'report'
    # none, or memory: keep the resized images in memory, up to data.cache_limit_gib.
    # augment=crop_flip then crops the resized images.
    config.data.cache = 'none'
    # Limit of data.cache and of train.cache_features, in GiB.
    config.data.cache_limit_gib = 4.0
    # Threads that decode images, if data.workers is 0.
    config.data.threads = 4
    # Processes that decode images, for machines with many cores.
    config.data.workers = 0
    # Folder where TFDS keeps its data sets. If not set: TFDS' own default.
    config.data.tfds_dir = optional(str)
    # TFDS splits to train on, such as 'train+extra'. Empty: train.
    config.data.tfds_train = ''

    # The optimizer and its learning rate.
    config.optimizer = ConfigDict()
    # adam, adamw, sgd (with Nesterov momentum) or lamb (for large batches).
    config.optimizer.name = 'adam'
    # The highest learning rate of the schedule.
    config.optimizer.learning_rate = 1e-4
    # constant; cosine, down to 0; steps, a tenth at each of optimizer.drop_at; or
    # one_cycle: up from 1/25 during warmup_epochs (0: during 30% of training), then
    # down to nearly 0.
    config.optimizer.schedule = 'constant'
    # Shares of training at which schedule=steps divides the rate by 10, rising from
    # above 0 to below 1.
    config.optimizer.drop_at = (0.5, 0.75)
    # Epochs during which the learning rate rises from 0.
    config.optimizer.warmup_epochs = 0.0
    # Momentum of sgd.
    config.optimizer.momentum = 0.9
    # Weight decay; decoupled for adamw and lamb.
    config.optimizer.weight_decay = 0.0
    # What weight decay and lamb's trust ratio apply to: all parameters, as in the
    # paper, or kernels, which leaves out norms and biases.
    config.optimizer.decay = 'all'
    # Adds this times the squared kernels to the loss.
    config.optimizer.l2_penalty = 0.0
    # Largest norm of the gradient. 0: no limit.
    config.optimizer.gradient_clip = 0.0
    # ZeRO-1: each device keeps a part of the optimizer's state instead of all of it (8
    # bytes per parameter for adam), and the devices exchange updates.
    config.optimizer.shard_state = False
    # Each stage (stem, dense blocks with their transitions, classifier) learns at this
    # share of the next stage's rate: with 0.8, the last block at 0.8 of the
    # classifier's rate, the one before at 0.64.
    config.optimizer.layer_decay = 1.0
    # Factor of the classifier's learning rate.
    config.optimizer.head_multiplier = 1.0

    # The training run.
    config.train = ConfigDict()
    # Number of epochs.
    config.train.epochs = 40
    # Micro-batches per step, processed one after another: data.batch_size images in
    # about the memory of one micro-batch, and one update per step. Batch norm takes the
    # statistics of each micro-batch.
    config.train.accumulate_steps = 1
    # Loss to minimize: cross_entropy; focal, which gives less weight to images that are
    # already classified correctly (arXiv 1708.02002); or bce, a sigmoid per class
    # (arXiv 2110.00476), though predictions remain a softmax. With data.labels,
    # cross_entropy and bce are the same. The reported train_loss and test_loss are
    # always the cross-entropy.
    config.train.loss = 'cross_entropy'
    # Exponent of loss=focal. 0 is the same as cross_entropy.
    config.train.focal_gamma = 2.0
    # Share of the target to spread evenly over all classes, such as 0.1. With
    # data.labels, each label moves toward 0.5 by half of it.
    config.train.label_smoothing = 0.0
    # With data.labels, how much more a positive counts in the loss than a negative:
    # nothing for equally; auto for negatives / positives of each label in the training
    # images (up to 100); a number for all labels, such as '5'; or NAME=NUMBER,... for
    # some of them, such as 'mass=10,effusion=2'.
    config.train.pos_weight = ''
    # Keep an exponential moving average of parameters and batch norm statistics, with
    # this decay per step, such as 0.999 (at first at most (1 + steps) / (10 + steps)).
    # The average is evaluated, saved as the best checkpoint, and exported. 0: off.
    config.train.ema = 0.0
    # Stop after this many epochs in a row without improvement. 0: never. The learning
    # rate schedule still covers all epochs.
    config.train.patience = 0
    # Seed of parameters, order, augmentation and dropout.
    config.train.seed = 0
    # Parameters and batch norm statistics that stay fixed: none; backbone, all but the
    # classifier; or a block such as denseblock2, everything up to and including its
    # transition.
    config.train.freeze = 'none'
    # Epochs at the start that train only the classifier; train.freeze applies after
    # them.
    config.train.head_warmup_epochs = 0
    # For fine-tuning, choose open settings by the number of training images: a batch
    # size, learning rate, layer decay or number of epochs of 0, a head warm-up or
    # patience of -1, and a policy or freeze of auto. configs/finetune.py leaves all of
    # them open for published weights (docs/pretrained.md).
    config.train.by_count = False
    # auto: the features of a frozen backbone are computed once and kept in memory, if
    # no setting changes the images randomly and they fit data.cache_limit_gib. off:
    # compute them in each epoch.
    config.train.cache_features = 'auto'
    # Also save within epochs, such as '500 steps' or '10 minutes'. Empty: only after
    # each epoch.
    config.train.checkpoint_every = ''
    # If the loss or gradient is not finite: stop shows where it first appeared and ends
    # the run; skip leaves out the step, at most 10 in a row and 10 or 1% of an epoch.
    config.train.on_nonfinite = 'stop'
    # On GPUs, give bit for bit the same result each time, at some cost in speed. CPUs
    # always do.
    config.train.deterministic = False
    # Write metrics, samples and settings for `tensorboard --logdir ckpt`.
    config.train.tensorboard = True
    # Experiment trackers that follow the run, such as 'wandb,mlflow': wandb, mlflow,
    # trackio. Without a login they write to this machine (docs/train.md).
    config.train.trackers = ''
    # At the end, calibrate the probabilities on the validation images, or on the test
    # images if there is no validation part: a temperature, or with data.labels Platt
    # scaling of each label, if that lowers the log loss by more than chance. Used
    # wherever the model predicts, unless --raw is given. The command calibrate does it
    # later.
    config.train.calibrate = True
    # At the end, choose on the same images the probability from which a label, or the
    # positive one of two classes, counts as positive: youden (the largest sum of
    # sensitivity and specificity), f1, sensitivity=0.95 or specificity=0.9 (at least
    # that), or cost=5:1 (a false negative costs 5, a false positive 1). Empty: 0.5 for
    # labels, and the most likely class.
    config.train.threshold = ''
    # The positive one of two classes, for train.threshold. Empty: the second.
    config.train.positive_class = ''
    # After training, learn what usual images look like, so that predictions also report
    # how unlike the training images an image is (docs/unusual.md): energy (of the
    # outputs alone), mahalanobis (distance to the nearest class), both, neighbor
    # (distance to training images) or off. auto: both; mahalanobis for several labels.
    config.train.unusual = 'auto'
    # Share of the validation images that count as usual. The others, and images at
    # least as far from the training images, are marked as unusual.
    config.train.unusual_share = 0.95
    # Maximum number of training images to use for train.unusual; with many classes, ten
    # per class, up to 10,000. It takes as long as predicting that many images.
    config.train.unusual_images = 2000
    # Write report.html about the best checkpoint at the end. The command report writes
    # it too.
    config.train.report = True

    # The report pages.
    config.report = ConfigDict()
    # Leave pictures, file names and paths out of report.html and compare.html, so that
    # they can be shared. predictions.csv next to them keeps the paths.
    config.report.private = False
    return config


def split_manner(argument: str) -> tuple[str, bool]:
    """Parses `NAME` or `NAME,code`: the name, and whether `code` was given.

    Where the paper's text and code differ, `code` follows the code.
    """
    name, _, manner = argument.partition(',')
    if manner not in ('', 'code'):
        raise ValueError(f'{manner} is not known; use {name} or {name},code')
    return name, bool(manner)
