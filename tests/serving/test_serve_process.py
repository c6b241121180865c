"""The server as users start it, under load and bad clients, and its page in a browser.

`python -m pytest -m slow tests/serving/test_serve_process.py`
"""

import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from flax_densenet.data import image_formats
from helpers import browsers, served_pages
from helpers.paths import ROOT
from helpers.runs import tiny_config, train_with_pages, write_images

pytest.importorskip('starlette')
pytest.importorskip('hypercorn')
pytest.importorskip('prometheus_client')
pytestmark = pytest.mark.slow

CLASSES = {'ants <red>': 40, 'bees': 40, 'flies': 40}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('serve')
    photos = write_images(folder / 'photos', CLASSES)
    fields = {'data.image_size': 32, 'data.source': f'folder:{photos}'}
    fields |= {'data.batch_size': 32, 'model.block_sizes': None}
    fields |= {'train.epochs': 4, 'optimizer.learning_rate': 1e-2}
    train_with_pages(tiny_config(**fields), folder / 'garden')
    return folder / 'garden'


class Server:
    """A server process, and what it holds of memory."""

    def __init__(self, workdir, *flags):
        self.process = subprocess.Popen(
            [
                sys.executable, str(ROOT / 'launch.py'), '--mode=serve', '--port=0',
                f'--workdir={workdir}', *flags,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self.lines = [self.process.stdout.readline()]
        self.port = int(re.search(r':(\d+) ', self.lines[0])[1])
        while not self.lines[-1].startswith('ready'):
            self.lines.append(self.process.stdout.readline())
            assert self.lines[-1], self.process.stderr.read()

    def memory(self, of='VmRSS'):
        """Megabytes that the process holds; `VmHWM` is the most it ever held."""
        status = pathlib.Path(f'/proc/{self.process.pid}/status').read_text()
        return int(re.search(rf'{of}:\s+(\d+) kB', status)[1]) / 1e3

    def open_files(self):
        """How many, connections among them."""
        return len(os.listdir(f'/proc/{self.process.pid}/fd'))

    def ask(self, path, body=None, headers=()):
        """Status and JSON (or text)."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=120)
        with contextlib.closing(connection):
            method = 'GET' if body is None else 'POST'
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.headers['Content-Type'] == 'application/json'
            return response.status, json.loads(text) if is_json else text

    def figure(self, name):
        """One of /metrics."""
        text = self.ask('/metrics')[1]
        return float(re.search(rf'^{re.escape(name)} (\S+)$', text, re.M)[1])

    def end(self, number=signal.SIGTERM):
        """Exit status, seconds that it took, and stderr."""
        started = time.monotonic()
        self.process.send_signal(number)
        rest, errors = self.process.communicate(timeout=60)
        self.lines += rest.splitlines()
        return self.process.returncode, time.monotonic() - started, errors


@contextlib.contextmanager
def started(workdir, *flags):
    server = Server(workdir, *flags)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def encode(pixels, kind='JPEG', **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def photograph(seed, side):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8))
    return encode(np.asarray(small.resize((side * 4 // 3, side))), quality=90)


def open_body(server, sent, length=10_000):
    """A connection with the first bytes of a body."""
    connection = socket.create_connection(('127.0.0.1', server.port), timeout=60)
    head = 'POST /predict HTTP/1.1\r\nHost: localhost\r\n'
    connection.sendall(f'{head}Content-Length: {length}\r\n\r\n'.encode() + sent)
    return connection


def status_of(connection):
    """Status of the answer; 0 where the server closed without one.

    A byte that is sent after that makes it a reset.
    """
    with connection, contextlib.suppress(ConnectionResetError):
        first = connection.recv(4096)
        return int(first.split()[1]) if first else 0
    return 0


def drip(connection, data, every_s=0.2):
    """Sends a byte now and then until the server has enough of it."""

    def send():
        with contextlib.suppress(OSError):
            for byte in data:
                connection.sendall(bytes([byte]))
                time.sleep(every_s)

    threading.Thread(target=send, daemon=True).start()


def insist(server, path, body):
    """Asks again while the server is full; the answer, and how often it was full."""
    for full in range(1000):
        status, told = server.ask(path, body)
        if status != 503:
            return status, told, full
        time.sleep(0.2)
    raise AssertionError('full for too long')


@pytest.mark.exhaustive
def test_two_hundred_at_a_time(workdir):
    """A mix of good and bad images, all at once, while slow clients hold on."""
    whole = encode(np.zeros((10_000, 10_000), np.uint8), 'PNG')  # 100 million pixels
    bodies = {
        'photo': (photograph(0, 1200), 200),
        'small': (photograph(1, 100), 200),
        'text named .jpg': (b'this is a text\n' * 99, 415),
        'cut short': (photograph(2, 600)[:9000], 415),
        '100 megapixels': (whole, 413),
        '21 MB': (bytes(21_000_000), 413),
        'nothing': (b'', 400),
    }
    with started(workdir, '--request_timeout_s=4') as server:
        before = server.memory()
        half = [open_body(server, b'\xff\xd8') for _ in range(4)]
        slow = [open_body(server, b'\xff\xd8') for _ in range(4)]
        heads = [
            socket.create_connection(('127.0.0.1', server.port), timeout=60)
            for _ in range(50)
        ]
        begun = time.monotonic()
        for connection in slow:
            drip(connection, bytes(1000))
        for connection in heads:
            drip(connection, b'GET / HTTP/1.1\r\nHost: localhost\r\nX: ' + b'x' * 999)
        names = [name for _ in range(29) for name in bodies][:200]
        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            tasks = {}
            for i, name in enumerate(names):
                query = f'/predict?explain={i % 2}'
                tasks[pool.submit(insist, server, query, bodies[name][0])] = name
            most = 0.0
            while not all(task.done() for task in tasks):
                most = max(most, server.memory())
                assert server.ask('/health') == (200, {'status': 'ok'})
                time.sleep(0.1)
        found = [(name, *task.result()) for task, name in tasks.items()]
        for name, status, told, _ in found:
            assert status == bodies[name][1], (name, told)
        assert [status_of(c) for c in half + slow] == [408] * 8
        assert [status_of(c) for c in heads] == [0] * 50
        assert time.monotonic() - begun < 300
        mean = server.figure('flax_densenet_batch_images_sum') / server.figure(
            'flax_densenet_batch_images_count'
        )
        while server.figure('flax_densenet_images_held'):
            time.sleep(0.05)
        # The same again leaves nothing behind.
        for name in names[:60]:
            assert insist(server, '/predict', bodies[name][0])[0] == bodies[name][1]
        after, peak = server.memory(), server.memory('VmHWM')
        print(
            f'memory before {before:.0f} MB, most {max(most, peak):.0f}, after '
            f'{after:.0f}; {sum(full for *_, full in found)} times full; '
            f'{mean:.1f} images a batch'
        )
        assert mean > 1.2
        # 32 bodies of 20 MB each are 640; four decoded photographs some 10 each.
        assert peak < before + 900
        assert after < before + 300
        status, seconds, errors = server.end()
        assert (status, errors) == (0, '')
        assert seconds < 6
        assert server.lines[-1] == 'stopped'


@pytest.mark.exhaustive
def test_hostile_bodies(workdir):
    """What costs little to send does not cost much to hold."""
    flags = ('--max_requests=4', '--request_timeout_s=60', '--max_megapixels=20')
    with started(workdir, *flags) as server:
        before = server.memory()
        files = server.open_files()
        # A body of chunks of one byte.
        chunks = b'1\r\nx\r\n' * 200_000
        head = b'POST /predict HTTP/1.1\r\nHost: localhost\r\n'
        head += b'Transfer-Encoding: chunked\r\n\r\n'
        with socket.create_connection(('127.0.0.1', server.port), 60) as connection:
            connection.sendall(head + chunks + b'0\r\n\r\n')
            assert status_of(connection) == 415

        # Without end, to paths that read no body.
        def send_for_ever(path):
            with socket.create_connection(('127.0.0.1', server.port), 60) as connection:
                line = f'POST {path} HTTP/1.1\r\n'.encode()
                connection.sendall(line + head.split(b'\r\n', 1)[1])
                until = time.monotonic() + 40
                with contextlib.suppress(OSError):  # the server has enough of it
                    while time.monotonic() < until:
                        connection.sendall(b'10000\r\n' + bytes(0x10000) + b'\r\n')
                assert time.monotonic() < until

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            list(pool.map(send_for_ever, ('/health', '/none', '/predict?top=0')))
        while server.open_files() > files:  # no connection is left behind
            time.sleep(0.1)
        # Headers without end.
        with socket.create_connection(('127.0.0.1', server.port), 60) as connection:
            connection.sendall(b'GET / HTTP/1.1\r\nX: ' + b'x' * 20_000)
            assert status_of(connection) == 431
        # Just below the limit on pixels, of kinds that take most to convert.
        rgba = encode(np.zeros((4400, 4400, 4), np.uint8), 'PNG')
        gray = encode(np.zeros((4400, 4400), np.uint16), 'PNG')
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            tasks = [
                pool.submit(server.ask, '/predict', body) for body in (rgba, gray) * 2
            ]
            assert [task.result()[0] for task in tasks] == [200] * 4
        peak = server.memory('VmHWM')
        print(f'memory before {before:.0f} MB, most {peak:.0f}')
        # Up to 17 bytes a pixel; those above 16 million pixels one after the other.
        assert peak < before + 20 * 17 + 150
        assert server.ask('/health')[0] == 200
        (status, seconds, errors) = server.end(signal.SIGINT)
        assert seconds < 6
        assert (status, errors) == (0, '')


def test_end_finishes_what_is_under_way(workdir):
    file = photograph(0, 400)
    with started(workdir) as server:
        connection = open_body(server, file[:-10], len(file))
        while server.figure('flax_densenet_images_held') != 1:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with (
            pytest.raises(OSError),
            socket.create_connection(('127.0.0.1', server.port), 5),
        ):
            pass
        connection.sendall(file[-10:])
        assert status_of(connection) == 200
        assert server.process.wait(timeout=120) == 0
        assert server.process.stderr.read() == ''


@pytest.mark.exhaustive
def test_mistakes(workdir):
    def launch(*flags):
        done = subprocess.run(
            [sys.executable, str(ROOT / 'launch.py'), '--mode=serve', *flags],
            capture_output=True, text=True, cwd=ROOT, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, ''), done.stderr
        (line,) = done.stderr.splitlines()
        return line

    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        line = launch(f'--workdir={workdir}', f'--port={port}')
        assert line.startswith(f'error: --port={port} is in use by another program;')
    assert 'holds no checkpoint' in launch('--workdir=/none', '--port=0')
    line = launch(f'--workdir={workdir}', '--config.data.image_size=9')
    assert line.startswith('error: data.image_size: ')
    assert 'defines how its images are prepared' in line
    line = launch(f'--workdir={workdir}', '--max_requests=-1')
    assert line == 'error: --max_requests=-1 must be above 0'
    line = launch(f'--workdir={workdir}', '--port=0', '--allowed_hosts=http://a')
    assert line.startswith('error: --allowed_hosts=http://a is not a host name;')


@pytest.fixture(scope='module')
def browser():
    pytest.importorskip('playwright')
    if not browsers.CHROMIUM:
        pytest.skip('chromium is not here')
    with browsers.launched() as browser:
        yield browser


def test_page_in_a_browser(workdir, browser, tmp_path):
    photo = workdir.parent / 'photos' / 'bees' / '000.jpg'
    with started(workdir) as server:
        own = f'http://127.0.0.1:{server.port}/'
        page = browser.new_page(viewport={'width': 1000, 'height': 900})
        said, asked = [], []
        page.on('console', lambda message: said.append(message.text))
        page.on('pageerror', lambda error: said.append(str(error)))
        page.on('request', lambda request: asked.append(request.url))
        page.goto(own)
        assert 'ants <red>, bees and flies' in page.inner_text('main')

        browsers.drop(page, photo.read_bytes(), 'bee.jpg')
        page.wait_for_selector('#result:not([hidden]):not(.waiting) li')
        expected = server.ask('/predict', photo.read_bytes())[1]['predictions']
        rows = page.locator('#classes li')
        assert rows.locator('.name').all_inner_texts() == [
            prediction['class'] for prediction in expected
        ]
        for row, prediction in zip(rows.all(), expected, strict=True):
            share = prediction['probability']
            assert f'{100 * share:.0f}'[0] in row.locator('.share').inner_text()
            bar = row.locator('.track i').bounding_box()['width']
            track = row.locator('.track').bounding_box()['width']
            assert bar / track == pytest.approx(share, abs=0.02)
        layer = page.locator('#layer')
        assert layer.is_visible()
        assert layer.bounding_box() == pytest.approx(
            page.locator('#picture').bounding_box(), abs=1
        )
        page.screenshot(path=str(tmp_path / 'light.png'))

        served_pages.check_several(page, photo.read_bytes(), expected[0])

        # By keyboard: another class's map, then no map.
        first = layer.get_attribute('src')
        rows.nth(1).locator('button').focus()
        page.keyboard.press('Enter')
        page.wait_for_selector('li:nth-child(2) button[aria-pressed="true"]')
        assert layer.get_attribute('src') != first
        assert expected[1]['class'] in page.inner_text('#meaning')
        page.locator('#show').focus()
        page.keyboard.press('Space')
        assert not layer.is_visible()

        served_pages.check_camera(page)

        assert said == []
        browsers.drop(page, b'no image', 'bee.jpg')
        page.wait_for_selector('#error:not([hidden])')
        assert page.inner_text('#error') == (
            'This image cannot be used: the file is not an image '
            f'({", ".join(image_formats.FORMATS)}).'
        )
        assert not page.locator('#result').is_visible()
        browsers.drop(page, bytes(21_000_000), 'big.jpg')
        assert 'is larger than 20 MB' in page.inner_text('#error')

        # A browser that cannot show the file shows what the server made of it.
        tiff = encode(np.asarray(Image.open(photo)), 'TIFF')
        page.set_input_files('#file', {
            'name': 'bee.tif', 'mimeType': 'image/tiff', 'buffer': tiff,
        })  # fmt: skip
        page.wait_for_selector('#result:not([hidden]):not(.waiting) li')
        assert not page.locator('#error').is_visible()
        assert page.get_attribute('#picture', 'src').startswith('data:image/png')

        page.set_viewport_size({'width': 320, 'height': 700})
        assert page.evaluate('document.documentElement.scrollWidth') <= 320
        assert all(url.startswith((own, 'blob:', 'data:')) for url in asked)
        # What the browser itself logs of the refusal, and nothing else.
        assert all('415' in line for line in said), said
        server.end()
        page.locator('#classes button').first.click()
        page.wait_for_selector('#error:not([hidden])')
        assert page.inner_text('#error') == (
            'The server does not answer. Is it still running?'
        )
        page.close()
