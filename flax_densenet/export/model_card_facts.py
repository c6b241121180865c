"""Facts for a model card, from a model's metadata and the folder of its run.

Nothing is measured here. Unknown facts are None or left out, so that the card can say
that they are unknown.
"""

import dataclasses
import os
from typing import Any

from flax_densenet.checkpoints import epoch_records, run_folder
from flax_densenet.data import source_names
from flax_densenet.errors import UserError
from flax_densenet.evaluation import metrics, result_files, results
from flax_densenet.models import factory, naming
from flax_densenet.system import paths
from flax_densenet.weights import calibration as calibration_lib
from flax_densenet.weights import thresholds as thresholds_lib
from flax_densenet.weights import timm_network
from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import unusual as unusual_lib

# Name, title of the paper and its arXiv number, by `Network.family`.
_FAMILIES = {
    'densenet': ('DenseNet', 'Densely Connected Convolutional Networks', '1608.06993'),
    'rdnet': ('RDNet', 'DenseNets Reloaded', '2403.19588'),
}
_TORCHVISION = ('densenet121', 'densenet161', 'densenet169', 'densenet201')
FEW = 30  # images per class, below which the card has a warning
# Fields of the config in the recipe; those with these values are left out.
_RECIPE: dict[str, Any] = {
    'optimizer.name': None,
    'optimizer.learning_rate': None,
    'optimizer.schedule': None,
    'optimizer.warmup_epochs': 0,
    'optimizer.momentum': 0.9,
    'optimizer.weight_decay': 0,
    'optimizer.l2_penalty': 0,
    'optimizer.layer_decay': 1,
    'optimizer.head_multiplier': 1,
    'optimizer.gradient_clip': 0,
    'data.batch_size': None,
    'train.accumulate_steps': 1,
    'train.epochs': None,
    'train.patience': 0,
    'train.seed': None,
    'train.loss': 'cross_entropy',
    'train.label_smoothing': 0,
    'train.ema': 0,
    'train.freeze': 'none',
    'train.head_warmup_epochs': 0,
    'data.augment': 'none',
    'data.color_jitter': [],
    'data.policy': 'none',
    'data.erase': 0,
    'data.mixup': 0,
    'data.cutmix': 0,
    'data.balance': 'none',
    'data.size_schedule': [],
    'model.dropout_rate': 0,
    'model.drop_path_rate': 0,
    'model.dtype': 'float32',
}


def describe_model(trained: trained_lib.Trained) -> dict[str, Any]:
    """Facts about the network, its inputs and its outputs."""
    module = trained.module
    channels, members = len(trained.mean), module.members
    parameters = module.count_parameters(channels=channels)
    module = module.member if members > 1 else module
    family = _FAMILIES[module.family]
    return {
        'network': naming.name(module, trained.variant),
        'variant': trained.variant or family[0],
        'changes': _changes(module, trained.variant),
        'family': dict(zip(('name', 'title', 'paper'), family, strict=True)),
        'parameters': parameters,
        'members': members,
        'block_sizes': tuple(module.block_sizes),
        'num_classes': module.num_classes,
        'class_names': trained.class_names,
        'multi_label': trained.multi_label,
        'channels': channels,
        'preparation': trained.preparation,
        'mean': list(trained.mean),
        'std': list(trained.std),
        'mirrored': trained.tta == 'flip',
        **describe_decisions(trained),
        'timm': timm_network.find(module, channels=channels),
        'torchvision': _torchvision(module, channels),
        'unusual': trained.decisions and trained.decisions.unusual,
        'unusual_titles': unusual_lib.TITLES,
        'sets': trained.decisions and trained.decisions.sets,
    }


def describe_decisions(trained: trained_lib.Trained) -> dict[str, Any]:
    """`calibrated`, how and on which images, or ''; `thresholds`, (name, value), and
    the `threshold_rule` that chose them in words, or None.
    """
    found, names = trained.decisions, trained.class_names or ()
    calibrated, pairs, rule = '', [], None
    if found and trained.calibration:
        how = calibration_lib.describe(trained.calibration)
        data = dataclasses.replace(
            found, data=source_names.public_source(found.data) or ''
        )
        calibrated = f'{how}, fitted on {data.where}'
    if found and found.thresholds:
        rule = thresholds_lib.describe_rule(found.thresholds.rule)
        values = zip(names, found.thresholds.values, strict=False)
        pairs = [(name, value) for name, value in values if value is not None]
    return {'calibrated': calibrated, 'thresholds': pairs, 'threshold_rule': rule}


def _changes(module, variant):
    """Fields of the network that differ from its variant."""
    if not variant:
        return {}
    usual = factory.create_model(variant, num_classes=module.num_classes).fields()
    names = (*module.architecture_fields, 'blur_pool', 'padding', *module.head_fields)
    fields = module.fields()
    return {n: fields[n] for n in names if n in fields and fields[n] != usual[n]}


def _torchvision(module, channels):
    """Code that makes the network in torchvision, or None if it cannot."""
    timm_name = timm_network.find(module, channels=channels)
    has_class = module.fields().get('stem') == 'imagenet'
    if timm_name is None or channels != 3 or not has_class:
        return None
    name, changed = timm_name
    if name in _TORCHVISION and not changed:
        return f'{name}(num_classes={module.num_classes})'
    return (
        f'DenseNet(growth_rate={module.growth_rate}, '
        f'block_config={tuple(module.block_sizes)}, '
        f'num_init_features={module.stem_features}, bn_size={module.bottleneck}, '
        f'num_classes={module.num_classes})'
    )


