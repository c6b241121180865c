"""DenseNet for JAX: models, training, evaluation, prediction."""

from typing import TYPE_CHECKING

from flax_densenet._version import __version__
from flax_densenet.errors import UserError
from flax_densenet.models.factory import VARIANTS, create_model
from flax_densenet.models.initialization import init_variables

if TYPE_CHECKING:
    from flax_densenet.inference.predictor import load_trained

__all__ = [
    'VARIANTS',
    'UserError',
    '__version__',
    'create_model',
    'init_variables',
    'load_trained',
]


def __getattr__(name):
    """`load_trained` when it is asked for: models alone need no checkpoints."""
    if name != 'load_trained':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from flax_densenet.inference.predictor import load_trained

    return load_trained
