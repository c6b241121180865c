"""The functions of the public API: `flax_densenet.train`, `load`, `evaluate`, `export`.

    import flax_densenet

    config = flax_densenet.get_config('folder:photos')
    config.train.epochs = 10
    result = flax_densenet.train(config, 'ckpt/photos')
    print(result.best['test_accuracy'])
    model = flax_densenet.load('ckpt/photos')
    print(model.predict('new.jpg')[0].label)
    flax_densenet.export(model, 'photos.onnx')

They do what the commands of the same names do, without side effects on the process:
they install no signal handlers and set no environment variables. For the speed of the
commands, call `flax_densenet.system.process.set_up()` before anything else.
"""

import dataclasses
import fnmatch
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from flax_densenet.errors import UserError
from flax_densenet.system import arguments

if TYPE_CHECKING:
    import numpy as np
    from ml_collections import ConfigDict

    from flax_densenet.inference.predictor import Predictor

    Model: TypeAlias = Predictor | str | os.PathLike[str]
    Config: TypeAlias = ConfigDict | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of `train`.

    Attributes:
      workdir: the folder of the run, which `load` accepts.
      best: the record of the best epoch: `epoch` (from 1), `step`, `train_accuracy` and
        `test_accuracy` (shares, 0 to 1), `train_loss` and `test_loss` (nats),
        `learning_rate`, `images_per_second`, and more. If there is a validation part,
        `val_accuracy` and `val_loss` replace `test_*`.
      records: the records of all epochs, in order, as in `metrics.jsonl`.
      test: the content of `eval.json`: the metrics of the best checkpoint on the test
        images, as in `Evaluation`; None if these images chose the best epoch.
    """

    workdir: str
    best: dict[str, Any]
    records: list[dict[str, Any]]
    test: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate` for N images and C classes.

    Attributes:
      metrics: the content of `eval.json`: `count`, `accuracy` (0 to 1) and its 95%
        interval `accuracy_interval`, `loss` (nats), `top5` (None for five classes or
        fewer), `macro` (means over the classes of precision, recall, specificity, f1,
        auroc and average_precision, and balanced_accuracy), `classes` (the same for
        each class, with its name and support), `intervals` (95% intervals of both, and
        the number of independent `units`), `confusion` (`[actual][predicted]`) and
        `calibration`.
      class_names: C names.
      names: N names: the file of each image, or its position in the data set.
      labels: int32 `[N]`. With several labels per image, float32 `[N, C]` of 0, 1 and
        NaN (unknown).
      probabilities: float64 `[N, C]`.
    """

    metrics: dict[str, Any]
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    labels: 'np.ndarray'
    probabilities: 'np.ndarray'

    @property
    def accuracy(self) -> float:
        """Share of images whose most likely class is the actual one, 0 to 1."""
        return self.metrics['accuracy']

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        return self.metrics['loss']


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """The result of `export`.

    Attributes:
      path: the file or folder.
      format: as given, or from the extension of the file.
      facts: text by name: size, precision, and the largest difference of each runtime.
    """

    path: str
    format: str
    facts: dict[str, str]


def list_models(pattern: str = '*') -> list[str]:
    """Names that `create_model` and `config.model.variant` accept.

    Besides these, `[B-|C-|BC-]L<depth>k<growth rate>` names the small-image networks of
    the paper (arXiv 1608.06993, section 3).

    >>> list_models('densenet1*')
    ['densenet121', 'densenet161', 'densenet169']

    Args: pattern: a pattern as for file names, with `*` and `?`.
    """
    from flax_densenet.models import factory

    if not isinstance(pattern, str):
        raise UserError(f'pattern={arguments.describe(pattern)} must be text')
    return fnmatch.filter(factory.VARIANTS, pattern)


def get_config(
    name: str | os.PathLike[str] = 'densenet121', argument: str | None = None
) -> 'ConfigDict':
    """The settings of a recipe, to change and to train with.

    >>> config = get_config('cifar', 'quick')
    >>> config.train.epochs
    13

    Args:
      name: name of a recipe that comes with the package (`densenet121`, `folder`,
        `cifar`, ...; `base` has only the defaults), or the path of a Python file with a
        function `get_config`; `NAME:ARGUMENT` also gives the argument.
      argument: argument of the recipe: `folder` takes the folder of images, `finetune`
        the weights, `cifar` the model.

    Returns:
      A ConfigDict with all fields of `configs/base.py`. It is locked: assigning to a
      field that does not exist raises an AttributeError.

    Raises: UserError: there is no such recipe, or it does not accept the argument.
    """
    from flax_densenet.cli import command_line

    text = arguments.check_path('name', name, 'the name of a recipe, or its file')
    return command_line.load_config(text if argument is None else f'{text}:{argument}')


