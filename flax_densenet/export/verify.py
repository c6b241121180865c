"""Verifies that an exported file computes the same as its model."""

import dataclasses

import jax
import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.evaluation import evaluate, metrics
from flax_densenet.export import runtimes
from flax_densenet.inference import programs
from flax_densenet.weights import trained as trained_lib

# The largest accepted difference in probabilities, or in logits relative to the largest
# logit. Measured on small networks: 6e-7, 4e-4 and 4e-3. For int8 the mean difference
# counts, since individual predictions near a decision boundary may differ.
BOUNDS = {'float32': 1e-4, 'float16': 0.01, 'bfloat16': 0.05, 'int8': 0.05}
# The same for the score of unusual images, relative to scores above 1. Integers change
# the score more, so for int8 its difference is only reported.
UNUSUAL_BOUNDS = {'float32': 1e-2, 'float16': 0.1, 'bfloat16': 0.5}


@dataclasses.dataclass(frozen=True)
class Verification:
    """How the results of a file in a runtime compare with the model.

    Attributes:
      runtime: name of the runtime.
      outputs: float32 `[N, num_classes]`.
      largest: the largest difference, for logits relative to the largest logit.
      mean: the mean difference.
      unusual: the largest difference in the score of unusual images; None if the file
        has no score.
    """

    runtime: str
    outputs: np.ndarray
    largest: float
    mean: float
    unusual: float | None = None

    @property
    def differences(self) -> str:
        """Describes the differences."""
        text = f'largest difference {self.largest:.1e}, mean {self.mean:.1e}'
        if self.unusual is not None:
            text += f', of the score of unusual images {self.unusual:.1e}'
        return text


def compute(
    trained: trained_lib.Trained, images: np.ndarray, inputs: str
) -> np.ndarray:
    """The (calibrated) outputs of the model, float32 `[N, num_classes]`.

    Args:
      trained: the model.
      images: uint8 `[N, H, W, C]`.
      inputs: `images` for probabilities (or scores, if there are operating points),
        `normalized` for logits.
    """
    options = dict(mean=trained.mean, std=trained.std)
    apply = jax.jit(
        lambda variables, batch: evaluate.forward(
            trained.module, variables, {'image': batch}, **options
        )
    )
    size, rows = min(len(images), 16), []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        filled = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), 0)])
        rows.append(np.asarray(apply(trained.variables, filled))[: len(batch)])
    logits = np.concatenate(rows).astype(np.float32)
    if inputs == 'normalized' and not trained.calibration:
        return logits
    logits = evaluate.finish_logits(trained, logits)
    if inputs == 'normalized':
        return logits
    return metrics.activate(logits, trained.outputs).astype(np.float32)


def compute_unusual(
    trained: trained_lib.Trained, images: np.ndarray
) -> np.ndarray | None:
    """The model's score of unusual images, float32 `[N]`; None if it has none.

    Args:
      trained: the model.
      images: uint8 `[N, H, W, C]`.
    """
    if not trained.decisions or not trained.decisions.unusual:
        return None
    return programs.Programs(trained, 16)(images).unusual


def as_inputs(
    images: np.ndarray, trained: trained_lib.Trained, inputs: str, *, nchw: bool
):
    """Converts uint8 images `[N, H, W, C]` to one of `onnx_network.INPUTS`."""
    if inputs == 'images':
        return images
    made = np.asarray(trained_lib.normalize(images, mean=trained.mean, std=trained.std))
    return np.ascontiguousarray(made.transpose(0, 3, 1, 2)) if nchw else made


def check(
    path: str,
    trained: trained_lib.Trained,
    images: np.ndarray,
    expected: np.ndarray,
    *,
    names: tuple[str, ...],
    inputs: str,
    precision: str,
    nchw: bool,
    unusual: np.ndarray | None = None,
) -> list[Verification]:
    """Runs a file in all installed runtimes and compares the results.

    Args:
      path: the file.
      trained: the model.
      images: uint8 `[N, H, W, C]`.
      expected: the output of `compute`.
      names: keys of `runtimes.RUNTIMES` that can run the file.
      inputs: `images` or `normalized`.
      precision: precision of the file, a key of `BOUNDS`.
      nchw: whether normalized images are `[N, C, H, W]`.
      unusual: the output of `compute_unusual`, for files with the score.

    Raises:
      UserError: no runtime is installed, one cannot run the file, or a difference is
        larger than `BOUNDS`.
    """
    installed = [name for name in names if runtimes.is_installed(name)]
    if not installed:
        raise UserError(
            f'to verify the file {" or ".join(names)} is needed: '
            f'pip install {runtimes.RUNTIMES[names[0]][1][0]}'
        )
    given = as_inputs(images, trained, inputs, nchw=nchw)
    about = trained.module.fields() | {
        'family': trained.module.family,
        'channels': images.shape[-1],
    }
    verifications = []
    for name in installed:
        outputs, reason = runtimes.run(name, path, given, about)
        if outputs is None:
            raise UserError(f'nothing was exported: {name} cannot run it ({reason})')
        score = None
        if unusual is not None and outputs.shape[1] == expected.shape[1] + 1:
            outputs, score = outputs[:, :-1], outputs[:, -1]
        verification = _compare(name, outputs, expected, inputs, precision)
        if score is not None:
            verification = _compare_score(verification, score, unusual, precision)
        verifications.append(verification)
    return verifications


def _compare_score(verification, score, expected, precision):
    """Adds the difference in scores; raises if it is large."""
    away = np.abs(score - expected) / np.maximum(1, np.abs(expected))
    largest = float(away.max())
    bound = UNUSUAL_BOUNDS.get(precision, np.inf)
    if not np.isfinite(score).all() or not largest <= bound:
        raise UserError(
            f'nothing was exported: in {verification.runtime} the score of unusual '
            f'images differs from the model by {largest:.2g}, more than {bound:g} for '
            f'{precision}; train.unusual=off leaves it out'
        )
    return dataclasses.replace(verification, unusual=largest)


def _compare(name, outputs, expected, inputs, precision):
    if outputs.shape != expected.shape or not np.isfinite(outputs).all():
        raise UserError(
            f'nothing was exported: {name} gives {list(outputs.shape)} of it, the '
            f'model {list(expected.shape)}, or values that are not finite'
        )
    scale = max(1.0, np.abs(expected).max()) if inputs == 'normalized' else 1.0
    away = np.abs(outputs - expected) / scale
    verification = Verification(name, outputs, float(away.max()), float(away.mean()))
    decides = verification.mean if precision == 'int8' else verification.largest
    if not decides <= BOUNDS[precision]:  # also if the model's outputs are NaN
        raise UserError(
            f'nothing was exported: in {name} it differs from the model by '
            f'{decides:.2g}, more than {BOUNDS[precision]:g} for {precision}'
        )
    return verification
