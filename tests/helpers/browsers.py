"""A headless Chromium for tests of pages."""

import base64
import contextlib
import functools
import http.server
import shutil
import threading

from helpers.paths import ROOT

AXE = ROOT / 'examples' / 'web' / 'node_modules' / 'axe-core' / 'axe.min.js'
CHROMIUM = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
    None,
)
_FLAGS = (
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    # A fake camera that shows a clock, without a permission prompt.
    '--use-fake-device-for-media-stream',
    '--use-fake-ui-for-media-stream',
    # Other names and addresses cannot be resolved.
    '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
)


@contextlib.contextmanager
def launched():
    """The browser, started with playwright, which takes half a second to import."""
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        options = {'executable_path': CHROMIUM, 'args': list(_FLAGS)}
        with contextlib.closing(playwright.chromium.launch(**options)) as browser:
            yield browser


def violations(tab):
    """The violations that axe-core finds on a page, one per line."""
    tab.evaluate(AXE.read_text('utf-8'))  # exempt from the policy of the page
    found = tab.evaluate('axe.run().then(told => told.violations)')
    return [
        f'{one["id"]} ({one["impact"]}): {node["html"][:200]} {node["failureSummary"]}'
        for one in found
        for node in one['nodes'][:3]
    ]


_DROP = """
(files) => {
  const carried = new DataTransfer();
  for (const [name, data] of Object.entries(files)) {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    carried.items.add(new File([bytes], name));
  }
  document.body.dispatchEvent(
    new DragEvent('drop', { dataTransfer: carried, bubbles: true, cancelable: true }));
}
"""


def drop(page, body, name):
    """Drops a file on a page."""
    drop_all(page, {name: body})


def drop_all(page, files):
    """Drops files, `{name: bytes}`."""
    carried = {name: base64.b64encode(body).decode() for name, body in files.items()}
    page.evaluate(_DROP, carried)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files of a folder; records the requests."""

    def end_headers(self):
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_):
        self.server.asked.append(self.requestline)


@contextlib.contextmanager
def served(folder, headers):
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        server.asked, server.headers = [], headers
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
