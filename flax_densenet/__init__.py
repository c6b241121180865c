"""DenseNet for JAX: models, training, evaluation."""

from flax_densenet.errors import UserError
from flax_densenet.model import VARIANTS, create_model, init_variables

__version__ = '0.1.0'
__all__ = ['VARIANTS', 'UserError', 'create_model', 'init_variables']
