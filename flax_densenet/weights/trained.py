"""Loads trained models from runs and weight files, ready to use.

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
    """Normalizes images `[N, H, W, C]`: float32 `(images / white - mean) / std`.

    Args:
      batch: uint16 images from 0 to 65535 (white is 65535), others from 0 to 255.
      mean, std: `[C]`, for images from 0 to 1.
    """
    mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, -1) for v in (mean, std))
    return (batch.astype(jnp.float32) / white_of(batch.dtype) - mean) / std


def white_of(dtype) -> int:
    """The value of white in images of this dtype."""
    return 65535 if dtype == jnp.uint16 else 255


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model with everything that is needed to use it.

    Attributes:
      module: the network.
      variables: `{'params', 'batch_stats'}`, replicated over `mesh`.
      metadata: the result of `prepare.make_metadata`. `class_names` can be None for
        imported weights.
      metrics: metrics when the model was saved; empty for imported weights.
      step: step of the checkpoint; None for imported weights.
      mesh: the devices.
      known: the known head that the class names come from, if they are assumed.
      notes: lines about assumptions that have not been printed yet.
      is_imported: whether another program made the weights.
      precision: `float32` or `bfloat16` if it was chosen (`weights.precision`); empty
        for the precision of the module.
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
        """The class names; None if imported weights do not name them."""
        names = self.metadata['class_names']
        return None if names is None else tuple(names)

    @property
    def mean(self) -> tuple[float, ...]:
        """`[C]`, which images from 0 to 1 are normalized with, as with `std`."""
        return tuple(self.metadata['mean'])

    @property
    def std(self) -> tuple[float, ...]:
        """`[C]`: the standard deviations of the channels."""
        return tuple(self.metadata['std'])

    @property
    def tta(self) -> str:
        """The test-time augmentation, one of `tta.VIEWS`."""
        return tta_lib.from_metadata(self.metadata)

    @property
    def preparation(self) -> images.Preparation:
        """How images are prepared."""
        return preparation_of(self.metadata)

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several labels."""
        return bool(self.metadata.get('multi_label'))

    @property
    def variant(self) -> str | None:
        """`model.variant`."""
        return self.metadata['model'].get('variant')

    @property
    def epoch(self) -> int | None:
        """The epoch of the checkpoint; None for imported weights."""
        return self.metadata.get('epoch')

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
        """A threshold for each class, or None for a class without one.

        None as a whole if the model only predicts the most likely class. With several
        labels, the threshold is 0.5 unless others were chosen.
        """
        if self.decisions and self.decisions.thresholds:
            return self.decisions.thresholds.values
        if self.multi_label and self.outputs == heads.SIGMOID:
            return (0.5,) * self.module.num_classes
        return None

    def folded(self) -> 'Trained':
        """The same model with its calibration in the weights of the classifier.

        Its metadata records what was fitted (without arrays) in `decisions`. Thresholds
        and other decisions do not change.
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

    def with_unusual(self, score) -> 'Trained':
        """The same model with another score of unusual images."""
        assert self.decisions is not None
        decisions = dataclasses.replace(self.decisions, unusual=score)
        return dataclasses.replace(self, decisions=decisions)

    def without_decisions(self) -> 'Trained':
        """The same model without its fitted decisions."""
        return dataclasses.replace(self, decisions=None)


def points_of(metadata: dict[str, Any]) -> tuple[float | None, ...] | None:
    """Operating points of the outputs (`operating_points.scale`), or None."""
    points = metadata.get('operating_points')
    return None if points is None else tuple(points)


def outputs_of(metadata: dict[str, Any]) -> str:
    """`Trained.outputs` for this metadata."""
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
      workdir: the folder of a run, a file or folder of weights (`weight_file.load`), or
        the folder of an ensemble (`ensembles`).
      which: `best` or `latest`, for runs only.
      mesh: the devices; None for all.
      choices: the user's choices for the weights.

    Raises:
      UserError: the folder has no intact checkpoint, or the file has no weights.
    """
    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    if weight_file.is_weights(workdir):
        return _from_file(workdir, mesh, choices)
    if ensembles.is_ensemble(workdir):
        made = ensembles.load(
            workdir,
            lambda folder: load_trained(folder, which, mesh=mesh, choices=choices),
        )
        made = _with_decisions(made, workdir, made.variables, choices)
        ensembles.finish_note(made)
        return made
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
    """Adds the fitted decisions, unless the user chose other outputs.

    Args:
      trained: the model, with decisions if its file has them.
      variables: on the host, before calibration.
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
    if found and found.unusual:
        count, members = found.unusual.member_count, trained.module.members
        if count != members:
            raise UserError(
                f'{place} scores unusual images by {count} models, and {path} has '
                f'{members}; delete it, or run calibrate'
            )
    if found and found.unusual and trained.tta != 'none' and found.unusual.is_flat:
        trained.notes['score'] = (
            f'{place}: earlier versions fitted the score of unusual images wrongly '
            'with data.tta=flip, so it is left out; run calibrate to fit it again'
        )
        found = dataclasses.replace(found, unusual=None)
    if found and choices.outputs:
        trained.notes['decisions'] = (
            f'--outputs={choices.outputs}: {path} was calibrated for other outputs, so '
            f'{not_applied}'
        )
        found = None
    return dataclasses.replace(trained, decisions=found)


def _check_own(path, choices):
    """Raises for choices that the metadata of the model already makes."""
    for name in choices.data:
        fixed = ('mean', 'std', 'channels', 'bit_depth')
        if name in fixed or not choices.own_data:
            raise UserError(
                f'data.{name}: {path} defines how its images are prepared; this '
                'field can only be set for weights that do not'
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
    """The fields of the metadata; empty if the outputs are unknown."""
    several = {heads.SIGMOID: True, heads.SOFTMAX: False}
    if outputs in several:
        return {'multi_label': several[outputs]}
    return {'outputs': outputs} if outputs else {}


def _from_file(path, mesh, choices):
    weights = weight_file.load(path)
    if weights.head:
        raise UserError(
            f'{path}: its head ({list_first(weights.head)}) '
            f'cannot be computed ({weights.head_reason}); train a new classifier on '
            f'the rest: train PHOTOS --config=finetune:{path}'
        )
    if not weights.num_classes:
        raise UserError(f'{path} has no classifier: train one, with init_from={path}')
    more, known, notes, is_own = {}, None, choices_lib.Notes(), weights.is_own
    if weights.is_own:
        _check_own(path, choices)
        # Left out if the file does not have them.
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
            count = weights.num_classes
            notes['points'], applied = operating_points.check(path, points, count)
            more |= {'operating_points': list(points)} if applied else {}
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


def preparation_of(metadata: dict[str, Any]) -> images.Preparation:
    """The preparation of images for the model with this metadata."""
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
