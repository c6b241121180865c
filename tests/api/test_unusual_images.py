"""Unusual images and sets of classes of a trained run, from training to the page."""

import csv
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import flax_densenet
from flax_densenet.cli import command_line, commands
from flax_densenet.errors import UserError
from flax_densenet.evaluation import conformal
from flax_densenet.weights import decisions
from helpers.shared import DIGITS


@pytest.fixture(scope='module')
def images(digits_run, tmp_path_factory):
    """Digits as files, and images of noise, which are none."""
    from sklearn import datasets

    folder = tmp_path_factory.mktemp('images')
    digits = datasets.load_digits().images[::60] * 255 / 16
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 8))
    for name, arrays in (('digits', digits), ('noise', noise)):
        (folder / name).mkdir()
        for number, array in enumerate(arrays):
            pixels = Image.fromarray(array.astype(np.uint8))
            pixels.save(folder / name / f'{number:02}.png')
    return folder


@pytest.mark.slow
def test_a_run_has_them(digits_run):
    """Of the shared run: at most 5% of the images that set the limit are beyond it."""
    made = decisions.load(digits_run.workdir, 10)
    assert made.unusual.method == 'both'
    assert made.unusual.train_count == 1437 and made.unusual.val_count == 360
    assert made.sets.counts == (360,)
    found = flax_densenet.evaluate(digits_run.workdir)
    beyond = found.metrics['doubt']['unusual']['flagged']
    assert 0.04 <= beyond <= 0.05
    rows = found.metrics['doubt']['sets']
    row = next(row for row in rows if row['asked'] == 0.9)
    assert found.metrics['doubt']['sets_halved'] and 0.85 < row['coverage'] < 0.95
    # Of the probabilities that are predicted.
    same = conformal.fit(found.probabilities, found.labels)
    np.testing.assert_allclose(
        same.probabilities, made.sets.probabilities, rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_predictions(digits_run, images):
    model = flax_densenet.load(digits_run.workdir, batch_size=8)
    known = model.predict(sorted(map(str, (images / 'digits').iterdir())))
    noise = model.predict(sorted(map(str, (images / 'noise').iterdir())))
    assert np.median([one.unusual for one in known]) < 1
    assert sum(one.is_unusual for one in noise) > 15
    for one in known:
        inside = one.classes(coverage=0.9)
        assert inside[0].class_name == one.label
        assert len(one.classes(0.99)) >= len(inside) >= len(one.classes(0.5)) >= 1
    assert max(len(one.classes(0.99)) for one in known) > 1


def run(*arguments):
    words = ['launch.py', *map(str, arguments)]
    invocation = command_line.parse(words, commands.COMMANDS)
    return invocation.command.run(invocation)


@pytest.mark.slow
def test_commands(digits_run, images, tmp_path, capsys):
    """`predict --coverage`, `eval --others` and the files that they write."""
    workdir, out = digits_run.workdir, tmp_path / 'rows.csv'
    run('predict', workdir, images / 'digits', f'--out={out}', '--coverage=0.9')
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0])[-2:] == ['unusual', 'set']
    assert all(row['class1'] == row['set'].split(';')[0] for row in rows)
    capsys.readouterr()
    run('eval', workdir, f'--others={images / "noise"}')
    text = capsys.readouterr().out
    assert 'sets for a coverage of 90%' in text
    assert '20 images of noise: ' in text
    metrics = json.loads((pathlib.Path(workdir) / 'eval.json').read_text())
    assert metrics['doubt']['others']['auroc'] > 0.9
    lines = (pathlib.Path(workdir) / 'predictions.csv').read_text().splitlines()
    assert lines[0].endswith(',unusual') and len(lines) == 361


def test_mistakes(digits_run, images, tmp_path):
    """Refused before anything is computed."""
    with pytest.raises(UserError, match='coverage=2 must be between 0 and 1'):
        run('predict', digits_run.workdir, images, '--coverage=2')
    with pytest.raises(UserError, match='no-such-folder'):
        run('eval', digits_run.workdir, '--others=no-such-folder')
    fields = DIGITS | {'train': DIGITS['train'] | {'unusual': 'distance'}}
    with pytest.raises(UserError, match='train.unusual=distance is not known'):
        flax_densenet.train(fields, tmp_path / 'run')
    fields = DIGITS | {'train': DIGITS['train'] | {'unusual_share': 1.0}}
    with pytest.raises(UserError, match='train.unusual_share=1 must be'):
        flax_densenet.train(fields, tmp_path / 'run')
