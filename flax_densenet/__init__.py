"""DenseNet for JAX: models, training, evaluation, prediction, export.

The names in `__all__` and the types that they return are the public API; everything
else may change between versions. They are imported on first use.

>>> import flax_densenet
>>> model = flax_densenet.create_model('densenet121', num_classes=10)
"""

import importlib
import types
from typing import TYPE_CHECKING

from flax_densenet._version import __version__

if TYPE_CHECKING:
    from flax_densenet.api import (
        evaluate,
        export,
        get_config,
        list_models,
        load,
        train,
    )
    from flax_densenet.errors import UserError
    from flax_densenet.inference.predictor import Predictor
    from flax_densenet.inference.predictor import load_trained as load_trained
    from flax_densenet.models.densenet import DenseNet
    from flax_densenet.models.factory import VARIANTS as VARIANTS
    from flax_densenet.models.initialization import init_variables
    from flax_densenet.models.rdnet import RDNet
    from flax_densenet.weights.create import create_model
    from flax_densenet.weights.published import list_weights

__all__ = [
    'DenseNet',
    'Predictor',
    'RDNet',
    'UserError',
    '__version__',
    'create_model',
    'evaluate',
    'export',
    'get_config',
    'init_variables',
    'list_models',
    'list_weights',
    'load',
    'train',
]

_PLACES = {
    'DenseNet': 'models.densenet',
    'Predictor': 'inference.predictor',
    'RDNet': 'models.rdnet',
    'UserError': 'errors',
    'create_model': 'weights.create',
    'evaluate': 'api',
    'get_config': 'api',
    'init_variables': 'models.initialization',
    'list_models': 'api',
    'list_weights': 'weights.published',
    'load': 'api',
    # Former names of `list_models` and `load`.
    'VARIANTS': 'models.factory',
    'load_trained': 'inference.predictor',
}


def __getattr__(name):
    if name not in _PLACES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = importlib.import_module(f'{__name__}.{_PLACES[name]}')
    globals()[name] = value = getattr(module, name)
    return value


def __dir__():
    return sorted({*globals(), *_PLACES})


class _CallablePackage(types.ModuleType):
    """A package with the name of a public function; calling it calls the function."""

    def __call__(self, *args, **kwargs):
        from flax_densenet import api

        return getattr(api, self.__name__.rpartition('.')[2])(*args, **kwargs)


# Importing flax_densenet.train.fit makes `flax_densenet.train` the package.
for _name in ('export', 'train'):
    importlib.import_module(f'{__name__}.{_name}').__class__ = _CallablePackage