def load(
    path: str | os.PathLike[str],
    *,
    batch_size: int = 32,
    tta: str | None = None,
    class_names: Sequence[str] | str | os.PathLike[str] | None = None,
    outputs: str | None = None,
    data: Mapping[str, Any] | None = None,
    precision: str | None = None,
    raw: bool = False,
) -> 'Predictor':
    """Loads a trained model, to predict, explain or extract features.

    Args:
      path: a run's folder, from which the best checkpoint is loaded; a file of weights
        (torchvision, timm, Keras, safetensors); a folder in the format of the Hugging
        Face Hub; or a name from `list_weights`, `hf:OWNER/NAME[@REVISION]` or
        `https://...#sha256=DIGEST`, which is downloaded once.
      batch_size: maximum number of images computed at a time.
      tta: test-time augmentation, `none` or `flip`; by default as in training.
      class_names: names in the order of the outputs, or a file of names, for weights
        that do not name them. A network with one output takes two: negative and
        positive.
      outputs: `softmax`, `sigmoid` or `none`; by default as in the weights, or softmax.
      data: preparation of the images, for weights that do not specify it: `mean`,
        `std`, `image_size`, `resize`, `crop_fraction`, `interpolation`, `channels`.
      precision: `float32`, `bfloat16`, or `auto`, which uses bfloat16 if it is faster
        here and `eval` or `report` with `--precision=auto` has measured that it costs
        at most 0.1 points of accuracy. The default is `auto`, which prints nothing if
        nothing was measured.
      raw: use the network's own outputs, without the calibration, thresholds and limits
        that were fitted after training.

    Raises:
      UserError: there is no such file or folder, it holds no trained model, or an
        argument does not fit it.
    """
    from flax_densenet.inference import predictor

    _check_devices()
    return predictor.load_trained(
        path,
        batch_size=batch_size,
        tta=tta,
        class_names=class_names,
        outputs=outputs,
        data=data,
        precision=precision,
        raw=raw,
    )


def train(config: 'Config', workdir: str | os.PathLike[str]) -> TrainResult:
    """Trains a model; run it again with the same arguments to resume.

    After each epoch the model is evaluated, and the latest and the best checkpoint are
    kept. Writes the same files as the command `train`, including curves and report; the
    report needs `pip install 'flax_densenet[report]'`.

    Args:
      config: from `get_config`, or a mapping of some fields, such as `{'data':
        {'source': 'folder:photos'}}`; the other fields have their defaults.
      workdir: the folder of the run; created if it does not exist.

    Raises:
      UserError: a field, the data or the folder cannot be used, or the loss is not
        finite.
    """
    from flax_densenet import settings
    from flax_densenet.report import finished, plots
    from flax_densenet.train import fit

    _check_devices()
    workdir = arguments.resolve('workdir', workdir, 'the folder of the run')
    result = fit.fit(
        settings.from_config(config), workdir, save_samples=plots.save_samples
    )
    test = finished.write(workdir, **result.report_options())
    result.send_files()
    return TrainResult(workdir, result.best, result.records, test)


def evaluate(
    model: 'Model',
    data: 'str | os.PathLike[str] | tuple[np.ndarray, np.ndarray] | None' = None,
    *,
    labels: str = '',
    batch_size: int = 32,
) -> Evaluation:
    """Measures a trained model on labeled images; writes nothing.

    Args:
      model: from `load`, or anything that `load` accepts.
      data: a folder of images (`photos/CLASS/*`), any other data source
        (`packed:FOLDER`, `tfds:NAME`, ...), or arrays: images uint8 `[N, H, W, 3]` or
        `[N, H, W, 1]`, and labels int `[N]` in the order of the model's classes, or
        float `[N, C]` of 0, 1 and NaN. The default is the test images of the run. For
        other data, the test part is used, or everything if there is none; classes are
        matched by name. The default for a cross-validation is its own images, each
        predicted by the model that was not trained on it.
      labels: a table of several labels per image, for a folder of images in `data`.
      batch_size: images computed at a time; a multiple of the number of devices.

    Raises:
      UserError: the data cannot be read or does not fit the model.
    """
    from flax_densenet.distributed import mesh
    from flax_densenet.evaluation import array_data, out_of_fold, results

    _check_data(data, labels)
    arguments.check_whole('batch_size', batch_size)
    predictor = _predictor(model)
    trained, path = predictor.in_use, predictor.path or 'the model'
    mesh.check_batch_size(batch_size, trained.mesh)
    if isinstance(data, tuple):
        examples = array_data.make_examples(
            *data,
            classes=len(predictor.class_names),
            multi_label=predictor.multi_label,
            preparation=predictor.preparation,
        )
        found = results.collect(
            trained,
            examples,
            predictor.class_names,
            batch_size=batch_size,
            threads=4,
            workers=0,
        )
    elif data is None and predictor.path and trained.module.members > 1:
        changes = {'batch_size': batch_size, 'tta': trained.tta}
        found = out_of_fold.collect(
            predictor.path,
            lambda metadata: _settings_of(metadata, **changes),
            mesh=trained.mesh,
            precision=trained.precision or None,
            unusual=trained.decisions and trained.decisions.unusual,
        ).results
    else:
        settings = _data_settings(trained, data, labels, batch_size=batch_size)
        if not settings.data.source:
            raise UserError(f'{path} does not record its training data: pass data')
        _, found, _ = results.of_data(trained, path, settings)
    return Evaluation(
        metrics=found.metrics | ({'doubt': found.doubt} if found.doubt else {}),
        class_names=found.class_names,
        names=tuple(found.name(row) for row in range(len(found.labels))),
        labels=found.labels,
        probabilities=found.probabilities,
    )


