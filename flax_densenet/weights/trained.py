"""Trained models, with all that is needed to use them: of runs and of files of weights.

By itself so that whoever predicts waits for no readers of training data.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import images
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.distributed import processes
from flax_densenet.errors import UserError
from flax_densenet.models import densenet, factory, initialization
from flax_densenet.models import tta as tta_lib
from flax_densenet.weights import metadata as metadata_lib
from flax_densenet.weights import weight_file


def normalize(batch, *, mean, std):
    """uint8 `[N, H, W, 3]` to float32 `(images / 255 - mean) / std`, on the device."""
    # Double precision only in the division of constants, which numpy would do anyhow.
    mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, -1) for v in (mean, std))
    return (batch.astype(jnp.float32) / 255 - mean) / std


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model with what it needs to be used.

    Attributes:
      module: the DenseNet.
      variables: `{'params', 'batch_stats'}`, replicated over `mesh`.
      metadata: as `prepare.make_metadata` wrote it; of imported weights `class_names`
        can be None.
      metrics: test accuracy and loss when it was saved; empty for imported weights.
      step: of the checkpoint; None for imported weights.
    """

    module: densenet.DenseNet
    variables: Any
    metadata: dict[str, Any]
    metrics: dict[str, float]
    step: int | None
    mesh: Any

    def with_tta(self, tta: str) -> 'Trained':
        """The same with another `data.tta`."""
        tta_lib.check(tta)
        fields = self.metadata['data'] | {'tta': tta}
        return dataclasses.replace(self, metadata=self.metadata | {'data': fields})

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """None where imported weights do not name their classes."""
        names = self.metadata['class_names']
        return None if names is None else tuple(names)


def load_trained(workdir: str, which: str = 'best', *, mesh=None) -> Trained:
    """Rebuilds the `best` or the `latest` model of a run; needs no config file.

    Args:
      workdir: of the run, or a file or folder of weights (see `weight_file.load`).

    Raises:
      UserError: the workdir holds no (whole) checkpoint, or the file no weights.
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
    found = weight_file.load(path)
    if not found.num_classes:
        raise UserError(f'{path} has no classifier: train one, with init_from={path}')
    preparation = {**found.preprocessing, **found.metadata.get('data', {})}
    # Whether probabilities are of one class or of each label; left out where the file
    # does not tell. How many images it was trained and tested on also.
    more = {}
    if 'multi_label' in found.metadata or found.family == 'torchxrayvision':
        more['multi_label'] = found.metadata.get('multi_label', True)
    if 'images' in found.metadata:
        more['images'] = found.metadata['images']
    return Trained(
        module=found.module,
        variables=mesh_lib.replicate(found.variables, mesh),
        metadata={
            'model': found.fields,
            'class_names': found.class_names and list(found.class_names),
            'image_size': found.preprocessing['image_size'],
            'mean': list(found.preprocessing['mean']),
            'std': list(found.preprocessing['std']),
            'data': preparation,
            **more,
        },
        metrics={},
        step=None,
        mesh=mesh,
    )


def preparation_of(metadata: dict[str, Any]) -> images.Preparation:
    """How images are prepared for the model of this metadata."""
    fields = metadata['data']
    default = images.Preparation()
    return images.Preparation(
        metadata['image_size'],
        fields.get('resize') or default.resize,
        fields.get('crop_fraction') or default.crop_fraction,
        fields.get('interpolation') or default.interpolation,
        len(metadata['mean']),
    )
