"""The pages in a real Chromium: quiet, alone, and answering to clicks."""

import contextlib

import numpy as np
import pytest

from flax_densenet.data import dataset
from flax_densenet.evaluation import results
from flax_densenet.report import compare, page
from flax_densenet.sweeps import page as sweep_page
from helpers import browsers
from helpers.pages import BOOK, make_book, many, write_run
from helpers.runs import tiny_trained, write_images

sync_api = pytest.importorskip('playwright.sync_api')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browsers.CHROMIUM is None, reason='chromium is not installed'),
]


@pytest.fixture(scope='module')
def chromium():
    with browsers.launched(sync_api) as browser:
        yield browser


@contextlib.contextmanager
def opened(chromium, path, **options):
    """A page from disk; afterwards nothing was complained of or asked for."""
    wrong = []
    viewport = {'width': 1100, 'height': 900}
    context = chromium.new_context(**({'viewport': viewport} | options))
    with contextlib.closing(context):
        tab = context.new_page()
        tab.on('console', lambda message: wrong.append(message.text))
        tab.on('pageerror', lambda error: wrong.append(str(error)))
        tab.on('request', lambda request: wrong.append(request.url))
        tab.goto(f'file://{path}')
        tab.wait_for_selector('.chart .main-svg')
        yield tab
        # Nothing wider than the screen, so nothing scrolls sideways.
        assert tab.evaluate('document.documentElement.scrollWidth <= innerWidth')
    own = [f'file://{path}']
    assert [w for w in wrong if not w.startswith(('data:', 'blob:'))] == own


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp('browser')
    photos = write_images(folder / 'photos', {'ants': 40, 'bees': 30, 'wasps': 30})
    source = dataset.load_source(f'folder:{photos}', image_size=32)
    trained = tiny_trained(source, seed=2)
    found = results.collect(trained, source.test, source.class_names, batch_size=16)
    run = write_run(folder / 'run')
    return page.save_report(str(run), trained, source, found), found


def test_tables_sort(chromium, report):
    path, found = report
    with opened(chromium, path) as tab:
        for column, key in enumerate(('name', 'precision', 'recall', 'f1', 'auroc'), 1):
            head = f'#class-table th:nth-child({column}) button'
            for turn in (False, True):
                tab.click(head)
                names = tab.locator('#class-table tbody td:first-child')
                names = names.all_text_contents()
                values = {row['name']: row[key] for row in found.metrics['classes']}
                ordered = [values[name] for name in names]
                assert ordered == sorted(ordered, reverse=turn)
        sort = tab.get_attribute('#class-table th:nth-child(5)', 'aria-sort')
        assert sort == 'descending'


def test_cells_open(chromium, report):
    path, found = report
    matrix = np.array(found.metrics['confusion'])
    true, said = np.unravel_index(matrix.argmax(), matrix.shape)
    with opened(chromium, path) as tab:
        # Where the cell is drawn, by the chart's own axes.
        tab.locator('#confusion').scroll_into_view_if_needed()
        x, y = tab.evaluate(
            """([true_, said]) => {
              const chart = document.getElementById('confusion');
              const {xaxis, yaxis} = chart._fullLayout;
              const box = chart.getBoundingClientRect();
              return [box.x + xaxis._offset + xaxis.c2p(said),
                      box.y + yaxis._offset + yaxis.c2p(true_)];
            }""",
            [int(true), int(said)],
        )
        tab.mouse.move(x, y)
        tab.wait_for_selector('#confusion .hovertext')
        hover = tab.text_content('#confusion .hovertext')
        assert f'{matrix[true, said]} images' in hover
        tab.mouse.click(x, y)
        tab.wait_for_selector('#cell img')
        assert tab.locator('#cell img').count() == min(matrix[true, said], 24)
        names = found.class_names
        head = tab.text_content('#cell h3')
        assert head.startswith(names[true]) and str(matrix[true, said]) in head
        captions = tab.locator('#cell figcaption')
        titles = captions.evaluate_all('all => all.map(one => one.title)')
        assert all(f'/{names[true]}/' in title for title in titles)
        # By the buttons and the lists as well, which need no mouse.
        tab.locator('.pairs button').first.press('Enter')
        assert 'but the model says' in tab.text_content('#cell h3')
        tab.select_option('#cell-true', label=names[0])
        tab.select_option('#cell-predicted', label=names[0])
        assert tab.text_content('#cell h3').startswith(f'{names[0]}, and the model')