def export(
    model: 'Model',
    file: str | os.PathLike[str],
    format: str | None = None,
    *,
    precision: str = 'float32',
    inputs: str | None = None,
    images: str | os.PathLike[str] | Sequence[str] = (),
    license: str | None = None,
    data_license: str | None = None,
) -> ExportResult:
    """Writes a trained model for another program and verifies the file with it.

    A model card is written with the file. If anything fails, existing files are kept.

    Args:
      model: from `load`, or anything that `load` accepts.
      file: file to write, or folder (huggingface).
      format: `safetensors`, `torch`, `keras`, `onnx`, `stablehlo` or `huggingface`; by
        default from the extension of the file.
      precision: precision of the stored weights: `float32`, `float16` or `bfloat16`;
        `int8` (onnx) also computes in integers.
      inputs: `images` (uint8 in, probabilities out) or `normalized` (float in, logits
        out); by default images for onnx and stablehlo.
      images: files, folders and patterns to verify the file on; by default images of
        the run's data, or two photographs of scikit-learn.
      license: license of the weights, for the card, such as `cc-by-4.0`.
      data_license: license of the data, for the card.

    Raises:
      UserError: the format cannot hold the model, a package is missing, the file cannot
        be written, or the other program computes different outputs.
    """
    from flax_densenet.export import formats, release, sample_images

    file = arguments.resolve('file', file, 'the file to write: export(model, file)')
    predictor = _predictor(model)
    trained, path = predictor.trained, predictor.path or 'the model'
    file_format = format or formats.by_ending(file)
    shipped = release.Release(
        trained,
        None if trained.step is None else predictor.path,
        file_format,
        formats.Options(inputs, precision, license=license),
        data_license,
    )
    shipped.check(file)
    files = [name for name in (file, predictor.path) if name and os.path.isfile(name)]
    if len(files) == 2 and os.path.samefile(*files):
        raise UserError(f'file={file} is the model itself; name another file')
    patterns = [images] if arguments.is_path(images) else images
    if patterns:
        if not isinstance(patterns, Sequence):
            raise UserError(
                f'images: {arguments.describe(images)}; give files, folders or patterns'
            )
        what = 'a file, a folder or a pattern'
        patterns = [arguments.check_path('images', one, what) for one in patterns]
        preparation = trained.preparation
        samples = sample_images.from_files(patterns, preparation)
    else:
        samples = sample_images.from_model(
            trained, path, _data_settings(trained), integers=precision == 'int8'
        )
    facts = release.run(file, shipped, samples)
    return ExportResult(file, file_format, dict(facts))


def _check_devices():
    """Raises `UserError` if JAX_PLATFORMS names devices that are not available."""
    from flax_densenet.system import platforms

    if platforms.is_chosen():
        platforms.check_devices()


def _predictor(model):
    from flax_densenet.inference import predictor

    if isinstance(model, predictor.Predictor):
        return model
    what = 'the result of load, or what it accepts'
    return load(arguments.check_path('model', model, what))


def _check_data(data, labels):
    """Raises `UserError` for arguments of `evaluate` of a wrong kind."""
    if labels and not arguments.is_path(data):
        raise UserError(
            f'labels={arguments.describe(labels)} needs data: the folder of the images '
            'in the table'
        )
    if isinstance(data, tuple) and len(data) == 2:
        return
    if data is not None and not arguments.is_path(data):
        raise UserError(
            f'data: {arguments.describe(data)}; give a folder, a data source, or a '
            'tuple of two arrays: (images, labels)'
        )


def _data_settings(trained, data=None, labels='', **changes):
    """The settings to measure a model with, by default on its own data."""
    return _settings_of(trained.metadata, data, labels, **changes)


def _settings_of(metadata, data=None, labels='', **changes):
    from flax_densenet import settings
    from flax_densenet.cli import arguments

    fields = {'source': '', **metadata['data'], **changes}
    fields['image_size'] = fields.get('image_size') or metadata['image_size']
    if data is not None:
        fields |= {'source': arguments.source(os.fspath(data)), 'labels': labels}
    return settings.from_saved({'data': fields})
