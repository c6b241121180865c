"""Trained models with everything that is needed to use them: of runs and weight files.

This module does not import the readers of training data, so prediction starts quickly.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import deep, images
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.distributed import processes
from flax_densenet.errors import UserError
from flax_densenet.models import factory, initialization, network
from flax_densenet.models import tta as tta_lib
from flax_densenet.weights import metadata as metadata_lib
from flax_densenet.weights import weight_file


def normalize(batch, *, mean, std):
    """uint8 images `[N, H, W, C]` to float32 `(images / 255 - mean) / std`."""
    mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, -1) for v in (mean, std))
    return (batch.astype(jnp.float32) / 255 - mean) / std


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model with everything that is needed to use it.

    Attributes:
      module: the network.
      variables: `{'params', 'batch_stats'}`, replicated over `mesh`.
      metadata: as `prepare.make_metadata` makes it. `class_names` can be None for
        imported weights.
      metrics: test accuracy and loss when it was saved; empty for imported weights.
      step: step of the checkpoint; None for imported weights.
      mesh: the devices.
    """

    module: network.Network
    variables: Any
    metadata: dict[str, Any]
    metrics: dict[str, float]
    step: int | None
    mesh: Any

    def with_tta(self, tta: str) -> 'Trained':
        """The same model with another value of `data.tta`."""
        tta_lib.check(tta)
        fields = self.metadata['data'] | {'tta': tta}
        return dataclasses.replace(self, metadata=self.metadata | {'data': fields})

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes; None if imported weights do not name them."""
        names = self.metadata['class_names']
        return None if names is None else tuple(names)


def load_trained(workdir: str, which: str = 'best', *, mesh=None) -> Trained:
    """Loads the `best` or the `latest` model of a run, without its config file.

    Args:
      workdir: the run's folder, or a file or folder of weights (`weight_file.load`).
      which: `best` or `latest`; of a run only.
      mesh: the devices; None for all.

    Raises:
      UserError: there is no intact checkpoint in the folder, or no weights in the file.
    """
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    if weight_file.is_weights(workdir):
        return _from_file(workdir, mesh)
    step = processes.broadcast(
        'step', lambda: checkpoint_reader.find_step(workdir, which)
    )
    metadata = metadata_lib.load(workdir, step)
    module = factory.create_model(
        num_classes=len(metadata['class_names']),
        **weight_file.to_tuples(metadata['model']),
    )
    restored = checkpoint_reader.restore(
        workdir,
        step,
        sharding=None,
        model=initialization.variable_shapes(module, channels=len(metadata['mean'])),
    )
    return Trained(
        module=module,
        variables=mesh_lib.replicate(restored['model'], mesh),
        metadata=metadata,
        metrics=checkpoint_reader.load_json(workdir, step, 'metrics'),
        step=step,
        mesh=mesh,
    )


def _from_file(path, mesh):
    weights = weight_file.load(path)
    if not weights.num_classes:
        raise UserError(f'{path} has no classifier: train one, with init_from={path}')
    preparation = {**weights.preprocessing, **weights.metadata.get('data', {})}
    # Facts that only some files have.
    more = {}
    if 'multi_label' in weights.metadata or weights.family == 'torchxrayvision':
        more['multi_label'] = weights.metadata.get('multi_label', True)
    if 'images' in weights.metadata:
        more['images'] = weights.metadata['images']
    return Trained(
        module=weights.module,
        variables=mesh_lib.replicate(weights.variables, mesh),
        metadata={
            'model': weights.fields,
            'class_names': weights.class_names and list(weights.class_names),
            'image_size': weights.preprocessing['image_size'],
            'mean': list(weights.preprocessing['mean']),
            'std': list(weights.preprocessing['std']),
            'data': preparation,
            **more,
        },
        metrics={},
        step=None,
        mesh=mesh,
    )


def preparation_of(metadata: dict[str, Any]) -> images.Preparation:
    """How to prepare images for the model with this metadata."""
    fields = metadata['data']
    default = images.Preparation()
    return images.Preparation(
        metadata['image_size'],
        fields.get('resize') or default.resize,
        fields.get('crop_fraction') or default.crop_fraction,
        fields.get('interpolation') or default.interpolation,
        len(metadata['mean']),
        deep.check(fields.get('window')),
    )
