"""Damaged `decisions.json` and its arrays: refused, or the same numbers."""

import dataclasses
import hashlib
import json
import pathlib
import tempfile

import numpy as np

from faults import fuzz_bytes
from flax_densenet.weights import calibration, decisions, thresholds
from helpers import decided as decided_lib

CLASSES = 3


def decided() -> list[tuple[bytes, bytes]]:
    """`decisions.json` and `decisions.safetensors`, of one and of several labels."""
    rng = np.random.default_rng(0)
    features, logits = rng.normal(size=(9, 4)), rng.normal(size=(9, CLASSES))
    found = []
    for method, several in ('both', False), ('neighbor', True), ('energy', False):
        count = CLASSES if several else 1
        made = dataclasses.replace(
            decided_lib.decide(
                features, logits[:1], method, classes=CLASSES, several=several
            ),
            calibration=calibration.Calibration(
                ('platt',) * count, (0.5,) * count, (0.25,) * count, ('a note',)
            ),
            thresholds=thresholds.Thresholds('cost=5:1', (None, 0.25, 0.5)),
        )
        with tempfile.TemporaryDirectory() as folder:
            decisions.save(folder, made)
            files = map(pathlib.Path, decisions.files_of(folder))
            found.append(tuple(path.read_bytes() for path in files))
    return found


def use_all(found: decisions.Decisions):
    """Computes all that a prediction takes from them, of a few images."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (5, CLASSES)).astype(np.float32)
    if found.calibration is not None:
        logits = found.calibration.apply(logits)
        assert np.isfinite(logits).all()
    probabilities = 1 / (1 + np.exp(-np.float64(logits)))
    if found.thresholds is not None:
        thresholds.is_positive(probabilities, found.thresholds.values)
        thresholds.describe_rule(found.thresholds.rule)
    if found.sets is not None:
        found.sets.table()
        found.sets.contains(probabilities, 0.9)
        found.sets.warn(0.9, [f'class {n}' for n in range(CLASSES)])
    if found.unusual is not None:
        features = rng.normal(size=(5, found.unusual.feature_size or 0))
        assert found.unusual.score(features, logits).shape == (5,)
    assert found.where


class Decisions:
    """What was fitted for a model: `decisions.json`, and its arrays.

    Half of the JSON is damaged as a disk would, and then either refused or as it was;
    the rest as a stranger could write it, with a checksum that fits.
    """

    name = 'input'

    def __init__(self):
        self._made = decided()
        self.seeds = [b'seed\n%d' % n for n in range(len(self._made))]

    def make(self, rng):
        number = rng.randrange(len(self._made))
        text, arrays = self._made[number]
        place = rng.random()
        if place < 0.4:
            text = fuzz_bytes.damage(rng, [text], (b'0', b'null', b'"', b'e9', b'-'))
            return b'bytes %d\n%s' % (number, text)
        if place < 0.8 or not arrays:
            plain = {k: v for k, v in json.loads(text).items() if k != 'checksum'}
            return b'json %d\n%s' % (
                number,
                fuzz_bytes.to_json(fuzz_bytes.damage_json(rng, plain)),
            )
        made = fuzz_bytes.damage_safetensors(rng, [arrays])
        return b'arrays %d\n%s' % (number, made)

    def run(self, raw, path):
        kind, _, content = raw.partition(b'\n')
        kind, _, number = kind.partition(b' ')
        text, arrays = self._made[int(number or content)]
        if kind == b'arrays':
            plain = json.loads(text)
            del plain['checksum']
            plain['arrays'] = hashlib.sha256(content).hexdigest()
            text, arrays = json.dumps(plain).encode(), content
        elif kind != b'seed':
            text = content
        for place, made in zip(decisions.files_of(path), (text, arrays), strict=True):
            pathlib.Path(place).write_bytes(made)
        found = decisions.load(path, CLASSES)
        if found is not None:
            use_all(found)
        if kind == b'bytes' and found is not None:
            first = json.loads(self._made[int(number)][0])
            values = first['thresholds']['values']
            assert list(found.thresholds.values) == values, found.thresholds
            assert list(found.calibration.scale) == first['calibration']['scale']
        return found
