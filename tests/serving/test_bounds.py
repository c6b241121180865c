"""What the server refuses, and how it starts, fails and ends."""

import asyncio
import dataclasses
import select
import sys
import threading
import time

import jax
import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.inference import programs
from flax_densenet.serving import batcher as batcher_lib
from flax_densenet.serving import guard, server
from helpers import described
from helpers.servers import (
    JPEG,
    answer_of,
    ask,
    encode,
    half_sent,
    picture,
    running,
)

pytest.importorskip('starlette')
pytest.importorskip('hypercorn')
pytest.importorskip('prometheus_client')
pytest.importorskip('python_multipart')


def test_too_large(strict_port):
    def parts():
        for _ in range(40):
            yield bytes(10_000)

    with half_sent(strict_port, length=100_001, sent=b'') as connection:
        answer = answer_of(connection)  # by the header alone
    assert answer.status == 413
    assert answer.json['error'] == 'the file is larger than 0.1 MB'
    for body in (bytes(30_000_000), parts()):  # an answer, not a reset connection
        answer = ask(strict_port, '/predict', body)
        assert answer.status == 413
    answer = ask(strict_port, '/predict', encode(np.zeros((300, 200, 3), np.uint8)))
    assert answer.status == 413
    assert answer.json['error'] == (
        'the image has 0.06 million pixels; at most 0.05 million are read'
    )


def test_slow_body(strict_port):
    started, sent = time.monotonic(), 0
    with half_sent(strict_port, length=10_000) as connection:
        # A drop now and then buys no more time: else they would go on for minutes.
        while sent < 400 and not select.select([connection], [], [], 0.25)[0]:
            connection.sendall(b'x')
            sent += 1
        answer = answer_of(connection)
    assert answer.status == 408
    assert answer.json['error'] == 'the image did not arrive within 0.8 seconds'
    assert time.monotonic() - started > 0.7
    assert 1 < sent < 400


def test_queue_is_bounded(strict_port, caplog):
    file = picture(3)
    ends = [half_sent(strict_port, length=len(file), sent=file[:9]) for _ in range(2)]
    while b'images_held 2.0' not in ask(strict_port, '/metrics').body:
        time.sleep(0.02)
    answer = ask(strict_port, '/predict', file)
    assert (answer.status, answer.headers['Retry-After']) == (503, '1')
    assert answer.json['error'] == '2 images are waiting; try again'
    ends[0].sendall(file[9:])
    with ends[0]:
        assert answer_of(ends[0]).status == 200
    ends[1].close()  # a client that leaves frees its place
    for _ in range(2):
        while (answer := ask(strict_port, '/predict', file)).status == 503:
            time.sleep(0.02)
        assert answer.status == 200
    while b'images_held 0.0' not in ask(strict_port, '/metrics').body:
        time.sleep(0.02)
    assert not caplog.records


def test_starting(trained, monkeypatch):
    go_on = threading.Event()

    async def warm_up(self):
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        self.ready = True

    monkeypatch.setattr(batcher_lib.Batcher, 'warm_up', warm_up)
    with running(trained, wait_until_ready=False) as port:
        for answer in (ask(port, '/health'), ask(port, '/predict', JPEG)):
            assert (answer.status, answer.headers['Retry-After']) == (503, '1')
            assert 'being compiled' in answer.json['error']
        described.check(port, '/health', ask(port, '/health'))
        assert ask(port, '/').status == 200
        go_on.set()
        while ask(port, '/health').status != 200:
            time.sleep(0.01)
        assert ask(port, '/predict', JPEG).status == 200


def test_defects(trained, monkeypatch, caplog):
    """They are told as such, the log has the trace, and the server goes on."""
    nan = jax.tree.map(lambda leaf: leaf * np.nan, trained.variables)
    broken = dataclasses.replace(trained, variables=nan)
    with running(broken) as port:
        answer = ask(port, '/predict', JPEG)
        assert answer.status == 500
        assert 'its training diverged' in answer.json['error']
        assert all(record.levelname == 'INFO' for record in caplog.records)

        def fail(self, *args):
            raise RuntimeError('out of memory, say')

        monkeypatch.setattr(programs.Programs, '__call__', fail)
        answer = ask(port, '/predict', JPEG)
        assert (answer.status, list(answer.json)) == (500, ['error'])
        assert answer.headers['X-Content-Type-Options'] == 'nosniff'
        while 'out of memory, say' not in caplog.text:  # logged behind the answer
            time.sleep(0.01)
        monkeypatch.undo()
        assert 'diverged' in ask(port, '/predict', JPEG).json['error']


def test_a_failing_start_ends_the_server(trained, monkeypatch):
    async def warm_up(self):
        raise RuntimeError('no memory')

    monkeypatch.setattr(batcher_lib.Batcher, 'warm_up', warm_up)
    with (
        pytest.raises(RuntimeError, match='no memory'),
        running(trained, wait_until_ready=False),
    ):
        time.sleep(0.1)


def test_leaving_with_open_connections(trained, monkeypatch):
    """One that never ends its body does not hold up the end."""
    monkeypatch.setattr(server, '_LEAVE_S', 0.4)
    with running(trained) as port:
        idle = half_sent(port)
        started = time.monotonic()
    assert time.monotonic() - started < 20  # its body may take minutes
    idle.close()


def test_mistakes(monkeypatch):
    with server.listen('127.0.0.1', 0) as listener:
        assert server.is_loopback(listener)
        port = listener.getsockname()[1]
        assert server.address_of(listener) == f'http://127.0.0.1:{port}'
        with pytest.raises(UserError, match=f'--port={port} is in use by another'):
            server.listen('127.0.0.1', port)
    for host, port, message in [
        ('127.0.0.1', 65536, '--port=65536 must be from 0 to 65535'),
        ('no host', 0, '--host=no host is not a name or address'),
        ('192.0.2.1', 0, '--host=192.0.2.1 is not an address of this machine'),
    ]:
        with pytest.raises(UserError, match=message):
            server.listen(host, port)
    for name in ('max_requests', 'max_megabytes', 'request_timeout_s'):
        with pytest.raises(UserError, match=f'--{name}=0 must be above 0'):
            guard.Limits(**{name: 0})
    with pytest.raises(UserError, match='--max_megapixels=500 must be at most 179'):
        guard.Limits(max_megapixels=500)
    server.check_installed()
    monkeypatch.setitem(sys.modules, 'hypercorn', None)
    with pytest.raises(UserError, match=r"pip install 'flax_densenet\[serve\]'"):
        server.check_installed()
