"""Checks published weights on one photograph: the classes, and a fingerprint.

The fingerprint, eight numbers derived from the logits, shows whether a file gives the
same outputs here as in the program it was made for. The table has the fingerprints of
the files that were tested.
"""

import dataclasses

import jax
import numpy as np
import scipy.special

from flax_densenet.data import images
from flax_densenet.weights import heads, published, weight_file
from flax_densenet.weights import trained as trained_lib

PHOTO = 'flower.jpg'  # a dahlia, from scikit-learn
# A fraction of the standard deviation of the logits. Another order of summation gives
# about 1e-5; another preparation or a swapped array gives more than 0.1.
TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Check:
    """The result for the photograph.

    Attributes:
      name: name of the weights.
      top: (class, probability) of the five most likely classes; empty without a
        classifier.
      found: the fingerprint of the logits.
      agrees: whether the fingerprint matches the table; None if the table has none.
    """

    name: str
    top: tuple[tuple[str, float], ...]
    found: tuple[float, ...]
    agrees: bool | None

    def __str__(self):
        lines = [f'{self.name}: {PHOTO} of scikit-learn, a dahlia']
        lines += [f'  {100 * share:5.1f}%  {label}' for label, share in self.top]
        if not self.top:
            lines.append('  no classifier: pooled features')
        shown = ', '.join(f'{number:.4g}' for number in self.found)
        lines.append(f'  fingerprint: {shown}')
        lines.append(
            {
                True: '  verified: the published file gave the same outputs',
                False: '  WRONG: the published file gave other outputs',
                None: f'  {published.UNVERIFIED}: its outputs are not known',
            }[self.agrees]
        )
        return '\n'.join(lines)


def fingerprint(logits: np.ndarray) -> tuple[float, ...]:
    """Six evenly spaced logits of `[C]`, their mean and their standard deviation."""
    logits = np.asarray(logits, np.float64)
    places = np.linspace(0, len(logits) - 1, 6).astype(int)
    return (*logits[places].tolist(), float(logits.mean()), float(logits.std()))


def is_same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two fingerprints belong to the same outputs."""
    return bool(np.max(np.abs(np.subtract(one, other))) <= TOLERANCE * other[-1])


def load_photo(preparation: images.Preparation) -> np.ndarray:
    """The prepared photograph, uint8 `[S, S, C]`."""
    from sklearn.datasets import load_sample_image

    return images.prepare_array(load_sample_image(PHOTO), preparation)


def verify(name: str) -> Check:
    """Loads weights and applies them to the photograph.

    Args:
      name: a name of published weights, or a path that `weight_file.load` accepts.

    Raises:
      UserError: the weights cannot be loaded.
    """
    weights = weight_file.load(name)
    fields = dict(weights.preprocessing)
    scale = {key: fields.pop(key) for key in ('mean', 'std')}
    photo = load_photo(images.Preparation(fields.pop('image_size'), **fields))
    module = weights.module

    @jax.jit
    def apply(variables, batch):
        return module.apply(variables, trained_lib.normalize(batch, **scale))

    logits = np.asarray(apply(weights.variables, photo[None]))[0]
    entry = published.find(name) if published.is_name(name) else None
    known = entry.fingerprint if entry else None
    found = fingerprint(logits)
    return Check(
        weights.path,
        _top(weights, logits) if weights.num_classes else (),
        found,
        None if known is None else is_same(found, known),
    )


def _top(weights, logits):
    names = weights.class_names or tuple(map(str, range(len(logits))))
    if weights.outputs == heads.SIGMOID:
        shares = scipy.special.expit(logits.astype(np.float64))
    else:
        shares = np.exp(logits - logits.max(), dtype=np.float64)
        shares /= shares.sum()
    best = np.argsort(-shares)[:5]
    return tuple((names[n], float(shares[n])) for n in best)