def test_curves_tell_their_values(chromium, report):
    path, _ = report
    with opened(chromium, path) as tab:
        plot = tab.locator('#accuracy .nsewdrag')
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        tab.mouse.move(box['x'] + box['width'] * 2 / 3.2, box['y'] + 50)
        tab.wait_for_selector('#accuracy .hoverlayer .legend')
        hover = tab.text_content('#accuracy .hoverlayer')
        assert 'training' in hover and '80 %' in hover
        assert 'best: epoch 2' in tab.text_content('#accuracy')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_schemes(chromium, report, scheme):
    """Text and page differ in both, also in the charts; a change is followed."""
    path, _ = report
    with opened(chromium, path, color_scheme=scheme) as tab:

        def seen():
            style = 'getComputedStyle(document.querySelector'
            return tab.evaluate(
                f"[{style}('section')).backgroundColor, "
                f"{style}('#accuracy .xtick text')).fill, {style}('body')).color]"
            )

        card, tick, text = seen()
        bright = [sum(map(int, c[4:-1].split(','))) > 384 for c in (card, tick, text)]
        light = scheme == 'light'
        assert bright == [light, not light, not light]
        tab.emulate_media(color_scheme={'light': 'dark', 'dark': 'light'}[scheme])
        tab.wait_for_timeout(200)
        assert not {card, tick, text} & set(seen())


def test_narrow_and_printed(chromium, report):
    path, _ = report
    with opened(chromium, path, viewport={'width': 360, 'height': 740}) as tab:
        assert tab.locator('.card').first.bounding_box()['width'] < 360
    with opened(chromium, path, color_scheme='dark') as tab:
        assert tab.pdf().startswith(b'%PDF')
        tab.emulate_media(media='print')
        assert tab.locator('nav').is_hidden()
        tab.wait_for_timeout(200)
        scale = "document.getElementById('confusion').data[0].colorscale"
        assert 'NaN' not in tab.evaluate(f'JSON.stringify({scale})')


def test_hundred_classes(chromium, tmp_path):
    found = many()
    source = dataset.load_source('digits', image_size=8)
    trained = tiny_trained(source)
    trained.metadata['class_names'] = list(found.class_names)
    path = tmp_path / 'report.html'
    # Their images are of one color, so Grad-CAM of any model does.
    page.save_report(str(tmp_path), trained, source, found, trained_on=False)
    assert path.stat().st_size < 10_000_000
    with opened(chromium, str(path)) as tab:
        tab.locator('.pairs button').first.click()
        assert tab.locator('#cell img').count() > 0
        tab.select_option('#roc-class', index=5)
        assert tab.locator('#roc .legend').is_visible()


def test_comparison(chromium, tmp_path):
    runs = [write_run(tmp_path / name, rate=r) for name, r in (('a', 1), ('b', 2))]
    path = str(tmp_path / 'compare.html')
    compare.save([str(run) for run in runs], path)
    with opened(chromium, path) as tab:
        assert tab.locator('#accuracy .legendtext').all_text_contents() == ['a', 'b']
        tab.click('#runs th:nth-child(2) button')
        assert tab.locator('#runs tbody tr').count() == 2


@pytest.mark.parametrize('width', [1100, 360])
def test_sweep(chromium, tmp_path, width):
    kept = make_book(**BOOK)
    kept.importances = {'optimizer.learning_rate': 1.0}
    sweep_page.save(str(tmp_path), kept)
    size = {'viewport': {'width': width, 'height': 900}}
    with opened(chromium, str(tmp_path / sweep_page.FILE), **size) as tab:
        names = tab.locator('#curves .legendtext').all_text_contents()
        assert [name.split()[0] for name in names] == ['003', '001', '002']
        assert tab.locator('#field0 .point').count() == 3
        assert tab.locator('#importances').is_visible()
        tab.click('#settings th:nth-child(2) button')
        means = tab.locator('#settings tbody td:nth-child(2)').all_text_contents()
        assert means == ['60.0 %', '67.5 %', '90.0 %', '-', '-']
