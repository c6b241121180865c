"""Checks of the page of `serve` in a browser."""

import csv
import pathlib

import pytest

from helpers import browsers


def check_several(page, photo, best):
    """A row for each image, counts, a file for a table; then one of them again."""
    browsers.drop_all(page, {'a.jpg': photo, 'empty.jpg': b''})
    page.wait_for_selector('#rows .bad')
    page.wait_for_selector('#batch-title:text-is("2 images")')
    cells = page.locator('#rows tr td:nth-child(3)').all_inner_texts()
    assert cells == [best['class'], 'the file is empty']
    assert page.inner_text('#counts') == f'1 {best["class"]}, 1 not readable'
    with page.expect_download() as download:
        page.click('#download')
    table = pathlib.Path(download.value.path()).read_text('utf-8-sig')
    rows_of_table = list(csv.DictReader(table.splitlines()))
    assert [row['error'] for row in rows_of_table] == ['', 'the file is empty']
    share = rows_of_table[0][f'probability_{best["class"]}']
    assert float(share) == pytest.approx(best['probability'], rel=1e-4)
    assert not page.locator('#result').is_visible()
    page.click('#rows button >> nth=0')  # back to one
    page.wait_for_selector('#result:not([hidden]):not(.waiting) li')
    # A decision needs the probability that one asks for.
    page.locator('#threshold').fill('99')
    assert page.inner_text('#verdict').startswith('Undecided: ')
    page.locator('#threshold').fill('0')
    assert page.inner_text('#verdict').startswith('Predicted ')
    if browsers.AXE.exists():
        assert browsers.violations(page) == []
    page.click('#clear')


def check_camera(page):
    """Closed without an image; then with one, which is predicted."""
    page.click('#camera')
    page.wait_for_selector('#viewfinder[open]')
    page.keyboard.press('Escape')
    page.wait_for_selector('#viewfinder', state='hidden')
    page.click('#camera')
    page.wait_for_selector('#viewfinder[open]')
    # An image has come, before which there is nothing to take.
    page.wait_for_selector('#shoot:not([disabled])')
    page.click('#shoot')
    size = '[picture.naturalWidth, picture.naturalHeight]'
    for _ in range(600):  # the page's policy forbids `wait_for_function`
        if page.evaluate(size) == [640, 480]:
            break
        page.wait_for_timeout(100)
    assert page.evaluate(size) == [640, 480]
    page.wait_for_selector('#result:not([hidden]):not(.waiting) li')
