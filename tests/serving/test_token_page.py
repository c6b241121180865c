"""The form for the token, pages of other sites and /docs, in a browser.

`python -m pytest -m slow tests/serving/test_token_page.py`
"""

import functools
import http.server
import threading

import pytest

from flax_densenet.serving import openapi
from helpers import browsers
from helpers.servers import JPEG, TOKEN, ask, running

pytest.importorskip('starlette')
pytest.importorskip('hypercorn')
pytest.importorskip('playwright')
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def browser():
    if not browsers.CHROMIUM:
        pytest.skip('chromium is not here')
    with browsers.launched() as browser:
        yield browser


def open_page(browser, address):
    """A page with what its console says."""
    page = browser.new_context().new_page()
    said = []
    page.on('console', lambda message: said.append(message.text))
    page.on('pageerror', lambda error: said.append(str(error)))
    page.goto(address)
    return page, said


def test_token_is_asked_for_once(browser, guarded_port, tmp_path):
    own = f'http://127.0.0.1:{guarded_port}/'
    page, said = open_page(browser, own)
    assert page.inner_text('h1') == 'This server needs a token'
    page.screenshot(path=str(tmp_path / 'asks.png'))
    for wrong in 'wrong', 'größer':
        page.fill('#token', wrong)
        page.keyboard.press('Enter')
        page.wait_for_selector('#denied:not([hidden])')
        assert page.inner_text('#denied').startswith('This token is wrong.')
    assert said and all('401' in line for line in said)
    said.clear()
    page.fill('#token', f' {TOKEN} ')
    page.click('button[type=submit]')
    page.wait_for_selector('#choose')
    assert page.title() == 'bugs: try it on your images'
    assert 'ants, bees' in page.inner_text('main')
    assert "-H 'Authorization: Bearer TOKEN'" in page.text_content('#curl')
    browsers.drop(page, JPEG, 'bug.jpg')
    page.wait_for_selector('#result:not([hidden]):not(.waiting) li')
    page.screenshot(path=str(tmp_path / 'predicts.png'))
    # Kept in this tab, and nowhere else.
    page.reload()
    page.wait_for_selector('#choose')
    assert page.context.cookies() == []
    assert page.evaluate('localStorage.length') == 0
    assert said == []
    page.click('summary')
    page.click('a:text-is("/model")')
    page.wait_for_url(lambda url: url.startswith('blob:'))
    assert '"multi_label":false' in page.inner_text('body')
    other, _ = open_page(browser, own)
    assert other.inner_text('h1') == 'This server needs a token'
    other.set_viewport_size({'width': 320, 'height': 700})
    assert other.evaluate('document.documentElement.scrollWidth') <= 320


def test_token_that_is_no_longer_right(browser, trained):
    with running(trained, token='first' * 4) as port:
        page, _ = open_page(browser, f'http://127.0.0.1:{port}/')
        page.fill('#token', 'first' * 4)
        page.keyboard.press('Enter')
        page.wait_for_selector('#choose')
        page.route(
            '**/predict*',
            lambda route: route.fulfill(status=401, json={'error': 'the token is'}),
        )
        browsers.drop(page, JPEG, 'bug.jpg')
        page.wait_for_selector('#token')
        assert page.evaluate('sessionStorage.length') == 0


def test_documentation_page(browser, guarded_port, tmp_path):
    own = f'http://127.0.0.1:{guarded_port}'
    page, said = open_page(browser, f'{own}/docs')
    assert f'{own}/predict?top=3' in page.inner_text('main')
    assert openapi.ADDRESS not in page.inner_text('main')
    page.screenshot(path=str(tmp_path / 'docs.png'), full_page=True)
    page.set_viewport_size({'width': 320, 'height': 700})
    assert page.evaluate('document.documentElement.scrollWidth') <= 320
    page.click('a:text-is("the page")')
    page.wait_for_selector('#token')
    assert said == []


_FETCH = """
async ([address, token, bytes]) => {
  const headers = token ? { Authorization: 'Bearer ' + token } : {};
  try {
    const answer = await fetch(address + '/predict', {
      method: 'POST', headers, body: new Uint8Array(bytes) });
    return [answer.status, await answer.json()];
  } catch (error) {
    return [0, String(error)];
  }
}
"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_pages_of_other_sites(browser, trained, tmp_path):
    """A page of an allowed site reads predictions and errors, one of others nothing."""
    (tmp_path / 'index.html').write_text('<title>another site</title>')
    handler = functools.partial(_Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        origin = f'http://127.0.0.1:{site.server_port}'
        page, _ = open_page(browser, origin)
        for origins, token in ((origin,), TOKEN), ((), None):
            with running(trained, origins=origins, token=token) as port:
                address = f'http://127.0.0.1:{port}'
                sent = [address, token, list(JPEG)]
                status, told = page.evaluate(_FETCH, sent)
                assert status == (200 if origins else 0), told
                if origins:
                    headers = {'Authorization': f'Bearer {TOKEN}'}
                    expected = ask(port, '/predict', JPEG, headers=headers).json
                    assert told['predictions'] == expected['predictions']
                    status, told = page.evaluate(_FETCH, [address, '', list(JPEG)])
                    assert status == 401 and 'needs a token' in told['error']
        site.shutdown()
