"""DenseNet for JAX: models, training, evaluation, prediction."""

from typing import TYPE_CHECKING

from flax_densenet.errors import UserError
from flax_densenet.model import VARIANTS, create_model, init_variables

if TYPE_CHECKING:
    from flax_densenet.predict import load_trained

__version__ = '0.1.0'
__all__ = ['VARIANTS', 'UserError', 'create_model', 'init_variables', 'load_trained']


def __getattr__(name):
    """`load_trained` when it is asked for: models alone need no checkpoints."""
    if name != 'load_trained':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from flax_densenet.predict import load_trained

    return load_trained
