"""Finds the model and the data for the commands that use a trained model."""

import dataclasses
import os
from typing import Any

from flax_densenet import settings
from flax_densenet.cli import options
from flax_densenet.errors import UserError
from flax_densenet.system import paths, terminal

# Fields that select the images; the model decides how they are prepared.
WHICH = (
    *('source', 'labels', 'label_kind', 'label_columns', 'blank_labels'),
    *('uncertain_labels', 'soft_labels', 'groups', 'subgroups', 'split'),
    *('test_fraction', 'val_fraction', 'split_seed', 'folds', 'fold'),
    *('tfds_dir', 'tfds_train'),
)


def find(invocation: options.Invocation, workdir: str | None = None) -> str:
    """The run's folder if it holds a checkpoint, else the weights of init_from.

    Raises:
      UserError: neither exists.
    """
    from flax_densenet.checkpoints import reader as checkpoint_reader
    from flax_densenet.weights import ensembles, published, weight_file

    workdir = workdir or invocation.workdir
    if ensembles.is_ensemble(workdir):
        return workdir
    start = invocation.fields['init_from']
    if start and not checkpoint_reader.has_checkpoint(workdir):
        if not published.is_name(start) and not os.path.exists(paths.expand(start)):
            raise UserError(
                f'--config.init_from={start}: there is no such file'
                f'{published.suggest(start)}'
            )
        return start
    if not weight_file.is_weights(workdir):
        hint = published.suggest(workdir)
        if hint and not os.path.lexists(workdir):
            raise UserError(f'{workdir}: there is no such file or folder{hint}')
        checkpoint_reader.find_step(workdir, 'latest')  # raises if there is none
    return workdir


def check_fields(invocation: options.Invocation, path: str, *allowed: str):
    """Raises if a field is set that comes from the trained model.

    Args:
      allowed: fields, or sections such as `data.`; init_from is always allowed.
    """
    for name in invocation.overrides:
        if not name.startswith(('init_from', *allowed)):
            hint = ''
            if allowed:
                *first, last = (
                    f'{n}* fields' if n.endswith('.') else n for n in allowed
                )
                shown = f'{", ".join(first)} and {last}' if first else last
                hint = f'; only {shown} can be set'
            raise UserError(
                f'--config.{name}: {invocation.command.name} takes it from {path}{hint}'
            )


def choices(invocation: options.Invocation, **more):
    """The user's choices for weights that do not describe themselves.

    Args:
      **more: fields of `choices.Choices`.
    """
    from flax_densenet.weights import choices as choices_lib

    chosen = {
        name: invocation.overrides[f'data.{name}']
        for name in (*choices_lib.PREPARATION, *choices_lib.DEEP)
        if f'data.{name}' in invocation.overrides
    }
    names, outputs = (
        invocation.flags[name].value for name in ('class_names', 'outputs')
    )
    recipe = {}
    if invocation.recipe:
        data = invocation.fields['data']
        recipe = {name: data[name] for name in choices_lib.PREPARATION}
    if 'raw' in invocation.flags:
        more = {'raw': invocation.flags.raw} | more
    return choices_lib.make(names, outputs, chosen, recipe=recipe, **more)


def data_settings(
    invocation: options.Invocation, metadata: dict[str, Any]
) -> tuple[settings.Settings, str]:
    """The data settings to use a trained model with, and where the data is from.

    Fields from the command line take precedence. If a recipe given with --config names
    other data than the model was trained on, it selects the images. Everything else is
    as in training.

    Returns:
      The settings; `--config.data.source`, `--config`, or '' for the model's own data.
    """
    given = invocation.fields['data']
    chosen = {
        name.removeprefix('data.'): value
        for name, value in invocation.overrides.items()
        if name.startswith('data.')
    }
    own = metadata['data']
    fields = {**given, **own}
    place = ''
    if 'source' in chosen or 'labels' in chosen:
        place = f'--config.data.{"source" if "source" in chosen else "labels"}'
    elif _names_other_data(invocation, own):
        place = '--config'
        fields |= {name: given[name] for name in WHICH}
    fields |= chosen
    fields['image_size'] = fields['image_size'] or metadata['image_size']
    return settings.from_saved({'data': fields}), place


def _names_other_data(invocation, own):
    """Whether a recipe names data that the model was not trained on."""
    if invocation.recipe is None or 'source' not in own:
        return False
    from flax_densenet.cli import recipes

    given, usual = invocation.fields['data'], recipes.load_base().data
    if given['source'] == usual.source and given['labels'] == usual.labels:
        return False
    return _resolve(given) != _resolve(own)


def _resolve(fields):
    labels = fields.get('labels') or ''
    source = paths.real_source(fields['source'])
    return source, labels and os.path.realpath(paths.expand(labels))


