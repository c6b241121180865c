"""What the report says, and that it stays one whole page of bounded size."""

import html.parser
import json
import os
import pathlib
import re

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset
from flax_densenet.evaluation import results
from flax_densenet.report import compare, gallery, page, render
from helpers.pages import many, write_run
from helpers.runs import tiny_trained, write_images


def read(path):
    return pathlib.Path(path).read_text('utf-8')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A page, what it was made of, and the folder."""
    folder = tmp_path_factory.mktemp('page')
    names = {'ants': 20, '<b>&"bees"': 15, 'wasps': 15}
    photos = write_images(folder / 'photos', names, size=(20, 20))
    source = dataset.load_source(f'folder:{photos}', image_size=16)
    trained = tiny_trained(source, seed=2)
    found = results.collect(trained, source.test, source.class_names, batch_size=16)
    workdir = write_run(folder / 'run')
    path = page.save_report(str(workdir), trained, source, found)
    return read(path), found, source, workdir


class Elements(html.parser.HTMLParser):
    """Start tags with their attributes, and the text between."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text.append(text)


def test_page(made):
    text, found, source, workdir = made
    elements = Elements(text)
    said = ' '.join(' '.join(elements.text[:2000]).split())
    assert f'{found.metrics["accuracy"] * 100:.1f}%' in said
    assert 'Training time 1:30:00' in said and 'A <fast> chip × 4' in said
    assert 'epoch 3, step 7' in said
    assert 'How far to trust the maps' in said and 'with random maps' in said
    # A class name with HTML in it is text, in the tables as in the charts' numbers.
    assert '<b>&"bees"' in said
    before = text[: text.index('<script')]
    assert '<b>&"' not in before and '&lt;b&gt;&amp;&#34;bees&#34;' in before
    assert len(re.sub(r'data:image/[^"]+', '', text)) < 400_000
    rows = [row for row in elements.tags if row[0] == 'img']
    assert len(rows) > 24 and all(row[1]['src'].startswith('data:') for row in rows)
    assert all('alt' in attributes for _, attributes in rows)
    outside = [a for _, attributes in elements.tags for a in attributes.values() if a]
    assert not [a for a in outside if a.startswith(('http', '//'))]
    assert sorted(os.listdir(workdir)) == sorted(
        ['config.json', 'environment.json', 'eval.json', 'metrics.jsonl']
        + ['predictions.csv', 'report.html']
    )
    start = text.index('id="page-data">') + len('id="page-data">')
    raw = text[start : text.index('</script>', start)]
    assert '<' not in raw  # which could end the element
    assert 'best: epoch 2' in before and 'Epoch 3\nTraining: 50.0%' in before
    charts = json.loads(raw)
    assert charts['names'] == list(source.class_names)
    cells = charts['confusion']['cells']
    matrix = np.zeros((3, 3), int)
    for place, cell in cells.items():
        true, predicted = map(int, place.split(','))
        matrix[true, predicted] = len(cell)
        assert all(item['image'].startswith('data:image/webp') for item in cell)
        assert all(f'/{source.class_names[true]}/' in item['name'] for item in cell)
    assert matrix.tolist() == found.metrics['confusion']
    assert charts['confusion']['matrix'] == found.metrics['confusion']


def test_mistakes_are_the_surest():
    found = many()
    said = found.probabilities.argmax(-1)
    rows = gallery.pick_mistakes(found, 10)
    picked = [row['row'] for row in rows]
    assert all(
        row['true'] == found.labels[row['row']] != row['predicted'] for row in rows
    )
    wrong = np.flatnonzero(said != found.labels)
    expected = wrong[np.argsort(-found.probabilities.max(-1)[wrong])][:10]
    assert picked == expected.tolist()
    least = gallery.pick_uncertain(found, 5)
    ordered = np.sort(found.probabilities, -1)
    margin = ordered[:, -1] - ordered[:, -2]
    assert [row['row'] for row in least] == np.argsort(margin)[:5].tolist()


def test_mistakes_of_several_labels():
    logits = np.array([[3, -1], [-4, 1], [0.5, 0.1]], np.float32)
    labels = np.array([[0, 0], [np.nan, 1], [1, 0]], np.float32)
    found = results.Results([], ('a', 'b'), logits, labels)
    rows = gallery.pick_mistakes(found, 9)
    assert [(r['row'], r['predicted'], r['present']) for r in rows] == [
        (0, 0, False),
        (2, 1, False),
    ]
    rows = gallery.pick_uncertain(found, 2)
    assert [(r['row'], r['predicted']) for r in rows] == [(2, 1), (2, 0)]


