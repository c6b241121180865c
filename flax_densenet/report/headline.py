"""The main metrics at the top of a report, with notes."""

from flax_densenet.checkpoints import epoch_records
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.report import render


def rows(found) -> list[tuple[str, str, list[str]]]:
    """Name, value and notes of each number, the most important first.

    Args:
      found: an `evaluation.results.Results`.
    """
    metrics = found.metrics
    macro = metrics['macro']
    what = 'labels' if found.multi_label else 'classes'
    accuracy = _accuracy(found)
    made = [] if found.multi_label else [accuracy]
    if macro['auroc'] is not None:
        notes = [f'mean of the {what}', *_ends(metrics, 'auroc'), 'chance: 0.500']
        made.append(('Mean AUROC', render.figure(macro['auroc']), notes))
    if found.multi_label:
        made.append(accuracy)
    if metrics['top5'] is not None:
        made.append(
            (
                'Top-5 accuracy',
                render.percent(metrics['top5']),
                ['actual class among the five most likely'],
            )
        )
    if macro['f1'] is not None:
        notes = [f'mean of the {what}', *_ends(metrics, 'f1')]
        made.append(('F1', render.figure(macro['f1']), notes))
    notes = ['cross-entropy, nats']
    if metrics['calibration'] and metrics['calibration']['applied']:
        before = render.figure(metrics['calibration']['before']['loss'])
        notes.append(f'{before} before calibration')
    made.append(('Loss', render.figure(metrics['loss']), notes))
    if metrics['calibration']:
        error = metrics_lib.calibration_error(metrics)
        notes = ['confidence minus accuracy, on average']
        if found.multi_label:
            notes = ['probability minus share of positives, on average']
        if metrics['calibration']['applied']:
            before = render.percent(metrics['calibration']['before']['error'])
            notes.append(f'{before} before calibration')
        made.append(('Calibration error', render.percent(error), notes))
    return made


def _ends(metrics, name):
    """The interval of a mean, in a list; an empty list if there is none."""
    found = metrics['intervals'] and metrics['intervals']['macro'].get(name)
    if not found:
        return []
    return [f'95% interval: {render.figure(found[0])} to {render.figure(found[1])}']


def _accuracy(found):
    metrics = found.metrics
    count = metrics['count']
    notes = []
    if metrics['accuracy_interval']:
        low, high = map(render.percent, metrics['accuracy_interval'])
        notes.append(f'95% interval: {low} to {high}')
    if metrics['intervals'] and metrics['intervals']['units'] == 'groups':
        notes.append(f'by group: {metrics["intervals"]["unit_count"]:,} groups')
    kind = 'test' if found.folds is None else 'held-out'
    title = f'Accuracy on {count:,} {kind} image{"" if count == 1 else "s"}'
    if found.multi_label:
        title = f'Label a{title[1:]}'
        rule = metrics['thresholds']['rule']
        at = 'the chosen thresholds' if rule else 'a threshold of 50%'
        notes.append(f'share of labels predicted correctly at {at}')
    elif baseline := metrics_lib.majority(metrics):
        notes.append(
            f'baselines: {render.percent(baseline[1])} for always “{baseline[0]}”, '
            f'{render.percent(1 / len(found.class_names))} by chance'
        )
    return title, render.percent(metrics['accuracy']), notes


def selection(
    records, measured, trained_on: bool, validation: int | None = None
) -> str:
    """A sentence on which images chose the model.

    Args:
      records: the records of the run.
      measured: an `evaluation.results.Measured`.
      trained_on: whether these are test images of the run's own data.
      validation: number of validation images that chose the epoch; None if the test
        images did.
    """
    if measured.step is None:
        return ''
    if not trained_on:
        return (
            'These images are not from the data that the run was trained and tested on.'
        )
    if len(records) < 2:
        return ''
    what = 'accuracy'
    if any(epoch_records.get(row, 'mean_auroc') is not None for row in records):
        what = 'mean AUROC'
    if validation is not None:
        return (
            f'Epoch {measured.epoch} of {len(records)} was chosen for its {what} on '
            f'{validation:,} validation images, which are not among these. The test '
            'images were not used for any choice: they were measured once, with the '
            'best checkpoint.'
        )
    return (
        f'Epoch {measured.epoch} of {len(records)} was chosen for its {what} on these '
        'same test images, which makes the metrics optimistic: expect somewhat lower '
        'ones on new images.'
    )
