"""Finds the labeled images that a trained model is measured on."""

import dataclasses

import numpy as np

from flax_densenet import settings as settings_lib
from flax_densenet.data import dataset, identity, labeled_images, notes, soft_labels
from flax_densenet.distributed import mesh
from flax_densenet.errors import UserError, list_first
from flax_densenet.evaluation import evaluate
from flax_densenet.weights import heads
from flax_densenet.weights import trained as trained_lib


def find_examples(
    trained: trained_lib.Trained,
    path: str,
    settings: settings_lib.Settings,
    *,
    selecting: bool = False,
    to_measure: bool = True,
) -> tuple[dataset.Source, labeled_images.Examples, tuple[str, ...], bool]:
    """The labeled images to measure a model on.

    For the data that the model was trained on, these are the test images. For other
    data without a test part, these are all images, since the model was not trained on
    any of them.

    Args:
      path: path of the model, for messages.
      settings: which data, and how it is prepared.
      selecting: use the validation part instead of the test part, if there is one.
      to_measure: False if any images of the data will do; then images of all folds are
        used for an ensemble that was trained on them.

    Returns:
      The source; its examples, with labels as the model numbers its classes; the class
      names; and whether the model was trained on this data.

    Raises:
      UserError: the data cannot be read or does not fit the model.
    """
    with notes.once():
        source, relation = _load(trained, settings)
    _check_kind(trained, path, source, settings)
    trained_on = relation.own
    examples = _choose(
        trained, path, source, trained_on, selecting=selecting, to_measure=to_measure
    )
    if not len(examples):
        raise UserError(
            f'data.source={settings.data.source}: there are no images to measure on: '
            f'the model was trained on all {len(source.train)}'
        )
    lines = [relation.line]
    if to_measure:
        lines.append(identity.find_trained_on(trained.metadata, examples))
    for line in filter(None, lines):
        if mesh.is_writer():
            notes.say(line)
    names = pair_names(trained, path, source)
    examples = evaluate.match_classes(
        examples, source.class_names, names, count=trained.module.num_classes
    )
    if source.multi_label and source.train.reader.labels_in_memory:
        _check_known(settings, examples.labels, names or source.class_names)
    trained.notes.tell()
    return source, examples, names or source.class_names, trained_on


def _load(trained, settings):
    """The source as the model sees it, and its relation to the training data."""
    preparation = settings.preparation
    # The model's window, for any images; weights of other programs have none.
    window = preparation.window
    preparation = dataclasses.replace(
        preparation,
        window=window if trained.is_imported else window or (),
        bit_depth=preparation.bit_depth or 8,
    )
    data = _of_kind(trained, settings.data)
    source = dataset.from_settings(data, preparation, trained.class_names)
    relation = identity.compare(trained.metadata, source)
    if data.folds and not relation.own:  # other data is not divided into folds
        data = dataclasses.replace(data, folds=0, fold=0)
        source = dataset.from_settings(data, preparation, trained.class_names)
        relation = identity.compare(trained.metadata, source)
    return source, relation


def _check_kind(trained, path, source, settings):
    """Raises if the data has one class and the model several labels, or the reverse."""
    trained_on_several = trained.metadata.get('multi_label', source.multi_label)
    # Imported sigmoids can also separate single classes.
    sigmoids = trained_on_several and trained.is_imported
    if (
        source.multi_label != trained_on_several
        and not sigmoids
        and trained.known is None
    ):
        raise UserError(
            f'data.labels={settings.data.labels}: the model of {path} was trained '
            + ('on one class' if source.multi_label else 'with a table of labels')
            + ' for each image'
        )


def _choose(trained, path, source, trained_on, *, selecting, to_measure):
    """The part of the source to measure on; see `find_examples`."""
    has_part = source.has_test or (selecting and source.val is not None)
    if trained_on and trained.module.members > 1 and not has_part:
        if not to_measure:
            return source.train
        raise UserError(
            f'data.source={source.name}: the models of {path} were trained on these '
            'images, each on all but its own fold, so their average would look too '
            f'good; `eval {path}` without other data measures each image with the '
            'model that was not trained on it'
        )
    if not has_part and not trained_on:
        return labeled_images.join(*source.parts.values())
    return source.selection if selecting else source.test


def _check_known(settings, labels, names):
    """Reports labels and images without any known value.

    Raises:
      UserError: no value is known at all.
    """
    known = ~np.isnan(soft_labels.known_labels(labels))
    if not known.any():
        raise UserError(
            f'data.labels={settings.data.labels}: no image has a known value for a '
            'label of the model, so there is nothing to measure'
        )
    unknown = [
        name for name, is_known in zip(names, known.any(0), strict=True) if not is_known
    ]
    nothing = int((~known.any(1)).sum())
    if not mesh.is_writer():
        return
    if unknown:
        notes.say(
            f'{len(unknown)} of {len(names)} labels have no known value in any image '
            f'and are left out of the means: {list_first(unknown)}'
        )
    if nothing:
        notes.say(
            f'warning: {nothing} of {len(labels)} images have no known label; they '
            'count as correct with a loss of 0, as in training'
        )


def _of_kind(trained, data):
    """The data settings; for a model of classes, a table holds classes.

    Otherwise a table with only two classes, called 0 and 1, would look like labels.
    """
    of_classes = trained.metadata.get('multi_label') is False and trained.known is None
    if data.labels and data.label_kind == 'auto' and of_classes:
        return dataclasses.replace(data, label_kind='classes')
    return data


def pair_names(
    trained: trained_lib.Trained, path: str, source: dataset.Source
) -> tuple[str, ...] | None:
    """The model's class names as written in the data; None to use the data's names.

    Assumed names are used if the data has the same names. Otherwise the outputs are
    assumed to be in the data's order, and a line is printed.

    Args:
      path: path of the model, for messages.
    """
    names, found = trained.class_names, source.class_names
    if source.multi_label:
        trained.notes.pop('outputs', None)  # the data decides
    if trained.known is not None:
        names = trained.known.spelled_as(found)
        if names is not None:
            return names
    if names is None:
        trained.notes.pop('names', None)
        if len(found) == trained.module.num_classes:
            trained.notes['names'] = heads.describe_order(path, found)
    return names
