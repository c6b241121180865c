"""Compiles inference programs for a few batch sizes.

    programs = Programs(trained, batch_size=32)
    probabilities = programs(images).probabilities

Nothing is traced while images wait, and a single image is not padded to 32. Everything
that does not depend on the images is computed once (see `folded`).

The buffer of the images is not donated, since no result has its shape and dtype, and
XLA would print a warning.

>>> split(9, (1, 4, 16))  # three batches, one after the other
[4, 4, 1]
>>> split(13, (1, 4, 16))  # padded if that adds at most a third
[16]
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.inference import cams as cams_lib
from flax_densenet.inference import explain
from flax_densenet.models import folded
from flax_densenet.models import tta as tta_lib
from flax_densenet.weights import heads, operating_points
from flax_densenet.weights.trained import Trained, normalize

# On a CPU, sixteen images take sixteen times as long as one; on a GPU hardly longer.
SIZES = (1, 4, 16)


def split(count: int, sizes: Sequence[int]) -> list[int]:
    """The batch sizes to use for `count` images.

    Args:
      count: number of images, at least 1.
      sizes: available batch sizes, ascending; the first one is 1.
    """
    chosen = []
    while count > 0:
        chosen.append(max(size for size in sizes if 3 * size <= 4 * count))
        count -= chosen[-1]
    return chosen


class Computed(NamedTuple):
    """The results for N images.

    Attributes:
      probabilities: float32 `[N, num_classes]`.
      features: pooled features, float32 `[N, F]`.
      cams: class activation maps `[N, h, w]`; None if no classes were given.
      unusual: the score of unusual images, float32 `[N]` (see `weights.unusual`); None
        if the model has no score.
    """

    probabilities: Any
    features: Any
    cams: Any
    unusual: Any


def predict_probabilities(
    module,
    arrays,
    images,
    classes=None,
    *,
    mean,
    std,
    tta,
    outputs,
    points=None,
    calibration=None,
    method=explain.GRADCAM,
    unusual=None,
):
    """Predicts images; this is the function that is compiled.

    Args:
      module: the network.
      arrays: the arrays from `folded.fold` and `arrays_of`.
      images: uint8 or uint16 `[N, H, W, C]`.
      classes: int32 `[N]`, the classes of the maps; -1 for the most likely one.
      mean, std, tta, outputs, points, calibration, unusual: see `options_of`.
      method: the method for the maps, a fast one of `explain.METHODS`.
    """
    images = normalize(images, mean=mean, std=std)
    images, *others = tta_lib.views_of(images, tta)
    head, finish = arrays['head'], None
    if method == 'layercam':
        layer, finish = folded.before_last_halving(module, arrays, images)
        maps = finish(layer)
    else:
        maps = folded.features(module, arrays, images)
    pooled = module.apply(head, maps, method='pool')
    logits = module.apply(head, maps, method='head').astype(jnp.float32)
    score = None
    if unusual is not None:
        unusual = unusual.with_arrays(arrays['unusual'])
        score = score_of(module, head, unusual, pooled, logits)
    pooled = pooled.astype(jnp.float32)
    if others:
        more = [folded.logits(module, arrays, view) for view in others]
        views = jnp.stack([logits, *(one.astype(jnp.float32) for one in more)])
        logits = _mean_of_views(views, outputs)
    if calibration is not None:
        logits = calibration.apply(logits, xp=jnp)
    probabilities = _ACTIVATIONS[outputs](logits)
    if points is not None:
        probabilities = operating_points.scale(probabilities, points, xp=jnp)
    if classes is None:
        return Computed(probabilities, pooled, None, score)
    # Chosen by probabilities, which can be equal where logits differ, so that the map
    # belongs to the class that the host considers most likely.
    classes = jnp.where(classes < 0, probabilities.argmax(-1), classes)
    if finish is None:
        cams = cams_lib.from_features(module, head, maps, classes, method=method)
    else:
        cams = cams_lib.of_layer(
            layer,
            lambda layer: module.apply(head, finish(layer), method='head'),
            classes,
            method=method,
        )
    return Computed(probabilities, pooled, cams, score)


def score_of(module, head, unusual, pooled, logits):
    """The score of unusual images, of the images themselves (no other views).

    Args:
      unusual: the fitted score, with traced arrays.
      pooled: pooled features, `[N, F]`.
      logits: `[N, C]`, before calibration.
    """
    if module.members > 1:
        logits = module.apply(head, pooled, method='classify_each')
    return unusual.score(pooled.astype(jnp.float32), logits, xp=jnp)


_ACTIVATIONS = {
    heads.SOFTMAX: jax.nn.softmax,
    heads.SIGMOID: jax.nn.sigmoid,
    heads.NONE: lambda logits: logits,
}


def _mean_of_views(found, outputs):
    if outputs == heads.NONE:
        return found.mean(0)
    return tta_lib.mean_logits(found, multi_label=outputs == heads.SIGMOID)


def options_of(trained: Trained) -> dict:
    """The keyword arguments of `predict_probabilities` for a trained model."""
    return {
        'mean': trained.mean,
        'std': trained.std,
        'tta': trained.tta,
        'outputs': trained.outputs,
        'points': trained.points,
        'calibration': trained.calibration,
        'unusual': trained.decisions and trained.decisions.unusual,
    }


def arrays_of(trained: Trained) -> dict[str, Any]:
    """The arrays that `predict_probabilities` needs beyond those of `folded.fold`."""
    unusual = trained.decisions and trained.decisions.unusual
    return {'unusual': unusual.arrays()} if unusual else {}


class Programs:
    """The inference programs of a trained model; safe to call from many threads.

    Attributes:
      sizes: batch sizes, ascending; the first one is 1. Each program is compiled when
        it is first needed, or read from the persistent cache of JAX if it is enabled.
    """

    def __init__(self, trained: Trained, batch_size: int):
        """Prepares the programs; nothing is compiled yet.

        Args:
          trained: the model.
          batch_size: the largest size; more images are computed in several batches.
        """
        smaller = (size for size in SIZES if size < batch_size)
        self.sizes = tuple(sorted({1, *smaller, batch_size}))
        self._trained = trained
        self._compiled: dict[Any, Any] = {}
        self._lock = threading.Lock()
        self._put_off: set[Any] = set()

    @functools.cached_property
    def _arrays(self):
        return self._fold(self._trained.module)

    @functools.cached_property
    def _plain_arrays(self):
        """The arrays for maps with gradients through dense blocks."""
        module = folded.differentiable(self._trained.module)
        return self._arrays if module == self._trained.module else self._fold(module)

    def _fold(self, module):
        with mesh_lib.computing(self._trained.mesh):
            arrays = folded.fold(module, self._trained.variables)
        arrays |= arrays_of(self._trained)
        return mesh_lib.replicate(arrays, self._trained.mesh)

    def share(self, other: 'Programs'):
        """Uses the programs of a model that differs only in its variables."""
        self._compiled, self._lock = other._compiled, other._lock
        self._put_off = other._put_off

    def compile(self, size: int, maps: str = '', shape=None):
        """The program for a batch size, compiled if needed.

        Args:
          size: number of images.
          maps: the method for its maps, see `explain.METHODS`; '' for no maps.
          shape: (height, width, channels) of the images; by default as in training.
        """
        if shape is None:
            preparation = self._trained.preparation
            shape = (*preparation.shape, preparation.channels)
        key = size, maps, shape
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(*key)
            return self._compiled[key]

    def _compile(self, size, maps, shape):
        rows = self._sharding(size)
        dtype = self._trained.preparation.dtype
        given = [jax.ShapeDtypeStruct((size, *shape), dtype, sharding=rows)]
        if maps:
            given.append(jax.ShapeDtypeStruct((size,), jnp.int32, sharding=rows))
        module, options = self._trained.module, options_of(self._trained)
        if maps == 'layercam':
            module = folded.differentiable(module)
        if maps:
            options['method'] = maps
        function = functools.partial(predict_probabilities, module, **options)
        arrays = self._arrays_of(maps)
        with mesh_lib.computing(self._trained.mesh):
            return jax.jit(function).lower(arrays, *given).compile()

    def _arrays_of(self, maps):
        return self._plain_arrays if maps == 'layercam' else self._arrays

    def _sharding(self, size):
        """Splits the rows over the devices if possible, otherwise replicates them."""
        mesh = self._trained.mesh
        if mesh.is_multi_process or size % mesh.size:
            return mesh_lib.replicated(mesh)
        return mesh_lib.split_rows(mesh)

    def __call__(self, images: np.ndarray, classes=None, method: str = explain.GRADCAM):
        """`predict_probabilities` for numpy images `[N, H, W, C]`, N > 0.

        Args:
          images: prepared images.
          classes: for maps, one class index for all images, or one for each; None for
            no maps.
          method: the method for the maps, a fast one of `explain.METHODS`.
        """
        given, parts, start = [images], [], 0
        maps = '' if classes is None else method
        if classes is not None:
            classes = np.asarray(classes, np.int32)
            given.append(np.broadcast_to(classes, len(images)))
        for size in self._plan(len(images), maps, images.shape[1:]):
            batch = [x[start : start + size] for x in given]
            parts.append(self._run(size, batch, maps))
            start += size
        joined = zip(*parts, strict=True)
        return Computed(
            *(None if one[0] is None else np.concatenate(one) for one in joined)
        )

    def _run(self, size, given, maps):
        count, shape = len(given[0]), given[0].shape[1:]
        program = self.compile(size, maps, shape)
        missing = size - count
        filled = [np.concatenate([x, np.repeat(x[-1:], missing, 0)]) for x in given]
        mesh = self._trained.mesh
        if self._sharding(size) == mesh_lib.replicated(mesh):
            filled = mesh_lib.replicate(filled, mesh)
        else:
            filled = mesh_lib.to_global(filled, mesh)
        results = program(self._arrays_of(maps), *filled)
        return [None if part is None else np.asarray(part)[:count] for part in results]

    def _plan(self, count, maps, shape):
        """The sizes from `split`, or a larger one that is already compiled.

        Compiling takes longer than computing some padding. A size that was not needed
        before, such as at the end of a list of files, is therefore padded if possible.
        """
        wanted = split(count, self.sizes)
        missing = {(size, maps, shape) for size in wanted} - self._compiled.keys()
        if missing - self._put_off:
            self._put_off |= missing
            for size in self.sizes:
                if size >= count and (size, maps, shape) in self._compiled:
                    return [size]
        return wanted
