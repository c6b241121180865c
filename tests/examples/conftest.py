"""The page of examples/web, opened in a Chromium."""

import contextlib
import pathlib
import shutil
import subprocess

import pytest

from helpers import browsers
from helpers.web_example import NODE, WEB


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """The page, without a model."""
    folder = tmp_path_factory.mktemp('web') / 'dist'
    command = [NODE, 'build.js', str(folder)]
    subprocess.run(command, cwd=WEB, check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture(scope='module')
def chromium():
    with browsers.launched() as browser:
        yield browser


@pytest.fixture
def opened(chromium, built, tmp_path):
    """Opens the page beside a model; afterwards nobody else was asked for anything."""

    @contextlib.contextmanager
    def open_page(model=None, *, headers=(), complaints=0, script='', **options):
        folder = tmp_path / 'served'
        shutil.copytree(built, folder)
        if model:
            shutil.copy(model, folder / 'model.onnx')
        said, asked = [], []
        with (
            browsers.served(folder, dict(headers)) as server,
            contextlib.closing(chromium.new_context(**options)) as context,
        ):
            own = f'http://127.0.0.1:{server.server_port}/'
            context.on('request', lambda request: asked.append(request))
            tab = context.new_page()
            tab.set_default_timeout(30_000)
            tab.add_init_script(script)
            tab.on('console', lambda message: said.append(message.text))
            tab.on('pageerror', lambda error: said.append(str(error)))
            tab.goto(own)
            tab.wait_for_selector('#status:empty', state='attached')
            yield tab
            assert tab.evaluate('document.documentElement.scrollWidth <= innerWidth')
        outside = [
            r.url for r in asked if not r.url.startswith((own, 'blob:', 'data:'))
        ]
        assert outside == []
        assert {line.split()[0] for line in server.asked} == {'GET'}
        assert len(said) == complaints, said

    return open_page


@pytest.fixture(scope='module')
def photo():
    """A photograph of 640 by 427 pixels, as its camera wrote it."""
    sklearn_datasets = pytest.importorskip('sklearn.datasets')
    folder = pathlib.Path(sklearn_datasets.__file__).parent / 'images'
    return folder / 'china.jpg'