def describe_run(trained: trained_lib.Trained, workdir: str | None) -> dict[str, Any]:
    """Facts about the training: data, recipe, versions.

    Raises:
      UserError: the workdir holds files that are not those of a run.
    """
    metadata = trained.metadata
    run = (
        run_folder.load_run(workdir)
        if workdir
        else run_folder.RunRecord('', [], {}, {})
    )
    fields = run_folder.flatten({name: metadata[name] for name in ('data', 'model')})
    fields |= run_folder.flatten(run.config)
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    recipe = {
        name: fields[name]
        for name, usual in _RECIPE.items()
        if fields.get(name) is not None and fields[name] != usual
    }
    if recipe.get('optimizer.name') != 'sgd':
        recipe.pop('optimizer.momentum', None)
    if recipe.get('optimizer.schedule') == 'steps':
        recipe['optimizer.drop_at'] = fields.get('optimizer.drop_at')
    trained_here = any(name.startswith('optimizer.') for name in recipe)
    return {
        'source': source_names.public_source(metadata['data'].get('source')),
        'images': metadata.get('images'),
        'recipe': recipe if trained_here else {},
        # Its folder on that machine is private.
        'started_from': os.path.basename(fields.get('init_from') or '') or None,
        'epoch': trained.epoch if trained.step is not None else None,
        'epochs_taken': len(run.records) or None,
        'environment': run.environment,
    }


def describe_metrics(
    trained: trained_lib.Trained, workdir: str | None
) -> dict[str, Any] | None:
    """Metrics with 95% intervals: of `eval.json`, else of the checkpoint.

    Returns:
      None where none are known; else `part` (`test` or `validation`), `chose` (whether
      these images chose the epoch), `source`, `own` (the run's own test images),
      `count`, `mirrored`, `rows` of (name, value, interval or None), `accuracy`,
      `classes` (rows, most of `results.ROWS`), `hidden` (how many more), `few` (names
      of classes with fewer than `FEW` images) and `calibration` or None.

    Raises:
      UserError: `eval.json` is not what evaluation writes.
    """
    if not workdir or trained.step is None:
        return _of_checkpoint(trained)
    folder = result_files.folder_of_own(workdir)
    loaded = results.load(folder)
    if loaded is None or loaded[0].step != trained.step:  # training went on
        return _of_checkpoint(trained)
    try:
        return _of_eval(trained, *loaded)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        path = os.path.join(folder, results.EVAL_FILE)
        raise UserError(
            f'{path} is not what eval writes ({error!r}); run eval again'
        ) from error


def _of_eval(trained, measured, values):
    before = trained.metadata['data'].get('source')
    own = bool(before) and paths.real_source(measured.data) == paths.real_source(before)
    rows = [_row(values, 'accuracy', values['accuracy_interval'])]
    if values['top5'] is not None:
        right = round(values['top5'] * values['count'])
        rows.append(_row(values, 'top5', metrics.wilson(right, values['count'])))
    macro = values['macro']
    ends = (values.get('intervals') or {}).get('macro') or {}
    names = 'precision', 'recall', 'f1', 'auroc'
    rows += [_row(macro, name, ends.get(name)) for name in names]
    rows.append(_row(values, 'loss'))
    calibration = values['calibration']
    if calibration:
        after = calibration['after'] or calibration['before']
        calibration = {
            'temperature': calibration.get('temperature'),
            'helps': metrics.temperature_helps(calibration),
            # A file of the network's own outputs has none, whatever was measured.
            'applied': bool(calibration.get('applied') and trained.calibration),
            'before': calibration['before']['error'],
            'after': after['error'],
        }
    classes = values['classes']
    shown = classes
    if len(classes) > results.ROWS:
        shown = sorted(classes, key=lambda row: row['f1'] or 0)[: results.ROWS]
    chose = epoch_records.part_of(trained.metrics) == epoch_records.TEST
    return {
        'part': epoch_records.WORDS[epoch_records.TEST],
        'chose': own and chose,
        'source': source_names.public_source(measured.data),
        'own': own,
        'count': values['count'],
        'mirrored': measured.tta == 'flip',
        'accuracy': values['accuracy'],
        'rows': [row for row in rows if row[1] is not None],
        'classes': [_with_intervals(row) for row in shown],
        'hidden': len(classes) - len(shown),
        'few': [row['name'] for row in classes if row['support'] < FEW],
        'calibration': calibration,
    }


def _row(values, name, interval=None):
    return name, values[name], interval


def _with_intervals(row):
    """A class with intervals of its recall and precision."""
    right = round((row['recall'] or 0) * row['support'])
    # The number of predictions of the class follows from its precision.
    predicted = round(right / row['precision']) if row['precision'] else 0
    return row | {
        'recall_interval': metrics.wilson(right, row['support']),
        'precision_interval': metrics.wilson(right, predicted),
    }


def _of_checkpoint(trained):
    saved = trained.metrics
    accuracy = epoch_records.get(saved, 'accuracy')
    if accuracy is None:
        return None
    metadata, part = trained.metadata, epoch_records.part_of(saved)
    count = (metadata.get('images') or {}).get(part)
    if count:
        count -= int(epoch_records.get(saved, 'unread', 0))
    interval = None
    if count and not trained.multi_label:
        interval = metrics.wilson(round(accuracy * count), count)
    rows = [('accuracy', accuracy, interval)]
    for name, key in (('auroc', 'mean_auroc'), ('loss', 'loss')):
        if (value := epoch_records.get(saved, key)) is not None:
            rows.append((name, value, None))
    return {
        'part': epoch_records.WORDS[part],
        'chose': True,
        'source': source_names.public_source(metadata['data'].get('source')),
        'own': True,
        'count': count,
        'mirrored': False,
        'accuracy': accuracy,
        'rows': rows,
        'classes': [],
        'hidden': 0,
        'few': [],
        'calibration': None,
    }
