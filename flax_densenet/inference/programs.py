"""Inference compiled ahead of time: a program for each of a few batch sizes.

    programs = Programs(trained, batch_size=32)
    probabilities, features, _ = programs(images)

Nothing is traced while images wait, and a single image is not computed as 32. What the
images do not decide is computed once, when the programs are made (`folded`).

The buffer of the images is not donated: no result has its shape and type, so XLA could
put nothing in its place and would say so.

>>> split(9, (1, 4, 16))  # one after the other, in these sizes
[4, 4, 1]
>>> split(13, (1, 4, 16))  # filled up, where that costs a third at most
[16]
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.inference import grad_cam
from flax_densenet.models import folded
from flax_densenet.models import tta as tta_lib
from flax_densenet.weights.trained import Trained, normalize

# On a CPU sixteen take sixteen times as long as one, on a GPU hardly longer.
SIZES = (1, 4, 16)


def split(count: int, sizes: Sequence[int]) -> list[int]:
    """The batch sizes in which `count` images are computed.

    Args:
      count: of images, at least 1.
      sizes: compiled batch sizes, ascending, the first of them 1.
    """
    chosen = []
    while count > 0:
        chosen.append(max(size for size in sizes if 3 * size <= 4 * count))
        count -= chosen[-1]
    return chosen


def predict_probabilities(
    module, arrays, images, classes=None, *, mean, std, tta, multi_label
):
    """What a model says of images: the function that is compiled.

    Args:
      arrays: of `folded.fold`.
      images: uint8 `[N, H, W, C]`.
      classes: int32 `[N]`, of the maps; -1 takes the likeliest.

    Returns:
      Probabilities `[N, num_classes]` and pooled features `[N, F]`, float32, and
      Grad-CAM maps `[N, h, w]`, None without `classes`.
    """
    images = normalize(images, mean=mean, std=std)
    images, *others = tta_lib.images_of(images, tta)
    maps, head = folded.features(module, arrays, images), arrays['head']
    pooled = module.apply(head, maps, method='pool').astype(jnp.float32)
    logits = module.apply(head, maps, method='head').astype(jnp.float32)
    if others:
        seen = [folded.logits(module, arrays, view) for view in others]
        found = jnp.stack([logits, *(one.astype(jnp.float32) for one in seen)])
        logits = tta_lib.mean_logits(found, multi_label=multi_label)
    probabilities = jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits)
    if classes is None:
        return probabilities, pooled, None
    # By probabilities, which can be equal where logits are not, so that the map is of
    # the class that the host takes for the likeliest.
    classes = jnp.where(classes < 0, probabilities.argmax(-1), classes)
    _, cams = grad_cam.from_features(head, maps, classes, module=module)
    return probabilities, pooled, cams


def options_of(trained: Trained) -> dict:
    """Of `predict_probabilities`, beside module and arrays."""
    metadata = trained.metadata
    return {
        'mean': tuple(metadata['mean']),
        'std': tuple(metadata['std']),
        'tta': tta_lib.of_metadata(metadata),
        'multi_label': bool(metadata.get('multi_label')),
    }


class Programs:
    """A trained model's inference; may be called from many threads.

    Attributes:
      sizes: batch sizes, ascending, the first of them 1. Each is compiled when it is
        wanted, by what JAX's persistent cache has of it where that is set up.
    """

    def __init__(self, trained: Trained, batch_size: int):
        """Compiles nothing yet.

        Args:
          batch_size: the largest of the sizes; more images are computed in several.
        """
        smaller = (size for size in SIZES if size < batch_size)
        self.sizes = tuple(sorted({1, *smaller, batch_size}))
        self._trained = trained
        self._compiled: dict[Any, Any] = {}
        self._lock = threading.Lock()
        self._put_off: set[Any] = set()

    @functools.cached_property
    def _arrays(self):
        found = folded.fold(self._trained.module, self._trained.variables)
        return mesh_lib.replicate(found, self._trained.mesh)

    def compile(self, size: int, maps: bool = False, shape=None):
        """The program of a batch size, without Grad-CAM or with it.

        Args:
          shape: (height, width, channels) of the images; by default the model's own.
        """
        if shape is None:
            metadata = self._trained.metadata
            shape = (*(metadata['image_size'],) * 2, len(metadata['mean']))
        key = size, maps, shape
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(*key)
            return self._compiled[key]

    def _compile(self, size, maps, shape):
        rows = self._sharding(size)
        given = [jax.ShapeDtypeStruct((size, *shape), jnp.uint8, sharding=rows)]
        if maps:
            given.append(jax.ShapeDtypeStruct((size,), jnp.int32, sharding=rows))
        function = functools.partial(
            predict_probabilities, self._trained.module, **options_of(self._trained)
        )
        return jax.jit(function).lower(self._arrays, *given).compile()

    def _sharding(self, size):
        """Each device its rows where they divide, else all of them on each."""
        mesh = self._trained.mesh
        if mesh.is_multi_process or size % mesh.size:
            return mesh_lib.replicated(mesh)
        return mesh_lib.split_rows(mesh)

    def __call__(self, images: np.ndarray, classes=None):
        """`predict_probabilities` of numpy images uint8 `[n, H, W, C]`, n > 0.

        Args:
          classes: an index for all, or one for each image, where maps are wanted.
        """
        given, parts, start = [images], [], 0
        if classes is not None:
            classes = np.asarray(classes, np.int32)
            given.append(np.broadcast_to(classes, len(images)))
        for size in self._plan(len(images), len(given) > 1, images.shape[1:]):
            parts.append(self._run(size, [x[start : start + size] for x in given]))
            start += size
        joined = zip(*parts, strict=True)
        return tuple(None if one[0] is None else np.concatenate(one) for one in joined)

    def _run(self, size, given):
        count, maps, shape = len(given[0]), len(given) > 1, given[0].shape[1:]
        program = self.compile(size, maps, shape)
        missing = size - count
        filled = [np.concatenate([x, np.repeat(x[-1:], missing, 0)]) for x in given]
        mesh = self._trained.mesh
        if self._sharding(size) == mesh_lib.replicated(mesh):
            filled = mesh_lib.replicate(filled, mesh)
        else:
            filled = mesh_lib.to_global(filled, mesh)
        found = program(self._arrays, *filled)
        return [None if part is None else np.asarray(part)[:count] for part in found]

    def _plan(self, count, maps, shape):
        """Sizes to compute in: those of `split`, or one that is there already.

        Compiling takes longer than computing some images for nothing. So what was not
        wanted before, as the end of a list of files, is filled up where it can be.
        """
        wanted = split(count, self.sizes)
        missing = {(size, maps, shape) for size in wanted} - self._compiled.keys()
        if missing - self._put_off:
            self._put_off |= missing
            for size in self.sizes:
                if size >= count and (size, maps, shape) in self._compiled:
                    return [size]
        return wanted
