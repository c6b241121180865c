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
from flax_densenet.errors import UserError, list_first
from flax_densenet.models import factory, initialization, network
from flax_densenet.models import tta as tta_lib
from flax_densenet.weights import calibration as calibration_lib
from flax_densenet.weights import choices as choices_lib
from flax_densenet.weights import decisions as decisions_lib
from flax_densenet.weights import (
    ensembles,
    heads,
    operating_points,
    published,
    weight_file,
)
from flax_densenet.weights import metadata as metadata_lib


def normalize(batch, *, mean, std):
    """Images `[N, H, W, C]` to float32 `(images / 255 - mean) / std`.

    Args:
      batch: from 0 to 255; uint16 from 0 to 65535; divided by the maximum.
      mean, std: `[C]`, of images from 0 to 1.
    """
    mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, -1) for v in (mean, std))
    return (batch.astype(jnp.float32) / white_of(batch.dtype) - mean) / std


def white_of(dtype) -> int:
    """The value of white in images of this type."""
    return 65535 if dtype == jnp.uint16 else 255


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
      known: the known head that the class names are from, if they are assumed.
      notes: lines about assumptions that were not printed yet.
      is_imported: whether the weights are of another program.
      precision: `float32` or `bfloat16` if it was chosen (`weights.precision`); empty
        for the module's own.
      decisions: what was fitted after training; None if there is nothing.
    """

    module: network.Network
    variables: Any
    metadata: dict[str, Any]
    metrics: dict[str, float]
    step: int | None
    mesh: Any
    known: heads.KnownHead | None = None
    notes: choices_lib.Notes = dataclasses.field(default_factory=choices_lib.Notes)
    is_imported: bool = False
    precision: str = ''
    decisions: decisions_lib.Decisions | None = None

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

    @property
    def outputs(self) -> str:
        """The function from logits to probabilities, one of `heads.OUTPUTS`."""
        return outputs_of(self.metadata)

    @property
    def calibration(self) -> calibration_lib.Calibration | None:
        """The calibration of the logits; None if there is none."""
        found = self.decisions and self.decisions.calibration
        return found if found and found.changes else None

    @property
    def points(self) -> tuple[float | None, ...] | None:
        """Operating points of the outputs; None if they are calibrated instead."""
        return None if self.calibration else points_of(self.metadata)

    @property
    def thresholds(self) -> tuple[float | None, ...] | None:
        """The thresholds of the classes; None for classes without one.

        None if the most likely class is all that is predicted. Several labels without
        thresholds of their own have a half.
        """
        if self.decisions and self.decisions.thresholds:
            return self.decisions.thresholds.values
        if self.metadata.get('multi_label') and self.outputs == heads.SIGMOID:
            return (0.5,) * self.module.num_classes
        return None

    def folded(self) -> 'Trained':
        """The same model with its calibration in the weights of the classifier.

        Its metadata keeps in `decisions` what was fitted, without arrays; the model has
        the thresholds and whatever else there is as before.
        """
        if self.decisions is None:
            return self
        plain, arrays = self.decisions.to_files()
        for name in {key.partition('.')[0] for key in arrays}:
            del plain[name]
        plain['statistics'] = bool(arrays)
        metadata = self.metadata | {'decisions': plain}
        variables = self.variables
        if self.calibration:
            metadata.pop('operating_points', None)
            variables = mesh_lib.replicate(self.calibration.fold(variables), self.mesh)
        return dataclasses.replace(
            self,
            variables=variables,
            metadata=metadata,
            decisions=dataclasses.replace(self.decisions, calibration=None),
        )

    def without_decisions(self) -> 'Trained':
        """The same model without its fitted decisions."""
        return dataclasses.replace(self, decisions=None)


def points_of(metadata: dict[str, Any]) -> tuple[float | None, ...] | None:
    """Operating points of the outputs (`operating_points.scale`), or None."""
    points = metadata.get('operating_points')
    return None if points is None else tuple(points)


def outputs_of(metadata: dict[str, Any]) -> str:
    """`Trained.outputs` of this metadata."""
    usual = heads.SIGMOID if metadata.get('multi_label') else heads.SOFTMAX
    return metadata.get('outputs') or usual


def load_trained(
    workdir: str,
    which: str = 'best',
    *,
    mesh=None,
    choices: choices_lib.Choices = choices_lib.NO_CHOICES,
) -> Trained:
    """Loads the `best` or the `latest` model of a run, without its config file.

    Args:
      workdir: the run's folder, or a file or folder of weights (`weight_file.load`),
        or the folder of an ensemble (`ensembles`).
      which: `best` or `latest`; of a run only.
      mesh: the devices; None for all.
      choices: what the user says of the weights.

    Raises:
      UserError: there is no intact checkpoint in the folder, or no weights in the file.
    """
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    if weight_file.is_weights(workdir):
        return _from_file(workdir, mesh, choices)
    if ensembles.is_ensemble(workdir):
        made = ensembles.load(
            workdir,
            lambda folder: load_trained(folder, which, mesh=mesh, choices=choices),
        )
        return _with_decisions(made, workdir, made.variables, choices)
    _check_own(workdir, choices)
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
    trained = Trained(
        module=module,
        variables=mesh_lib.replicate(restored['model'], mesh),
        metadata=_chosen(workdir, metadata, module.num_classes, choices),
        metrics=checkpoint_reader.load_json(workdir, step, 'metrics'),
        step=step,
        mesh=mesh,
    )
    return _with_decisions(trained, workdir, restored['model'], choices)


def _with_decisions(trained, path, variables, choices):
    """The model with what was fitted for it, unless the user wants other outputs.

    Args:
      trained: with decisions if they are in its file.
      variables: on the host, before they have a calibration.
    """
    if choices.raw or published.is_name(path):
        return trained.without_decisions() if choices.raw else trained
    found = decisions_lib.load(path, trained.module.num_classes)
    place, _ = decisions_lib.files_of(path)
    not_applied = 'its calibration and thresholds are not applied'
    if found and (
        found.step != trained.step
        or found.model != decisions_lib.fingerprint(variables)
    ):
        trained.notes['decisions'] = (
            f'{place} belongs to another checkpoint or other weights, so {not_applied};'
            ' run calibrate to fit them again'
        )
        found = None
    found = found or trained.decisions
    if found and choices.outputs:
        trained.notes['decisions'] = (
            f'--outputs={choices.outputs}: {path} was calibrated for other outputs, so '
            f'{not_applied}'
        )
        found = None
    return dataclasses.replace(trained, decisions=found)


def _check_own(path, choices):
    """Raises for choices that the model's own metadata decides."""
    for name in choices.data:
        fixed = ('mean', 'std', 'channels', 'bit_depth')
        if name in fixed or not choices.own_data:
            raise UserError(
                f'data.{name}: {path} says itself how its images are prepared; '
                'the field can be set for weights that do not'
            )


