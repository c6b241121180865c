"""A Chromium that looks for nobody, for tests of pages."""

import contextlib
import shutil

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
    # No other name or address is found.
    '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
)


@contextlib.contextmanager
def launched(sync_api):
    """The browser, of playwright's `sync_api`."""
    with sync_api.sync_playwright() as playwright:
        options = {'executable_path': CHROMIUM, 'args': list(_FLAGS)}
        with contextlib.closing(playwright.chromium.launch(**options)) as browser:
            yield browser
