"""Explanations that run the network many times: occlusion and integrated gradients.

In a normalized image, 0 is the mean color of the training images. This value hides a
patch, and the path of integrated gradients starts from it.

* Occlusion (Zeiler and Fergus, 1311.2901): patches that overlap by half. The value of a
  pixel is the decrease of the logit of the class, averaged over the patches that cover
  it.
* Integrated gradients (Sundararajan et al., 1703.01365, equation 1): the image times
  the mean gradient of the logit along the straight path to it, by Gauss-Legendre
  quadrature. The sum over all pixels and channels is the increase of the logit.

In both, negative values become 0, so only what supports the class is kept.
"""

import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.inference import explain
from flax_densenet.models import folded
from flax_densenet.weights.trained import Trained, normalize

# Variants of an image that are computed at once; gradients keep all activations.
_FORWARD, _BACKWARD = 16, 8


def occluded_logits(module, arrays, image, chosen, tops, lefts, sides, *, mean, std):
    """The logits `[B]` of a class, each with one patch hidden.

    Args:
      module: the network.
      arrays: the result of `folded.fold`.
      image: a prepared image `[H, W, C]`.
      chosen: int32, the class.
      tops, lefts: int32 `[B]`, corners of the patches; a patch outside of the image
        hides nothing.
      sides: int32 `[2]`, height and width of the patches.
      mean, std: `[C]`, for images from 0 to 1.
    """
    pixels = normalize(image[None], mean=mean, std=std)
    rows, columns = (jnp.arange(n) for n in image.shape[:2])
    inside = _covers(rows, tops, sides[0])[:, :, None]
    inside = inside & _covers(columns, lefts, sides[1])[:, None, :]
    pixels = jnp.where(inside[..., None], 0, pixels)
    return folded.logits(module, arrays, pixels)[:, chosen].astype(jnp.float32)


def _covers(places, starts, side):
    places, starts = places[None], starts[:, None]
    return (places >= starts) & (places < starts + side)


def weighted_gradients(module, arrays, image, chosen, places, weights, *, mean, std):
    """The image times a weighted sum of gradients, summed over channels: `[H, W]`.

    Args:
      module, arrays, image, chosen, mean, std: see `occluded_logits`.
      places: float32 `[B]`, positions from 0 (the mean color) to 1 (the image).
      weights: float32 `[B]`, weights of the gradients at these positions.
    """
    pixels = normalize(image[None], mean=mean, std=std)

    def of_class(pixels):
        return folded.logits(module, arrays, pixels)[:, chosen].sum()

    path = places.reshape(-1, 1, 1, 1).astype(pixels.dtype) * pixels
    gradients = jax.grad(of_class)(path)
    total = (weights.reshape(-1, 1, 1, 1) * gradients).sum(0)
    return (pixels[0] * total).sum(-1).astype(jnp.float32)


