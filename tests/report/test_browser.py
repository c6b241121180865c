"""The pages in a real Chromium: quiet, alone, and answering to clicks."""

import contextlib
import dataclasses

import numpy as np
import pytest

from flax_densenet.data import dataset
from flax_densenet.evaluation import doubt, results
from flax_densenet.report import compare, page
from flax_densenet.sweeps import page as sweep_page
from flax_densenet.weights import thresholds
from helpers import browsers
from helpers.decided import decide
from helpers.marks import exhaustive_after
from helpers.pages import BOOK, make_book, many, several, write_run
from helpers.runs import tiny_trained, write_images

pytest.importorskip('playwright')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browsers.CHROMIUM is None, reason='chromium is not installed'),
]


@pytest.fixture(scope='module')
def chromium():
    with browsers.launched() as browser:
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
        tab.wait_for_selector('svg.plot')
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
    sites = np.full(100, 'Lyon')
    sites[source.test.indices[::2]] = 'Oslo'
    source.test.reader.subgroups = {'site': sites}
    trained = tiny_trained(source, seed=2)
    found = results.collect(trained, source.test, source.class_names, batch_size=16)
    found = with_decisions(found)
    run = write_run(folder / 'run')
    return page.save_report(str(run), trained, source, found), found


def with_decisions(found):
    """Results with thresholds, sets of classes and a score of unusual images."""
    random = np.random.default_rng(0)
    classes = len(found.class_names)
    several = found.multi_label
    features = random.normal(size=(20, 4))
    made = decide(features, found.logits[:2], classes=classes, several=several)
    values = tuple(np.linspace(0.3, 0.6, classes))
    chosen = thresholds.Thresholds('sensitivity=0.9', values)
    scores = random.normal(size=len(found.labels))
    others = doubt.Others('photos of <cars>', 1 + random.normal(size=30))
    return dataclasses.replace(
        found,
        decisions=dataclasses.replace(made, thresholds=chosen),
        unusual=scores.astype(np.float32),
        others=others,
    )


@pytest.fixture(scope='module')
def labels_report(tmp_path_factory):
    """A private page, without the maps that take long, of several labels an image."""
    folder = tmp_path_factory.mktemp('labels')
    found = with_decisions(several())
    source = dataset.load_source('digits', image_size=8)
    trained = tiny_trained(source)
    trained.metadata['class_names'] = list(found.class_names)
    path = str(folder / 'report.html')
    page.save_report(
        *(str(write_run(folder / 'run')), trained, source, found),
        path=path,
        trained_on=False,
        private=True,
    )
    return path


def test_thresholds_and_doubt(chromium, report, labels_report):
    """Their sections say it in words, and fit a phone in both schemes."""
    phone = {'viewport': {'width': 390, 'height': 800}}
    for path, what in ((report[0], 'classes'), (labels_report, 'labels')):
        for options in ({}, {'color_scheme': 'dark'} | phone):
            with opened(chromium, path, **options) as tab:
                text = ' '.join(tab.text_content('#decisions').split())
                assert 'a sensitivity of at least 90%' in text
                assert tab.locator('#decisions svg .line').count() >= 3
                text = ' '.join(tab.text_content('#doubt').split())
                assert f'A set of {what} contains' in text
                assert '30 images of' in text and f'none of the {what}' in text
                titles = tab.locator('#doubt figcaption').all_text_contents()
                assert f'{what.capitalize()} in a set, on average' in titles


def numbers(tab):
    """The threshold and the four shares that the page shows."""
    shares = tab.locator('#choice-numbers b').all_text_contents()
    return tab.text_content('#threshold-value'), shares


