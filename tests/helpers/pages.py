"""Inputs for report and sweep pages."""

import json

import numpy as np

from flax_densenet.data import images
from flax_densenet.evaluation import results
from flax_densenet.sweeps import record as sweep_record

_RATE = 'optimizer.learning_rate'
RECORDS = [
    {
        'epoch': epoch, 'step': 10 * epoch, 'train_accuracy': 0.5, 'train_loss': 1.0,
        'test_accuracy': accuracy, 'test_loss': 0.9, 'learning_rate': 1e-3,
        'seconds': 1800, 'images_per_second': 20.0, 'input_wait_share': 0.01,
        'peak_memory_gib': 1.5,
    }
    for epoch, accuracy in enumerate([0.6, 0.8, 0.7], start=1)
]  # fmt: skip
BOOK = {
    '0.1': ('done', '', [[0.5, 0.4], [0.5, 0.7]]),
    '</script><b>': ('pruned', '', [[0.9]]),
    '0.2': ('done', '', [[0.7], [0.65]]),
    '0.3': ('failed', 'not <finite>', []),
    '0.4': ('training', '', []),
}


def write_run(folder, *, rate=1e-3):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + '\n' for record in RECORDS]
    (folder / 'metrics.jsonl').write_text(''.join(lines) + '{"epoch": 4, "tr')
    config = {'model': {'variant': 'BC-L10k4'}, 'optimizer': {'learning_rate': rate}}
    (folder / 'config.json').write_text(json.dumps(config))
    environment = {'device': 'A <fast> chip', 'devices': 4, 'python': '3.12'}
    (folder / 'environment.json').write_text(json.dumps(environment))
    return folder


class _Images(list):
    """Images with a single color each, without files."""

    preparation = images.Preparation(8)

    def __getitem__(self, position):
        return {'image': np.full((8, 8, 3), position % 256, np.uint8)}

    def as_pictures(self):
        return self

    def name(self, position):
        return f'image {position}'


def many(classes=120, count=4000):
    """Results with many classes, without image files."""
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int32) % classes
    logits = rng.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 2
    names = tuple(f'class {i}' for i in range(classes))
    return results.Results(_Images(), names, logits, labels)


def several(count=200):
    """Results with three labels; an image can have several."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=(count, 3)).astype(np.float32)
    logits = rng.normal(size=(count, 3)).astype(np.float32) + 2 * labels - 1
    names = 'mass', 'effusion', '<5 mm'
    return results.Results(_Images(), names, logits.astype(np.float32), labels)


def make_book(**settings):
    """A sweep record over one field: `{value: (state, reason, metrics by seed)}`."""
    kept = sweep_record.SweepRecord(
        {'axes': [{'fields': [_RATE]}]}, ['--config=configs/cifar.py:<b>']
    )
    for number, (name, (state, why, runs)) in enumerate(settings.items()):
        made = {
            str(seed): sweep_record.TrialResult(
                figures, 1 + figures.index(max(figures)), 0.5, 90.0
            )
            for seed, figures in enumerate(runs)
        }
        fields = {_RATE: name}
        kept.settings.append(
            sweep_record.SettingResult(fields, fields, number, {}, state, why, made)
        )
    return kept