def _chosen(path, metadata, count, choices):
    """The model's metadata with the chosen names and outputs."""
    if choices.class_names:
        choices_lib.check_count(path, choices.class_names, count)
        metadata = metadata | {'class_names': list(choices.class_names)}
    if choices.outputs:
        others = ('outputs', 'operating_points')
        metadata = {k: v for k, v in metadata.items() if k not in others}
    return metadata | _describe_outputs(choices.outputs)


def _describe_outputs(outputs):
    """Of metadata; nothing where it is not known."""
    several = {heads.SIGMOID: True, heads.SOFTMAX: False}
    if outputs in several:
        return {'multi_label': several[outputs]}
    return {'outputs': outputs} if outputs else {}


def _from_file(path, mesh, choices):
    weights = weight_file.load(path)
    if weights.head:
        raise UserError(
            f'{path}: its head has several layers ({list_first(weights.head)}) that '
            f'cannot be computed ({weights.head_reason}); train a new classifier on '
            f'the rest: train PHOTOS --config=finetune:{path}'
        )
    if not weights.num_classes:
        raise UserError(f'{path} has no classifier: train one, with init_from={path}')
    more, known, notes, is_own = {}, None, choices_lib.Notes(), weights.is_own
    if weights.is_own:
        _check_own(path, choices)
        # Left out where the file does not tell.
        keys = {'multi_label', 'outputs', 'images', 'operating_points', 'decisions'}
        keys &= weights.metadata.keys()
        more = {key: weights.metadata[key] for key in keys}
        names = weights.class_names
    else:
        if weights.notes:
            notes['head'] = '; '.join(weights.notes)
        settled = choices_lib.settle(weights, choices)
        weights, names, known = settled.weights, settled.class_names, settled.known
        more = _describe_outputs(settled.outputs)
        notes |= settled.notes
        points = weights.metadata.get('operating_points')
        if points and choices.outputs is None:
            line, more = _describe_points(path, points, weights.num_classes, more)
            notes['points'] = line
    metadata = {
        'model': weights.fields,
        'class_names': names and list(names),
        'image_size': weights.preprocessing['image_size'],
        'mean': list(weights.preprocessing['mean']),
        'std': list(weights.preprocessing['std']),
        'data': {**weights.preprocessing, **weights.metadata.get('data', {})},
        **more,
    }
    variables, found = weights.variables, None
    if weights.is_own:
        metadata = _chosen(path, metadata, weights.num_classes, choices)
        found = _take_decisions(weights, metadata)
        if found and found.calibration:
            variables = found.calibration.unfold(variables)
    trained = Trained(
        module=weights.module,
        variables=mesh_lib.replicate(variables, mesh),
        metadata=metadata,
        metrics={},
        step=None,
        mesh=mesh,
        known=known,
        notes=notes,
        is_imported=not is_own,
        decisions=found,
    )
    return _with_decisions(trained, path, variables, choices)


def _take_decisions(weights, metadata):
    """Removes from metadata what `Trained.folded` put there, and returns it."""
    plain = metadata.pop('decisions', None)
    if plain is None:
        return None
    arrays = {}
    if weights.folder is not None and isinstance(plain, dict):
        entries, arrays = decisions_lib.load_statistics(weights.folder)
        plain = plain | entries
    place = f'{weights.path}: its decisions'
    return decisions_lib.from_files(place, plain, arrays, weights.num_classes)


def _describe_points(path, points, count, more):
    """A line, and metadata with operating points where they fit."""
    if len(points) != count:
        line = f'{path} has {len(points)} operating points for {count} outputs'
        return f'{line}: they are not applied', more
    if not all(point is None or 0 < point < 1 for point in points):
        return f'{path}: its operating points are no numbers from 0 to 1', more
    return operating_points.describe(path, points), more | {
        'operating_points': list(points)
    }


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
        fields.get('bit_depth') or 8,
    )