@pytest.mark.parametrize('width', [1100, 390])
def test_other_thresholds(chromium, labels_report, width):
    """The slider starts at the label's own threshold and moves by the keyboard."""
    found = with_decisions(several())
    rows = found.metrics['thresholds']['classes']
    names = 'sensitivity', 'specificity', 'ppv', 'npv'
    viewport = {'width': width, 'height': 800}
    with opened(chromium, labels_report, viewport=viewport) as tab:
        for row in rows[::-1]:
            tab.select_option('#choice-class', label=row['name'])
            own = f'{row["threshold"]:.3f}', [f'{row[n] * 100:.1f}%' for n in names]
            assert numbers(tab) == own
            assert tab.locator('#choice-reset').is_disabled()
            tab.locator('#threshold').press('ArrowRight')
            value, shares = numbers(tab)
            assert float(value) > row['threshold'] and shares != own[1]
            place = tab.evaluate("document.getElementById('threshold').value")
            counts = tab.evaluate(
                f"data.choices[document.getElementById('choice-class').value]"
                f'.found[{place}]'
            )
            text = tab.text_content('#choice-numbers div:first-child')
            missed = row['positives'] - counts
            assert f'{counts} of {row["positives"]} found, {missed} missed' in text
            tab.locator('#threshold').press('End')  # nothing is positive
            assert numbers(tab) == ('1.000', ['0.0%', '100.0%', '-', own_npv(row)])
            tab.locator('#threshold').press('Home')
            assert numbers(tab)[1][:2] == ['100.0%', '0.0%']
            tab.click('#choice-reset')
            assert numbers(tab) == own
            said = tab.get_attribute('#threshold', 'aria-valuetext')
            assert said == f'{own[0]}: sensitivity {own[1][0]}, specificity {own[1][1]}'
        assert 'better than it is' in tab.text_content('#choice')
        tab.emulate_media(media='print')
        assert tab.locator('#choice').is_hidden()
        assert tab.locator('#threshold-table').is_visible()
        tab.emulate_media(media='screen')


def own_npv(row):
    share = row['negatives'] / (row['positives'] + row['negatives'])
    return f'{share * 100:.1f}%'


def test_tables_sort(chromium, report):
    """Numbers begin with the largest, names with the first letter."""
    path, found = report
    with opened(chromium, path) as tab:
        for column, key in enumerate(('name', 'precision', 'recall', 'f1', 'auroc'), 1):
            head = f'#class-table th:nth-child({column}) button'
            for turn in (key != 'name', key == 'name'):
                tab.click(head)
                names = tab.locator('#class-table tbody td:first-child')
                names = names.all_text_contents()
                values = {row['name']: row[key] for row in found.metrics['classes']}
                ordered = [values[name] for name in names]
                known = [value for value in ordered if value is not None]
                assert known == sorted(known, reverse=turn)
                assert ordered[: len(known)] == known  # dashes stay at the end
        sort = tab.get_attribute('#class-table th:nth-child(5)', 'aria-sort')
        assert sort == 'ascending'


def test_subgroups_sort(chromium, report):
    """With a bar for each interval, in both schemes and on a phone."""
    path, found = report
    assert len(found.metrics['subgroups']) == 1
    phone = {'viewport': {'width': 390, 'height': 800}}
    for options in ({}, {'color_scheme': 'dark'}, phone):
        with opened(chromium, path, **options) as tab:
            rows = '#subgroups tbody tr'
            counts = [tab.locator(f'{rows} td:nth-child(2)').nth(n) for n in (0, 1)]
            tab.click('#subgroups th:nth-child(2) button')
            shown = [int(count.get_attribute('data-value')) for count in counts]
            assert sum(shown) == 20 and shown[0] >= shown[1]
            bar = tab.locator(f'{rows} .range').first.bounding_box()
            assert bar['width'] == 90
            assert 'Among 2 parts' in tab.text_content('#subgroups')


def test_cells_open(chromium, report):
    path, found = report
    matrix = np.array(found.metrics['confusion'])
    true, said = np.unravel_index(matrix.argmax(), matrix.shape)
    with opened(chromium, path) as tab:
        # The worst cell is open from the start.
        assert tab.text_content('#cell h3').startswith('Actual ')
        tab.click(f'#confusion [data-cell="{true},{said}"]')
        pressed = tab.locator('#confusion [aria-pressed="true"]')
        assert pressed.get_attribute('data-cell') == f'{true},{said}'
        assert tab.locator('#cell img').count() == min(matrix[true, said], 24)
        names = found.class_names
        head = tab.text_content('#cell h3')
        assert names[true] in head and f': {matrix[true, said]} images' in head
        captions = tab.locator('#cell figcaption')
        titles = captions.evaluate_all('all => all.map(one => one.title)')
        assert all(f'/{names[true]}/' in title for title in titles)
        # By the buttons and the lists as well, which need no mouse.
        tab.locator('.pairs button').first.press('Enter')
        assert tab.text_content('#cell h3').startswith('Actual ')
        tab.select_option('#cell-true', label=names[0])
        tab.select_option('#cell-predicted', label=names[0])
        assert tab.text_content('#cell h3').startswith(f'{names[0]}, predicted correct')


