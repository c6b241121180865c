"""Exports a trained model: writes the file, verifies it, and writes its model card."""

import dataclasses
import os

import jax
import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.export import (
    formats,
    model_card,
    onnx_graph,
    onnx_int8,
    sample_images,
    verify,
)
from flax_densenet.weights import trained as trained_lib


@dataclasses.dataclass(frozen=True)
class Release:
    """What to export, with facts for its card.

    Attributes:
      trained: the model.
      workdir: folder of its run, or None.
      file_format: a key of `formats.FORMATS`.
      options: options of the export, without `calibration`, which the samples provide.
      data_license: license of the data; None if unknown.
    """

    trained: trained_lib.Trained
    workdir: str | None
    file_format: str
    options: formats.Options
    data_license: str | None = None

    def check(self, out: str):
        """Raises `UserError` if the export is impossible, before the slow part."""
        formats.check_format(out, self.file_format, self.options)
        formats.check_head(self.trained.module, self.file_format)
        folder = os.path.dirname(os.path.abspath(out))
        if not os.path.isdir(folder):
            raise UserError(f'--out={out}: there is no folder {folder}; make it first')
        model_card.check_installed()
        if self.options.precision == 'int8':
            onnx_int8.check(self.trained.module, self.trained.metadata)
        if self.file_format == 'onnx':
            onnx_graph.import_onnx()
        if self.file_format != 'huggingface':
            model_card.check(model_card.path_for(out))

    def card(self, out: str, facts) -> str:
        """The model card, as Markdown."""
        return model_card.render(
            self.trained,
            workdir=self.workdir,
            facts=facts,
            file=out,
            file_format=self.file_format,
            license=self.options.license,
            data_license=self.data_license,
            hub=self.file_format == 'huggingface',
        )


def run(
    out: str, release: Release, samples: sample_images.Samples
) -> list[tuple[str, str]]:
    """Exports a model if all installed runtimes agree with it.

    Args:
      out: the file or the folder.
      release: what to export.
      samples: images for comparing the file with the model.

    Returns:
      Facts about the file as `(name, value)`: its size, the differences in each
      runtime, and the accuracy before and after if labels are known.

    Raises:
      UserError: the file cannot be written, or a runtime disagrees. An existing file
        then stays.
    """
    release.check(out)
    trained, file_format = _in_float32(release.trained), release.file_format
    known = formats.FORMATS[file_format]
    inputs = release.options.inputs or known.inputs[0]
    options = dataclasses.replace(
        release.options,
        inputs=inputs,
        calibration=sample_images.batches(samples.calibration),
    )
    expected = verify.compute(trained, samples.images, inputs)
    unusual = verify.compute_unusual(trained, samples.images)
    facts = []

    def try_out(part):
        verifications = verify.check(
            part,
            trained,
            samples.images,
            expected,
            names=known.runtimes,
            inputs=options.inputs,
            precision=options.precision,
            nchw=known.channels_first,
            unusual=unusual,
        )
        facts.extend(_describe(part, file_format, options))
        facts.extend(_left_out(trained, file_format))
        facts.extend(
            (one.runtime, f'{one.differences}, {samples.where}')
            for one in verifications
        )
        outputs, precision = verifications[0].outputs, options.precision
        facts.extend(_agreement(expected, outputs, samples.labels, precision))
        if file_format == 'huggingface':
            path = os.path.join(part, model_card.HUB_FILE)
            model_card.save(path, release.card(out, facts))

    formats.save(out, trained, file_format, options, verify=try_out)
    if file_format != 'huggingface':
        card = model_card.path_for(out)
        model_card.save(card, release.card(out, facts))
        facts.append(('model card', os.path.basename(card)))
    return facts


def _in_float32(trained):
    """The model with float32 activations, as in all exported files."""
    variables = trained.variables
    if trained.module.dtype == 'float64':
        variables = jax.tree.map(lambda array: array.astype(np.float32), variables)
    module = trained.module.clone(dtype='float32')
    return dataclasses.replace(trained, module=module, variables=variables)


def _describe(out, file_format, options):
    size = _size(out) / 2**20
    facts = [('format', file_format), ('size', f'{size:.3g} MiB')]
    if file_format == 'onnx':
        facts.append(('opset', str(onnx_graph.OPSET)))
    precision = options.precision
    if precision == 'int8':
        precision += ', computed in integers'
    elif precision != 'float32':
        precision += ' weights, computed in float32'
    return [*facts, ('inputs', options.inputs), ('precision', precision)]


def _left_out(trained, file_format):
    """What was fitted after training but cannot be stored in a file."""
    found = trained.decisions
    if file_format in ('onnx', 'stablehlo', 'huggingface') or found is None:
        return
    if found.unusual or found.sets:
        yield (
            'left out',
            'the score of unusual images and the sets of classes, which '
            '--format=onnx, stablehlo and huggingface keep',
        )


def _size(path):
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path))
    return os.path.getsize(path)


def _agreement(expected, outputs, labels, precision):
    """The effect of rounding on the accuracy or, without labels, on the predictions."""
    if precision == 'float32':
        return
    before, after = expected.argmax(-1), outputs.argmax(-1)
    if labels is not None:
        accuracy = [100 * np.mean(classes == labels) for classes in (before, after)]
        yield (
            'accuracy',
            f'{accuracy[0]:.2f} % of {len(labels)} images before, {accuracy[1]:.2f} % '
            'in the file',
        )
    else:
        yield 'same class', f'{100 * np.mean(before == after):.1f} % of the images'