def describe_choice(
    data: settings.SourceSettings, place: str, own: dict[str, Any]
) -> str:
    """A line with the data that is measured, if it is not the model's own."""
    return (
        f'evaluating on {_name(vars(data))} (from {place}); the model was trained on '
        f'{_name(own)}'
    )


def _name(fields):
    source = fields.get('source') or 'unknown data'
    labels = fields.get('labels')
    return f'{source} with {labels}' if labels else source


def verification_samples(
    invocation: options.Invocation, path: str, trained, *, integers: bool = False
):
    """Images to verify a file on: --files, the run's own, or scikit-learn's.

    Args:
      integers: whether the file computes in integers, which are calibrated on these
        images.
    """
    from flax_densenet.export import sample_images

    if invocation.flags.files:
        preparation = trained.preparation
        return sample_images.from_files(invocation.flags.files, preparation)
    found, place = data_settings(invocation, trained.metadata)
    if 'source' not in trained.metadata['data'] and not place:
        found = dataclasses.replace(
            found, data=dataclasses.replace(found.data, source='')
        )
    set_here = any(name.startswith('data.') for name in invocation.overrides)
    return sample_images.from_model(
        trained,
        path,
        found,
        integers=integers,
        required=bool(set_here or place),
    )


def export(
    invocation: options.Invocation, path: str, out: str, file_format: str, settings
) -> list[tuple[str, str]]:
    """Exports the model as `export` and `push` do, verified and with its card.

    Args:
      path: path of the model, from `find`.
      out: file or folder to write.
      settings: an `export.formats.Options`.

    Returns:
      Facts about the file, see `release.run`.
    """
    from flax_densenet.export import release
    from flax_densenet.weights import trained as trained_lib

    check_fields(invocation, path, 'data.')
    chosen = choices(invocation, binary=False)
    trained = trained_lib.load_trained(path, 'best', choices=chosen)
    trained.notes.tell()
    shipped = release.Release(
        trained,
        None if trained.step is None else path,
        file_format,
        settings,
        invocation.flags.data_license,
    )
    shipped.check(out)  # before the images are read
    integers = settings.precision == 'int8'
    samples = verification_samples(invocation, path, trained, integers=integers)
    return release.run(out, shipped, samples)


def check_others(invocation: options.Invocation, trained, path: str):
    """Raises if --others cannot be measured, before the long work."""
    given = invocation.flags.others
    if not given:
        return
    from flax_densenet.inference import input_files

    if not trained.decisions or not trained.decisions.unusual:
        raise UserError(
            f'--others={given}: {path} has no score of unusual images; train without '
            'train.unusual=off, or run calibrate'
        )
    input_files.check([given])


def add_others(invocation: options.Invocation, trained, settings, found):
    """Adds the result of `find_others` to the results."""
    others = find_others(invocation, trained, settings)
    return dataclasses.replace(found, others=others)


def find_others(invocation: options.Invocation, trained, settings):
    """The scores of the images in --others; None without the flag.

    Every process computes all of them.
    """
    given = invocation.flags.others
    if not given:
        return None
    import numpy as np

    from flax_densenet.data import notes
    from flax_densenet.evaluation import doubt
    from flax_densenet.inference import input_files, predictor

    model = predictor.Predictor(trained, settings.loader.batch_size)
    files = list(input_files.find([given]))
    stream = model.stream(files, threads=settings.loader.threads)
    rows = [row for row in stream if not row.error]
    if not rows:
        raise UserError(f'--others={given}: none of {len(files)} files can be read')
    if len(rows) < len(files):
        notes.say(f'--others={given}: {len(files) - len(rows)} files cannot be read')
    name = os.path.basename(given.rstrip(os.sep)) or given
    scores = np.array([row.unusual for row in rows], np.float32)
    return doubt.Others(name, scores)


def load(invocation: options.Invocation, workdir: str, *allowed: str, **more):
    """A trained model, its path, and the settings to measure it with.

    Args:
      allowed: sections besides `data.` that can be set, such as `report.`.
      **more: fields of `choices.Choices`.
    """
    from flax_densenet.distributed import mesh as mesh_lib
    from flax_densenet.weights import trained as trained_lib

    path = find(invocation, workdir)
    check_fields(invocation, path, 'data.', *allowed)
    mesh = mesh_lib.make_mesh()
    chosen = choices(invocation, own_data=True, **more)
    trained = trained_lib.load_trained(path, 'best', mesh=mesh, choices=chosen)
    own = trained.metadata['data']
    found, place = data_settings(invocation, trained.metadata)
    mesh_lib.check_batch_size(found.loader.batch_size, mesh)
    if place and _name(vars(found.data)) != _name(own):
        terminal.say(describe_choice(found.data, place, own))
    return trained.with_tta(found.evaluation.tta), path, found