@pytest.mark.slow
def test_many_classes_stay_small(monkeypatch):
    found = many()
    monkeypatch.setattr(gallery, 'CELL_BYTES', 100_000)
    confusion = page._confusion(found, page._kept_classes(found))
    assert len(confusion['kept']) == len(confusion['matrix']) == page.CLASSES
    matrix = np.array(found.metrics['confusion'])
    mistakes = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
    left_out = np.delete(mistakes, confusion['kept'])
    assert mistakes[confusion['kept']].min() >= left_out.max() > 0
    assert [pair['count'] for pair in confusion['pairs']] == sorted(
        (pair['count'] for pair in confusion['pairs']), reverse=True
    )
    cells = confusion['cells']
    kept = set(confusion['kept'])
    assert all(kept.issuperset(map(int, place.split(','))) for place in cells)
    taken = [len(item.get('image', '')) for cell in cells.values() for item in cell]
    assert 100_000 <= sum(taken) < 100_000 + max(taken)
    assert max(map(len, cells.values())) <= gallery.CELL_IMAGES
    shown = [item['row'] for item in max(cells.values(), key=len)]
    ordered = found.confidence[shown].tolist()
    assert ordered == sorted(ordered, reverse=True)
    assert page._roc(found)['chart'].count('<title>class ') == page.CLASSES


@pytest.mark.parametrize('size', [(30, 40), (300, 500)])
def test_maps_cover_what_the_model_sees(monkeypatch, size):
    """Also of images that are enlarged or reduced for the page."""
    boxes = []

    def overlay(image, cam, *, top, box):
        boxes.append((image.shape[:2], box))
        return image

    monkeypatch.setattr(gallery.overlay, 'overlay', overlay)
    image = np.zeros((*size, 3), np.uint8)
    cams = {'predicted': np.ones((2, 2)), 'true': np.full((2, 2), 0.5)}
    maps = gallery._draw_maps(image, (0, 0, size[1] / 2, size[0]), cams)
    assert [one['share'] for one in maps] == [1.0, 0.5]
    for (height, width), box in boxes:
        assert max(height, width) >= gallery.SMALLEST
        assert box == pytest.approx((0, 0, width / 2, height))


def test_names_in_any_direction_stand_apart():
    assert render.isolate('bees') == 'bees'
    assert render.isolate('نحلة') == '\u2068نحلة\u2069'


def test_samples_of_all_classes():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 50)
    picked = gallery.pick_samples(None, labels, 12)
    assert np.bincount(labels[picked]).tolist() == [5, 3, 4]


@pytest.mark.slow
def test_no_training_to_show(made, tmp_path):
    """Weights from elsewhere, measured on other data."""
    _, found, source, _ = made
    trained = tiny_trained(source, class_names=list(source.class_names))
    path = page.save_report(
        str(tmp_path / 'new'), trained, source, found, trained_on=False
    )
    text = read(path)
    assert 'id="training"' not in text and '<th>Training</th>' not in text
    assert 'parameters. Data: ' in text


def test_comparison(tmp_path):
    first = write_run(tmp_path / 'ckpt' / 'first')
    second = write_run(tmp_path / 'ckpt' / 'second', rate=1e-2)
    (first / 'report.html').write_text('here')
    path = str(tmp_path / 'ckpt' / 'compare.html')
    compare.save([str(first), str(second)], path)
    text = read(path)
    assert 'href="first/report.html"' in text and 'second/report.html' not in text
    said = ' '.join(' '.join(Elements(text).text[:400]).split())
    assert 'optimizer.learning_rate 0.001 0.01' in said
    assert 'model.variant' not in said
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='empty holds no run'):
        compare.save([str(first), str(tmp_path / 'empty')], path)


def test_comparison_of_unlike_data(tmp_path):
    """Runs of other images are named, stand last and are not compared."""
    runs = [write_run(tmp_path / name) for name in ('most', 'more', 'other')]
    files = ['a.jpg', 'b.jpg', 'c.jpg']
    for run, data in zip(runs, ('folder:one', 'folder:one', 'folder:two'), strict=True):
        config = json.loads((run / 'config.json').read_text())
        config['data'] = {'source': data}
        (run / 'config.json').write_text(json.dumps(config))
    path = str(tmp_path / 'compare.html')
    compare.save([str(run) for run in reversed(runs)], path)
    text = read(path)
    assert 'not tested on the same images' in text
    table = text[text.index('id="runs"') :]
    order = [table.index(f'<td>{name}') for name in ('more', 'most', 'other')]
    assert max(order) == order[-1] and table.count('(other data)') == 1
    # The same name with other images is other data, too.
    seen = dict.fromkeys(files)
    rows = [
        {'data': 'one', 'predictions': seen},
        {'data': 'one', 'predictions': {'z.jpg': None}},
        {'data': 'one', 'predictions': dict(reversed(seen.items()))},
    ]
    assert compare._group(rows) == [[rows[0], rows[2]], [rows[1]]]
    assert 'not tested on the same' not in _compared(tmp_path, runs[:2])


def _compared(folder, runs):
    path = str(folder / 'alike.html')
    compare.save([str(run) for run in runs], path)
    return read(path)


def test_page_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written .*; use another --workdir'):
        values = dict.fromkeys(('rows', 'differing', 'names', 'groups', 'charts'), [])
        values |= dict.fromkeys(('classes', 'disagreements', 'columns', 'verdicts'), [])
        path = str(tmp_path / 'file' / 'x.html')
        render.save_page(path, 'compare.html', {}, areas=False, made='', **values)
