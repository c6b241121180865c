"""Out-of-fold results: predictions by the ensemble member not trained on the image.

`crossval` trains a model for each fold on the images of the other folds. The
predictions of all models for the images of their own fold are combined here, so every
image is measured once.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_densenet import settings as settings_lib
from flax_densenet.data import labeled_images
from flax_densenet.errors import UserError
from flax_densenet.evaluation import evaluate, fitting, precisions, unusual_folds
from flax_densenet.evaluation import results as results_lib
from flax_densenet.evaluation import selection as selection_lib
from flax_densenet.weights import choices as choices_lib
from flax_densenet.weights import decisions as decisions_lib
from flax_densenet.weights import ensembles, unusual_members
from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import unusual as unusual_lib

TEST = 'test'  # folder for the ensemble's results on the test part of the data
# Metrics of a fold, in the order of tables.
METRICS = ('accuracy', 'auroc', 'f1', 'loss')


@dataclasses.dataclass(frozen=True)
class Fold:
    """One fold and its model.

    Attributes:
      number: number of the fold, from 1.
      name: name of its run's folder.
      trained: the model, as it was measured.
      count: number of held-out images.
      epoch, step: epoch and step of the best checkpoint.
      metrics: metrics on the held-out images, by `METRICS`; None if undefined.
      chosen_apart: whether a validation part, not the held-out images, chose the epoch.
    """

    number: int
    name: str
    trained: trained_lib.Trained
    count: int
    epoch: int
    step: int
    metrics: dict[str, float | None]
    chosen_apart: bool


@dataclasses.dataclass(frozen=True)
class OutOfFold:
    """The results of all folds.

    Attributes:
      results: results for all images, in the order of the source; its `folds` has the
        fold of each image.
      folds: the separate folds.
      data: the data source.
    """

    results: results_lib.Results
    folds: tuple[Fold, ...]
    data: str

    @property
    def chosen_apart(self) -> bool:
        """Whether the measured images were not used for any choice."""
        return all(fold.chosen_apart for fold in self.folds)

    @property
    def fold_of(self) -> np.ndarray:
        """int `[N]`: the fold in which each image was held out, from 1."""
        return np.asarray(self.results.folds)

    def of_fold(self, number: int) -> results_lib.Results:
        """The results of one fold, counted from 1."""
        found = self.results
        folds = self.fold_of
        rows = np.flatnonzero(folds == number)
        raw = found.raw_logits
        examples = found.examples
        return dataclasses.replace(
            found,
            examples=labeled_images.Examples(
                examples.reader, examples.indices[rows], examples.preparation
            ),
            logits=found.logits[rows],
            labels=found.labels[rows],
            raw_logits=None if raw is None else raw[rows],
            unusual=None if found.unusual is None else found.unusual[rows],
            folds=folds[rows],
        )

    def summarize(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """Mean and sample standard deviation of `METRICS` over the folds."""
        mean: dict[str, float | None] = {}
        spread: dict[str, float | None] = {}
        for name in METRICS:
            found = [fold.metrics[name] for fold in self.folds]
            known = [value for value in found if value is not None]
            mean[name] = statistics.fmean(known) if known else None
            spread[name] = statistics.stdev(known) if len(known) > 1 else None
        return mean, spread

    def measured(self) -> results_lib.Measured:
        """The model and data that were measured, for `eval.json`."""
        trained = self.folds[0].trained
        return results_lib.Measured(
            self.data,
            None,
            None,
            trained.tta,
            precision=trained.precision,
            members=len(self.folds),
            out_of_fold=True,
        )

    def about(self) -> dict[str, Any]:
        """Further fields of `eval.json`, besides the metrics of all images."""
        mean, spread = self.summarize()
        rows = [
            {'fold': fold.number, 'count': fold.count, 'epoch': fold.epoch}
            | fold.metrics
            for fold in self.folds
        ]
        return {'folds': rows, 'folds_mean': mean, 'folds_spread': spread}


def collect(
    workdir: str,
    settings_of: Callable[[dict[str, Any]], settings_lib.Settings],
    *,
    mesh,
    choices: choices_lib.Choices = choices_lib.NO_CHOICES,
    precision: str | None = None,
    unusual: unusual_members.MembersUnusual | None = None,
) -> OutOfFold:
    """Measures each member of an ensemble on the fold that was held out from it.

    Args:
      workdir: the folder of the ensemble.
      settings_of: function from the metadata of a member to the settings to measure it
        with.
      precision: see `precisions.of_data`.
      unusual: the score of the ensemble, whose limits replace those of its members.

    Raises:
      UserError: a member or its images no longer exist.
    """
    folds: list[Fold] = []
    found: list[results_lib.Results] = []
    data = ''
    for number, name in enumerate(ensembles.read(workdir).members, start=1):
        path = os.path.join(workdir, name)
        trained = trained_lib.load_trained(path, mesh=mesh, choices=choices)
        if unusual is not None and trained.decisions is not None:
            trained = trained.with_unusual(unusual.members[number - 1])
        settings = settings_of(trained.metadata)
        trained = trained.with_tta(settings.evaluation.tta)
        trained, source, own, trained_on = precisions.of_data(
            trained, path, settings, precision
        )
        if not trained_on or not settings.data.fold:
            raise UserError(
                f'{path} was not trained on data.source={settings.data.source}, so it '
                'has no out-of-fold predictions for it'
            )
        folds.append(_describe(number, name, trained, own, source))
        found.append(own)
        data = source.name
    return OutOfFold(_pool(workdir, found), tuple(folds), data)


def fit(
    found: OutOfFold, ensemble: trained_lib.Trained, rules: selection_lib.Rules
) -> decisions_lib.Decisions:
    """Decisions of an ensemble, fitted on the out-of-fold predictions.

    Its calibration is that of its members, each of which was calibrated separately.

    Args:
      found: from `collect` without `unusual`.

    Raises:
      UserError: the rule does not fit the model.
    """
    all_images = selection_lib.Selection(
        trained=ensemble.without_decisions(),
        class_names=found.results.class_names,
        data=found.data,
        part='all',
        examples=found.results.examples,
        train=None,
        outputs=evaluate.Outputs(found.results.logits, found.results.labels),
        loading={},
    )
    plain = dataclasses.replace(rules, calibrate=False, unusual='off')
    made = fitting.fit(all_images, plain)
    if rules.unusual == 'off':
        return made
    score = unusual_folds.fit(
        [(fold.name, fold.trained) for fold in found.folds],
        [found.of_fold(fold.number).unusual for fold in found.folds],
        rules.unusual_share,
    )
    return dataclasses.replace(made, unusual=score)


def rescale(found: OutOfFold, score: unusual_members.MembersUnusual) -> OutOfFold:
    """The results with scores by the limits of `score`, fitted on them."""
    scores, folds = [], []
    for fold, member in zip(found.folds, score.members, strict=True):
        own = found.of_fold(fold.number).unusual
        before = fold.trained.decisions and fold.trained.decisions.unusual
        assert own is not None and isinstance(before, unusual_lib.Unusual)
        scores.append(unusual_folds.rescale(own, before, member))
        trained = fold.trained.with_unusual(member)
        folds.append(dataclasses.replace(fold, trained=trained))
    joined = np.zeros(len(found.fold_of), np.float32)
    for fold, part in zip(found.folds, scores, strict=True):
        joined[found.fold_of == fold.number] = part
    results = dataclasses.replace(found.results, unusual=joined)
    return dataclasses.replace(found, results=results, folds=tuple(folds))


def _describe(number, name, trained, found, source):
    macro = found.metrics['macro']
    values = found.metrics | {'auroc': macro['auroc'], 'f1': macro['f1']}
    return Fold(
        number,
        name,
        trained,
        len(found.labels),
        trained.epoch,
        trained.step,
        {name: values[name] for name in METRICS},
        chosen_apart=source.val is not None,
    )


def _pool(workdir, found):
    """Combines the `results.Results` of all folds."""
    first = found[0].examples
    indices = np.concatenate([one.examples.indices for one in found])
    examples = labeled_images.Examples(first.reader, indices, first.preparation)
    names = [one.name(row) for one in found for row in range(len(one.labels))]
    count = len(np.unique(indices))
    if count != len(indices) or names != [examples.name(i) for i in range(count)]:
        raise UserError(
            f'the images of {workdir} changed during the measurement, so its folds do '
            'not match; try again'
        )
    order = np.argsort(indices)
    examples.indices = indices[order]
    folds = [np.full(len(one.labels), n) for n, one in enumerate(found, start=1)]
    raw = None
    if any(one.raw_logits is not None for one in found):
        parts = [o.logits if o.raw_logits is None else o.raw_logits for o in found]
        raw = np.concatenate(parts)[order]
    scores = [one.unusual for one in found if one.unusual is not None]
    return results_lib.Results(
        examples,
        found[0].class_names,
        np.concatenate([one.logits for one in found])[order],
        np.concatenate([one.labels for one in found])[order],
        found[0].outputs,
        raw_logits=raw,
        unusual=np.concatenate(scores)[order] if len(scores) == len(found) else None,
        folds=np.concatenate(folds)[order],
    )


def format_folds(found: OutOfFold) -> str:
    """The table of folds for a terminal, with mean and spread."""
    mean, spread = found.summarize()
    several = found.results.multi_label
    head = ('fold', 'images', 'label accuracy' if several else 'accuracy')
    rows: list[tuple[str, ...]] = [(*head, 'AUROC', 'F1', 'loss', 'epoch')]
    rows += [
        (str(one.number), str(one.count), *_show(one.metrics), str(one.epoch))
        for one in found.folds
    ]
    rows.append(('mean', '', *_show(mean), ''))
    rows.append(('std. dev.', '', *_show(spread), ''))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
        '  '.join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    )


def _show(values):
    for name in METRICS:
        value = values[name]
        if value is None:
            yield '-'
        else:
            yield f'{value * 100:.1f}%' if name == 'accuracy' else f'{value:.3f}'


def describe_selection(found: OutOfFold) -> str:
    """A sentence on whether the measured images chose anything."""
    decisions = found.results.decisions
    chosen = []
    if decisions is not None:
        if decisions.thresholds is not None:
            chosen.append('the thresholds')
        if decisions.unusual is not None:
            chosen.append('the limit of unusual images')
    if found.chosen_apart:
        return (
            'Each image was predicted by the model that was not trained on it, and '
            'validation images chose its epoch: the measured images chose nothing'
            + (f' but {" and ".join(chosen)}.' if chosen else '.')
        )
    return (
        'Each image was predicted by the model that was not trained on it, but each '
        "fold's best epoch was chosen on the same held-out images, which makes the "
        'metrics optimistic.'
    )