class Perturbations:
    """The programs of one trained model; safe to call from many threads."""

    def __init__(self, trained: Trained):
        """Compiles nothing yet."""
        self._trained = trained
        self._compiled: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def map_of(
        self, image: np.ndarray, chosen: int, options: explain.Options
    ) -> np.ndarray:
        """The map of a class for a prepared image `[H, W, C]`: float32 `[H, W]`."""
        made = {'occlusion': self.occlusion, 'integrated_gradients': self.integrate}
        signed = made[options.method](image, chosen, options)
        return np.maximum(signed, 0)

    def occlusion(self, image, chosen, options) -> np.ndarray:
        """The signed contribution of each pixel to the logit: float32 `[H, W]`."""
        height, width = image.shape[:2]
        side = max(1, -(-min(height, width) // options.patches))
        stride = max(1, side // 2)
        tops, lefts = (_starts(n, side, stride) for n in (height, width))
        corners = [(top, left) for top in tops for left in lefts]
        # The last variant hides nothing.
        places = np.array([*corners, (height, width)], np.int32)
        logits = self._run(
            occluded_logits, image, chosen, list(places.T), (side, side), _FORWARD
        )
        lost = logits[-1] - logits[:-1]
        total, count = np.zeros((2, height, width))
        for (top, left), value in zip(corners, lost, strict=True):
            patch = np.s_[top : top + side, left : left + side]
            total[patch] += value
            count[patch] += 1
        return (total / count).astype(np.float32)

    def integrate(self, image, chosen, options) -> np.ndarray:
        """The signed contribution of each pixel to the logit: float32 `[H, W]`."""
        nodes, weights = np.polynomial.legendre.leggauss(options.steps)
        given = [(nodes + 1) / 2, weights / 2]
        given = [values.astype(np.float32) for values in given]
        parts = self._run(weighted_gradients, image, chosen, given, (), _BACKWARD)
        return parts.sum(0)

    def _run(self, function, image, chosen, variants, sides, size):
        """The results of a program for all variants, one batch at a time."""
        devices = self._split()
        size *= devices
        more = (np.array(sides, np.int32),) if sides else ()
        program = self._program(function, image.shape, size, bool(sides))
        arrays, mesh = self._arrays[function is weighted_gradients], self._trained.mesh
        common = mesh_lib.replicate((image, np.int32(chosen), *more), mesh)
        found = []
        for start in range(0, len(variants[0]), size):
            batch = [values[start : start + size] for values in variants]
            count = len(batch[0])
            fill = [np.zeros(size - count, values.dtype) for values in batch]
            batch = [np.concatenate(pair) for pair in zip(batch, fill, strict=True)]
            if devices > 1:
                batch = mesh_lib.to_global(batch, mesh)
            else:
                batch = mesh_lib.replicate(batch, mesh)
            result = program(arrays, *common[:2], *batch, *common[2:])
            found.append(np.asarray(result)[: count if result.ndim == 1 else None])
        return np.concatenate(found) if found[0].ndim == 1 else np.stack(found)

    @functools.cached_property
    def _arrays(self):
        """Arrays for predictions, and for gradients, which the native kernel lacks."""
        module, variables = self._trained.module, self._trained.variables
        plain = folded.differentiable(module)
        with mesh_lib.computing(self._trained.mesh):
            arrays = [folded.fold(module, variables)]
        arrays.append(folded.fold(plain, variables) if plain != module else arrays[0])
        return mesh_lib.replicate(arrays, self._trained.mesh)

    def _split(self):
        """The number of devices that share variants; each process computes them all."""
        mesh = self._trained.mesh
        return 1 if mesh.is_multi_process else mesh.size

    def _program(self, function, shape, size, has_sides):
        key = function, shape, size
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(function, shape, size, has_sides)
            return self._compiled[key]

    def _compile(self, function, shape, size, has_sides):
        trained = self._trained
        whole = mesh_lib.replicated(trained.mesh)
        rows = mesh_lib.split_rows(trained.mesh) if self._split() > 1 else whole
        dtype = jnp.int32 if has_sides else jnp.float32
        backward = function is weighted_gradients
        module = trained.module
        program = functools.partial(
            function,
            folded.differentiable(module) if backward else module,
            mean=trained.mean,
            std=trained.std,
        )

        def struct(shape, dtype, sharding=whole):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        given = [
            struct(shape, trained.preparation.dtype),
            struct((), jnp.int32),
            *[struct((size,), dtype, rows)] * 2,
        ]
        given += [struct((2,), jnp.int32)] * has_sides
        compiled = jax.jit(program, out_shardings=whole)
        arrays = self._arrays[backward]
        with mesh_lib.computing(trained.mesh):
            return compiled.lower(arrays, *given).compile()


def _starts(length, side, stride):
    """The starts of patches along a side, as in captum: the last may be cut off."""
    return range(0, max(0, -(-(length - side) // stride)) * stride + 1, stride)