def test_images_enlarge(chromium, report):
    """The original, its maps, the path to copy; arrow keys go to the next one."""
    path, _ = report
    with opened(chromium, path) as tab:
        cards = tab.locator('#mistakes .card')
        tab.locator('#mistakes .zoom').first.click()
        assert tab.locator('#box-panels img').count() == 3
        shown = [cards.nth(n).get_attribute('data-path') for n in (0, 1)]
        assert tab.text_content('#box-path') == shown[0]
        tab.keyboard.press('ArrowRight')
        assert tab.text_content('#box-path') == shown[1]
        tab.keyboard.press('Escape')
        assert tab.locator('#box').is_hidden()
        # Mistakes in the cells have maps, too.
        tab.locator('#cell .zoom').first.click()
        assert tab.locator('#box-panels img').count() == 3
        assert 'vidence for' in tab.text_content('#box-panels')


def test_curves_tell_their_values(chromium, report):
    path, _ = report
    with opened(chromium, path) as tab:
        tab.locator('#accuracy .tip').nth(1).hover()
        assert tab.text_content('#tip') == 'Epoch 2\nTraining: 50.0%\nTest: 80.0%'
        assert 'best: epoch 2' in tab.text_content('#accuracy')


def test_charts_without_scripts(chromium, report):
    path, _ = report
    options = {'java_script_enabled': False}
    with contextlib.closing(chromium.new_context(**options)) as context:
        tab = context.new_page()
        tab.goto(f'file://{path}')
        for place in ('#accuracy', '#reliability', '#roc'):
            assert tab.locator(f'{place} svg .line').first.bounding_box()['width'] > 50
        assert tab.locator('#confusion button').first.is_visible()
        assert tab.locator('#choice').is_hidden()
        assert tab.locator('#threshold-table').is_visible()


_needs_axe = pytest.mark.skipif(
    not browsers.AXE.exists(),
    reason='axe-core is not installed: npm install in examples/web',
)


@_needs_axe
@pytest.mark.parametrize('scheme', exhaustive_after(1, ['dark', 'light']))
def test_accessible(chromium, report, labels_report, compared, swept, scheme):
    for path in (report[0], labels_report, compared, swept):
        with opened(chromium, path, color_scheme=scheme) as tab:
            assert browsers.violations(tab) == []
    with opened(chromium, report[0], color_scheme=scheme) as tab:
        tab.locator('#mistakes .zoom').first.click()
        assert browsers.violations(tab) == []


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_schemes(chromium, report, scheme):
    """Text and page differ in both, also in the charts; a change is followed."""
    path, _ = report
    with opened(chromium, path, color_scheme=scheme) as tab:

        def seen():
            style = 'getComputedStyle(document.querySelector'
            return tab.evaluate(
                f"[{style}('section')).backgroundColor, "
                f"{style}('#accuracy .name')).fill, {style}('body')).color]"
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
        assert tab.pdf(prefer_css_page_size=True).count(b'/Type /Page\n') <= 5
        tab.emulate_media(media='print')
        assert tab.locator('nav').is_hidden()


@pytest.mark.exhaustive
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
        assert tab.locator('#roc .chosen').count() == 1
        # A click on the large matrix opens the cell there.
        tab.locator('svg#confusion').click(position={'x': 3, 'y': 3})
        first = page._kept_classes(found)[0]
        count = found.metrics['confusion'][first][first]
        expected = f'class {first}, predicted correctly: {count} images'
        assert tab.text_content('#cell h3') == expected


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('compared')
    runs = [write_run(folder / name, rate=r) for name, r in (('a', 1), ('b', 2))]
    path = str(folder / 'compare.html')
    compare.save([str(run) for run in runs], path)
    return path


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp('swept')
    kept = make_book(**BOOK)
    kept.importances = {'optimizer.learning_rate': 1.0}
    sweep_page.save(str(folder), kept)
    return str(folder / sweep_page.FILE)


def test_comparison(chromium, compared):
    with opened(chromium, compared) as tab:
        legend = tab.locator('#accuracy .legend button')
        assert legend.all_text_contents() == ['a', 'b']
        legend.first.click()
        assert tab.locator('#accuracy g[data-group="a"]').first.is_hidden()
        tab.click('#runs th:nth-child(2) button')
        assert tab.locator('#runs tbody tr').count() == 2


@pytest.mark.parametrize('width', [1100, 360])
def test_sweep(chromium, swept, width):
    size = {'viewport': {'width': width, 'height': 900}}
    with opened(chromium, swept, **size) as tab:
        names = tab.locator('#curves .legend button').all_text_contents()
        assert [name.split()[0] for name in names] == ['003', '001', '002']
        assert tab.locator('#field0 .point').count() == 3
        assert tab.locator('#importances').is_visible()
        tab.click('#settings th:nth-child(3) button')
        means = tab.locator('#settings tbody td:nth-child(3)').all_text_contents()
        assert means == ['90.0%', '67.5%', '60.0%', '-', '-']
