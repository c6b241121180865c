"""`create_model` of the public API: a network by name, or with trained weights."""

import logging
import os
from typing import Any, overload

from flax_densenet.errors import UserError
from flax_densenet.models import factory, initialization, network
from flax_densenet.system import arguments

_LOGGER = logging.getLogger(__name__)


@overload
def create_model(
    variant: str, *, num_classes: int, weights: None = None, **fields: Any
) -> network.Network: ...


@overload
def create_model(
    variant: str | None = None,
    *,
    num_classes: int | None = None,
    weights: str | os.PathLike[str],
    **fields: Any,
) -> tuple[network.Network, dict[str, Any]]: ...


def create_model(
    variant: str | None = None,
    *,
    num_classes: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    **fields: Any,
) -> network.Network | tuple[network.Network, dict[str, Any]]:
    """Makes a DenseNet (arXiv 1608.06993) or an RDNet (arXiv 2403.19588) by name.

        model = create_model('densenet121', num_classes=10)
        model, variables = create_model(weights='torchvision:densenet121')
        model, variables = create_model('densenet121', weights='densenet121',
                                        num_classes=10)  # with a new classifier

    Args:
      variant: a name from `list_models`, or any `L<depth>k<growth rate>`, optionally
        with the prefix `B-`, `C-` or `BC-`. Not needed if `weights` is given.
      num_classes: width of the classifier. With 0 there is no classifier, and the
        outputs are the pooled features. Not needed if `weights` is given; if the
        weights have another number of classes, the classifier starts from random
        values.
      weights: a name from `list_weights`, or anything else that `load` accepts.
      **fields: fields of `DenseNet` or `RDNet` to override; None keeps the value of the
        variant.

    Returns:
      A Flax Linen module; with `weights`, a pair of the module and its variables.
      `model.apply(variables, images)` maps normalized float images `[N, H, W, C]` to
      float32 logits `[N, num_classes]`; without `weights`, the variables come from
      `init_variables`. In training, `model.apply(variables, images, train=True,
      mutable=['batch_stats'])` also returns the updated batch norm statistics.

    Raises:
      UserError: the variant, a field or the name of the weights is unknown, or a value
        is invalid.
    """
    if weights is not None:
        path = arguments.check_path('weights', weights, 'a name, a file or a folder')
        return _with_weights(variant, num_classes, path, fields)
    if variant is None or num_classes is None:
        raise UserError(
            f'create_model needs a {"variant" if variant is None else "num_classes"}, '
            'unless there are weights'
        )
    return factory.create_model(variant, num_classes=num_classes, **fields)


def _with_weights(variant, num_classes, path, fields):
    """The network and its variables, with a new classifier if necessary."""
    # Imported here: networks without weights do not need the readers of files.
    from flax_densenet.weights import transfer, weight_file

    found = weight_file.load(path)
    given = {name: value for name, value in fields.items() if value is not None}
    named = given if variant is None else given | {'variant': variant}
    transfer.check_architecture(named, found)
    count = found.num_classes if num_classes is None else num_classes
    theirs, params = found.fields, dict(found.variables['params'])
    if not count or count != found.num_classes:
        params.pop('classifier', None)
        others = found.module.head_fields
        theirs = {name: value for name, value in theirs.items() if name not in others}
    module = factory.create_model(num_classes=count, **theirs | given)
    if count and count != found.num_classes:
        _LOGGER.info(
            f'{found.path} has {found.num_classes or "no"} classes, not {count}: '
            'the classifier starts from random values'
        )
        channels = found.preprocessing['channels']
        fresh = initialization.init_variables(module, seed=0, channels=channels)
        params['classifier'] = fresh['params']['classifier']
    return module, found.variables | {'params': params}
