"""Private pages hold no name of a file, no path and no byte of an image."""

import dataclasses
import json
import re

import numpy as np
import pytest

from flax_densenet.data import dataset
from flax_densenet.evaluation import results, subgroups
from flax_densenet.report import compare, page, private, render, subgroup_tables
from flax_densenet.weights import decisions, thresholds
from helpers.marks import slow_after
from helpers.pages import write_run
from helpers.runs import tiny_trained, write_images


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Images with telling names, a model, and what it says of them."""
    folder = tmp_path_factory.mktemp('Hospital-Ward7')
    photos = write_images(folder / 'photos', {'ants': 12, 'bees': 12}, size=(20, 20))
    for number, path in enumerate(sorted(photos.rglob('*.jpg'))):
        path.rename(path.with_name(f'Doe-Jane-{number:03}.jpg'))
    source = dataset.load_source(f'folder:{photos}', image_size=16)
    trained = tiny_trained(source, seed=2)
    found = results.collect(trained, source.test, source.class_names, batch_size=16)
    return folder, source, trained, found


def write_private(folder, source, *, private=True):
    """A run whose settings and command are full of paths."""
    write_run(folder)
    config = json.loads((folder / 'config.json').read_text())
    config |= {'init_from': 'Doe-weights.pth', 'report': {'private': private}}
    config['data'] = {'source': source.name, 'labels': 'Doe.csv', 'batch_size': 7}
    (folder / 'config.json').write_text(json.dumps(config))
    environment = json.loads((folder / 'environment.json').read_text())
    environment['command'] = f'train {source.name} --workdir={folder}'
    (folder / 'environment.json').write_text(json.dumps(environment))
    return folder


@pytest.mark.parametrize('weights', slow_after(1, ['/home/Doe/Jane.pth', None]))
def test_report(made, weights, monkeypatch):
    folder, source, trained, found = made
    monkeypatch.setattr(subgroups, 'LEAST', 2)
    places = np.arange(len(source.train) + len(source.test)) % 2
    monkeypatch.setattr(
        found.examples.reader,
        'subgroups',
        {
            'site (path)': np.array(['Doe-a', 'Doe-b'])[places],
            'view': np.array(['from above', 'from <side>'])[places],
        },
    )
    fitted = decisions.Decisions(None, '', 2, f'folder:{folder}', 'val', 9)
    chosen = thresholds.Thresholds('f1', (None, 0.5))
    fitted = dataclasses.replace(fitted, thresholds=chosen)
    found = dataclasses.replace(found, decisions=fitted)  # measured anew
    workdir = write_private(folder / f'Doe-run-{bool(weights)}', source)
    if weights:
        trained = type(trained)(**(vars(trained) | {'step': None}))
    path = page.save_report(str(workdir), trained, source, found, weights=weights)
    with open(path) as file:
        text = file.read()
    assert_private(text, folder)
    assert '<title>Report: ' in text and 'batch_size' in text
    assert 'id="choice"' in text and '"name":"bees","positives":' in text
    assert 'Metrics by view' in text and 'from &lt;side&gt;' in text
    assert 'by site (path)' not in text
    assert 'Thresholds were fitted on 9 validation images.' in ' '.join(text.split())
    assert f'{found.metrics["accuracy"] * 100:.1f}%' in text and 'ants' in text
    # All of it is there otherwise, which the test has to find.
    path = page.save_report(
        *(str(workdir), trained, source, found), weights=weights, private=False
    )
    with open(path) as file:
        text = file.read()
    with pytest.raises(AssertionError):
        assert_private(text, folder)
    for what in (
        *('Doe-Jane-0', 'data:image/webp', str(folder), 'Doe-weights.pth'),
        'Metrics by site (path)',
    ):
        assert what in text, what


def assert_private(text, folder):
    assert 'Doe' not in text and 'Jane' not in text
    assert str(folder) not in text and 'Ward7' not in text
    assert 'data:image' not in text and '<img' not in text
    assert not re.search(r'[\w/-]+\.(?:jpg|png|csv|pth)', text.partition('<script')[0])


def test_comparison(made):
    folder, source, trained, found = made
    rng = np.random.default_rng(0)
    runs = []
    for name in ('a', 'b'):
        run = write_private(folder / 'runs' / name, source, private=name == 'b')
        other = results.Results(
            found.examples,
            found.class_names,
            rng.normal(size=found.logits.shape).astype(np.float32),
            found.labels,
        )
        results.save(str(run), other, results.Measured(source.name, 2, 20))
        (run / 'report.html').write_text('')
        runs.append(str(run))
    path = str(folder / 'compare.html')
    compare.save(runs, path)
    with open(path) as file:
        text = file.read()
    assert_private(text, folder)
    assert 'Could the differences be chance?' in text
    compare.save(runs, path, private=False)
    with open(path) as file:
        text = file.read()
    assert 'Doe-Jane' in text and 'data:image' in text and 'report.html' in text


def test_pictures_are_refused(tmp_path, monkeypatch):
    """Whatever a section that does not know of it may add."""
    values = dict.fromkeys(('rows', 'differing', 'names', 'groups', 'charts'), [])
    values |= dict.fromkeys(('classes', 'disagreements', 'columns', 'verdicts'), [])
    values['made'] = 'data:image/webp;base64,UklGR'
    arguments = str(tmp_path / 'x.html'), 'compare.html', {}
    render.save_page(*arguments, areas=False, **values)
    with pytest.raises(AssertionError, match='contains a picture'):
        render.save_page(*arguments, private=True, areas=False, **values)


def test_subgroups_are_flagged():
    """The worst part, and whether that counts among all that are compared."""
    row = {'name': 'x', 'count': 40, 'p_value': 0.004, 'worst': True}
    row['values'] = dict.fromkeys(subgroups.METRICS, 0.5)
    row['intervals'] = dict.fromkeys(subgroups.METRICS) | {'accuracy': [0.4, 0.6]}
    other = row | {'name': 'y', 'count': 12, 'worst': False, 'p_value': None}
    found = {'column': 'age', 'metric': 'accuracy', 'bins': 'decades', 'looks': 10}
    row['rest'] = 0.8
    found |= {'left_out': 3, 'unknown': 1, 'rows': [row, other]}
    metrics = {'subgroups': [found], 'accuracy': 0.7, 'macro': {}}
    table = subgroup_tables.section(metrics)[0]
    first, second = table['rows']
    assert first['worst'] and first['real'] and not first['few']
    assert second['few'] and not second['worst'] and not second['real']
    cell = first['cells'][0]
    assert (cell['text'], cell['told']) == ('50.0%', '40.0–60.0%')
    assert first['cells'][1]['told'] == '' and first['cells'][1]['text'] == '0.500'
    assert table['notes'] == (
        'numbers divided into decades; 3 images in parts of fewer than 10 are left '
        'out; unknown for 1 images'
    )
    found['looks'] = 13
    assert not subgroup_tables.section(metrics)[0]['rows'][0]['real']


def test_settings_without_places():
    fields = {
        'data.source': 'folder:x',
        'data.batch_size': 3,
        'data.mean': [0.1, 0.2],
        'train.trackers': 'C:\\x',
        'data.size_schedule': [[1, 'a/b']],
        'init_from': 'x.pth',
        'model.variant': 'BC-L10k4',
    }
    shown = private.hide_fields(fields)
    assert list(shown) == ['data.batch_size', 'data.mean', 'model.variant']
