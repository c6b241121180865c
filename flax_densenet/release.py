"""From a trained model to a file that was tried, with its card beside it."""

import dataclasses
import os

import numpy as np

from flax_densenet import evaluate, export, sample_images, verify


def run(
    out: str,
    trained: evaluate.Trained,
    file_format: str,
    options: export.Options,
    samples: sample_images.Samples,
) -> list[tuple[str, str]]:
    """Exports, once every runtime that is installed agrees with the model.

    Args:
      out: the file.
      options: without `calibration`, which is of the samples.

    Returns:
      What is to be told of the file, by name: its size, runtimes, differences, and
      accuracy before and after where labels are known.

    Raises:
      UserError: it cannot be written, or a runtime says otherwise; then what was there
        stays.
    """
    known = export.FORMATS[file_format]
    options = dataclasses.replace(
        options,
        inputs=options.inputs or known.inputs[0],
        calibration=sample_images.batches(samples.calibration),
    )
    expected = verify.compute(trained, samples.images, options.inputs)
    found = []

    def try_out(part):
        found.extend(
            verify.check(
                part,
                trained,
                samples.images,
                expected,
                names=known.runtimes,
                inputs=options.inputs,
                precision=options.precision,
                nchw=known.channels_first,
            )
        )

    export.save(out, trained, file_format, options, verify=try_out)
    return [
        *_describe(out, file_format, options),
        *((one.runtime, f'{_difference(one)}, {samples.where}') for one in found),
        *_agreement(expected, found[0].outputs, samples.labels, options.precision),
    ]


def _describe(out, file_format, options):
    size = os.path.getsize(out) / 2**20
    facts = [('format', file_format), ('size', f'{size:.1f} MiB')]
    if file_format == 'onnx':
        from flax_densenet import onnx_graph

        facts.append(('opset', str(onnx_graph.OPSET)))
    precision = options.precision
    if precision == 'int8':
        precision += ', computed in integers'
    elif precision != 'float32':
        precision += ' weights, computed in float32'
    return [*facts, ('inputs', options.inputs), ('precision', precision)]


def _difference(found):
    return f'largest difference {found.largest:.1e}, mean {found.mean:.1e}'


def _agreement(expected, outputs, labels, precision):
    """What rounding did to the accuracy; without labels, how often both agree."""
    if precision == 'float32':
        return
    before, after = expected.argmax(-1), outputs.argmax(-1)
    if labels is not None:
        accuracy = [100 * np.mean(said == labels) for said in (before, after)]
        yield (
            'accuracy',
            f'{accuracy[0]:.2f} % of {len(labels)} images before, {accuracy[1]:.2f} % '
            'in the file',
        )
    else:
        yield 'same class', f'{100 * np.mean(before == after):.1f} % of the images'
