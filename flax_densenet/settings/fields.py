"""All settings as frozen dataclasses, grouped by who uses them.

Names, types and defaults are those of `configs/base.py`, which documents each field
once; a test keeps the two in step. None leaves a field open: it is taken from the
weights that a run starts from, or else it is the default of the model variant.
"""

import dataclasses

from flax_densenet.settings import sizes


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The network: arguments of `models.factory.create_model` except the classes."""

    variant: str | None = None
    growth_rate: int | None = None
    block_sizes: tuple[int, ...] | None = None
    bottleneck: int | None = None
    compression: float | None = None
    stem: str | None = None
    stem_features: int | None = None
    blur_pool: bool | None = None
    dropout_rate: float = 0.0
    dropout_after: str | None = None
    drop_path_rate: float | None = None
    epsilon: float | None = None
    momentum: float | None = None
    unbiased_variance: bool | None = None
    dtype: str = 'float32'
    padding: str | None = None
    initializer: str = 'he_fan_in'
    fast: bool = True
    kernel: str = 'auto'
    remat: str | None = None
    batch_norm_group: int = 0
    growth_rates: tuple[int, ...] | None = None
    halvings: tuple[int, ...] | None = None
    squeeze_blocks: tuple[int, ...] | None = None
    layer_scale: float | None = None
    patch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """Which images there are and how they are split: `data.dataset.from_settings`.

    Attributes:
      source: `digits` (scikit-learn's handwritten digits), `folder:PATH`
        (`PATH/CLASS/*` or `PATH/{train,val,test}/CLASS/*`), `packed:DIR` (written by
        `pack`), `tar:PATH`, `tfds:NAME[:CONFIG]`, `parquet:FOLDER` or
        `hf:NAME[:CONFIG[:SPLIT]]` (from the Hugging Face Hub).
      labels: a table of labels for the images of a `folder:`, see `data.label_table`.
      label_kind, label_columns, blank_labels, uncertain_labels, split: how the table is
        read, see `data.label_options.Options`.
      soft_labels: the range that soft targets are drawn from, see `data.soft_labels`.
      groups: images of one group stay in one part: a column of the table, `auto`,
        `none`, or `path` or `path:REGEX` if the paths name the groups.
      subgroups: columns of the table that divide the images in the report: `auto`,
        `none`, names, or `path:REGEX`, see `data.subgroup_columns`.
      test_fraction: share of each class that is split off for the test, if the source
        has no test part.
      val_fraction: share of the training images that is split off in the same way, to
        choose the best epoch; 0 for none.
      split_seed: seed of these splits and of the folds.
      folds: number of folds of cross-validation; 0 for none.
      fold: the fold to test on, from 1. With 0 the training part is all folds, and the
        test part is the source's own, or empty (see `data.folds.divide`).
      bad_images: `error` stops at a file that is not an intact image; `skip` leaves it
        out.
      duplicates: what to do with files of the same content in two parts: `report`
        reports them, `drop` leaves them out of training, `ignore` does not look for
        them. A split made here keeps copies in one part, unless `ignore`.
      cache: `memory` keeps decoded images in memory; `none` does not.
      cache_limit_gib: the most memory for that, in GiB.
      tfds_dir: the folder of TFDS; None for its default.
      tfds_train: splits of a TFDS set to train on, joined by `+`; empty for `train`.
    """

    source: str = 'digits'
    labels: str = ''
    label_kind: str = 'auto'
    label_columns: tuple[str, ...] = ()
    blank_labels: str = 'unknown'
    uncertain_labels: str = 'unknown'
    soft_labels: tuple[float, ...] = (0.55, 0.85)
    groups: str = 'auto'
    subgroups: str = 'auto'
    split: str = 'auto'
    test_fraction: float = 0.2
    val_fraction: float = 0.0
    split_seed: int = 0
    folds: int = 0
    fold: int = 0
    bad_images: str = 'error'
    duplicates: str = 'report'
    cache: str = 'none'
    cache_limit_gib: float = 4.0
    tfds_dir: str | None = None
    tfds_train: str = ''


@dataclasses.dataclass(frozen=True)
class PreparationSettings:
    """How an image becomes the network's input; saved with the model.

    Attributes:
      image_size: pixels of the resized images: a side, or (height, width); 0 for the
        source's default.
      resize, crop_fraction, interpolation, channels: see `data.images.Preparation`.
      mean, std: per channel, of pixels from 0 to 1.
      window, bit_depth: the values that become 0 and 1; None and 0 find them in the
        images, see `data.deep.resolve`.
    """

    image_size: sizes.Size = 0
    resize: str | None = None
    crop_fraction: float | None = None
    interpolation: str | None = None
    channels: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    window: tuple[float, ...] | None = None
    bit_depth: int = 0

    @property
    def normalization(self) -> dict[str, tuple[float, ...]]:
        """`mean` and `std` by name; both are resolved."""
        return {'mean': tuple(self.mean or ()), 'std': tuple(self.std or ())}


@dataclasses.dataclass(frozen=True)
class AugmentationSettings:
    """Augmentation of the training images, in this order."""

    augment: str = 'none'
    color_jitter: tuple[float, ...] = ()
    policy: str = 'none'
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    size_schedule: tuple = ()


@dataclasses.dataclass(frozen=True)
class LoaderSettings:
    """How batches are drawn and read."""

    batch_size: int = 32
    balance: str = 'none'
    threads: int = 4
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The views of an image in prediction."""

    tta: str = 'none'


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """How gradients become updates."""

    name: str = 'adam'
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay: str = 'all'
    l2_penalty: float = 0.0
    gradient_clip: float = 0.0
    shard_state: bool = False
    layer_decay: float = 1.0
    head_multiplier: float = 1.0


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate by step."""

    learning_rate: float = 1e-4
    schedule: str = 'constant'
    drop_at: tuple[float, ...] = (0.5, 0.75)
    warmup_epochs: float = 0.0


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The training loss."""

    loss: str = 'cross_entropy'
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    pos_weight: str = ''


@dataclasses.dataclass(frozen=True)
class DecisionSettings:
    """Fitting after training: how outputs become decisions."""

    calibrate: bool = True
    threshold: str = ''
    positive_class: str = ''
    unusual: str = 'auto'
    unusual_share: float = 0.95
    unusual_images: int = 2000


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The run itself: its length, what trains when, and what is saved and shown."""

    epochs: int = 40
    accumulate_steps: int = 1
    ema: float = 0.0
    patience: int = 0
    seed: int = 0
    freeze: str = 'none'
    head_warmup_epochs: int = 0
    by_count: bool = False
    cache_features: str = 'auto'
    checkpoint_every: str = ''
    on_nonfinite: str = 'stop'
    deterministic: bool = False
    tensorboard: bool = True
    trackers: str = ''
    report: bool = True


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """The content of pages."""

    private: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of the program.

    Make them with `settings.from_config`; change them with `dataclasses.replace`.

    Attributes:
      init_from: weights to start from: a file, a folder or a run; empty for none.
      data: section `data` of a config, with the five groups after it.
      optimizer: section `optimizer`, with `schedule`.
      train: section `train`, with `loss` and `decisions`.
      report: section `report`.
    """

    init_from: str = ''
    model: ModelSettings = ModelSettings()
    data: SourceSettings = SourceSettings()
    preparation: PreparationSettings = PreparationSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    loader: LoaderSettings = LoaderSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    train: TrainingSettings = TrainingSettings()
    loss: LossSettings = LossSettings()
    decisions: DecisionSettings = DecisionSettings()
    report: ReportSettings = ReportSettings()
