"""The server: what it answers, what it refuses, and that both stay bounded."""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import json
import re
import socket
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.errors import UserError
from flax_densenet.inference import overlay
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.models import factory, initialization
from flax_densenet.serving import batcher as batcher_lib
from flax_densenet.serving import guard, server
from flax_densenet.weights import trained as trained_lib
from helpers.reference import formula_variables

pytest.importorskip('starlette')
pytest.importorskip('hypercorn')
pytest.importorskip('prometheus_client')
pytest.importorskip('python_multipart')


# What a page must not take for its own.
NAMES = ('ants', 'bees', '</script><b>"wasps" & co', 'flies', 'mites', 'ticks', 'fleas')
SIDE = 16


@pytest.fixture(scope='module')
def trained():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batcher_lib, 'BATCH_SIZE', 4)  # less to compile
        yield make_trained()


def make_trained():
    module = factory.create_model(
        'BC-L10k4', num_classes=len(NAMES), block_sizes=(1, 1)
    )
    variables = formula_variables(initialization.init_variables(module, seed=0))
    mesh = mesh_lib.make_mesh(jax.local_devices()[:1])
    return trained_lib.Trained(
        module=module,
        variables=mesh_lib.replicate(variables, mesh),
        metadata={
            'model': {'variant': 'BC-L10k4'},
            'class_names': list(NAMES),
            'image_size': SIDE,
            'mean': [0.5] * 3,
            'std': [0.2] * 3,
            'data': {},
            'epoch': 3,
        },
        metrics={'test_accuracy': 0.875, 'test_loss': float('nan'), 'step': 7.0},
        step=7,
        mesh=mesh,
    )


@contextlib.contextmanager
def running(trained, *, wait_until_ready=True, hosts=(), root_path='', **limits):
    """Serves in a thread; gives the port."""
    listener = server.listen('127.0.0.1', 0)
    port = listener.getsockname()[1]
    access = server.make_access(listener, hosts, root_path)
    started = concurrent.futures.Future()

    async def main():
        stop = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), stop))
        await server.serve(
            trained,
            listener,
            name='bugs',
            limits=guard.Limits(**limits),
            stop=stop,
            access=access,
        )

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        task = pool.submit(asyncio.run, main())
        loop, stop = started.result()
        try:
            while wait_until_ready and ask(port, '/health').status != 200:
                time.sleep(0.05)
            yield port
        finally:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(stop.set)
            task.result()


class Answer:
    """Status, headers and body of an answer."""

    def __init__(self, response):
        self.status, self.headers = response.status, response.headers
        self.body = response.read()

    @property
    def json(self):
        return json.loads(self.body)


def ask(port, path, body=None, *, method=None, headers=()):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    with contextlib.closing(connection):
        method = method or ('GET' if body is None else 'POST')
        connection.request(method, path, body, dict(headers))
        return Answer(connection.getresponse())


def half_sent(port, *, length=1000, sent=b'\xff\xd8', path='/predict'):
    """A connection whose body does not all come."""
    connection = socket.create_connection(('127.0.0.1', port), timeout=60)
    head = (
        f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n'
    )
    connection.sendall(head.encode() + sent)
    return connection


def answer_of(connection):
    response = http.client.HTTPResponse(connection)
    response.begin()
    return Answer(response)


def encode(pixels, kind='PNG'):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def picture(seed, size=(40, 30)):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (4, 5, 3), np.uint8)
    return encode(np.asarray(Image.fromarray(small).resize(size)))


@pytest.fixture(scope='module')
def port(trained):
    with running(trained) as port:
        yield port


@pytest.fixture(scope='module')
def expected(trained):
    """Of four pictures: their files, pixels, probabilities and map of a class."""
    predictor = predictor_lib.Predictor(trained, 4)
    files = [picture(seed) for seed in range(4)]
    pixels = np.stack([predictor.load(file) for file in files])
    probabilities, _ = predictor.compute(pixels)
    # Otherwise mixed-up answers would pass.
    assert np.ptp(probabilities, 0).max() > 0.02
    return files, pixels, probabilities, predictor.cams(pixels, [1] * 4)


def from_data_url(url):
    head, _, data = url.partition(',')
    assert head == 'data:image/png;base64'
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def as_array(told):
    by_name = {p['class']: p['probability'] for p in told['predictions']}
    return np.array([by_name[name] for name in NAMES])


def test_page(port):
    answer = ask(port, '/')
    text = answer.body.decode()
    assert answer.headers['Content-Type'] == 'text/html; charset=utf-8'
    policy = answer.headers['Content-Security-Policy']
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert policy.startswith("default-src 'none'; ")
    assert text.count('<script') == text.count(f'nonce="{nonce}">') - 1 == 2
    assert nonce not in ask(port, '/').body.decode()
    assert '&lt;/script&gt;&lt;b&gt;' in text and '</script><b>' not in text
    assert '87.5 % right' in text
    assert '//' not in text.replace('// ', '')  # nothing is asked of another host
    assert answer.headers['X-Content-Type-Options'] == 'nosniff'
    assert 'Access-Control-Allow-Origin' not in answer.headers


def test_model_and_health(port):
    told = ask(port, '/model').json
    assert told['classes'] == list(NAMES)
    assert (told['name'], told['image_size'], told['step']) == ('bugs', SIDE, 7)
    assert told['figures'] == {'test_accuracy': 0.875}
    assert told['limits']['max_megabytes'] == 20
    assert ask(port, '/health').json == {'status': 'ok'}


def test_predict(port, expected):
    files, _, probabilities, _ = expected
    for file, row in zip(files, probabilities, strict=True):
        told = ask(port, '/predict?top=100', file).json
        assert set(told) == {'predictions'}
        np.testing.assert_allclose(as_array(told), row, atol=1e-5)
        shares = [p['probability'] for p in told['predictions']]
        assert shares == sorted(shares, reverse=True)
        first = ask(port, '/predict', file).json['predictions']
        assert first == told['predictions'][:5]
        assert len(ask(port, '/predict?top=2', file).json['predictions']) == 2


def test_explain(port, expected):
    files, pixels, probabilities, cams = expected
    for file, image, cam in zip(files, pixels, cams, strict=True):
        told = ask(port, '/predict?explain=1&class=bees', file).json
        assert told['explained'] == 'bees'
        seen = from_data_url(told['overlay']).astype(int)
        assert np.abs(seen - overlay.overlay(image, cam)).max() <= 1
        assert told['map_peak'] == pytest.approx(cam.max(), rel=1e-3, abs=1e-6)
        layer = from_data_url(ask(port, '/predict?explain=map', file).json['map'])
        assert layer.shape == (SIDE, SIDE, 4)
    assert cams.max() > 0
    told = ask(port, '/predict?explain=1', files[0]).json
    assert told['explained'] == NAMES[probabilities[0].argmax()]


def test_together_as_alone(port, expected):
    files, _, probabilities, _ = expected
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        queries = ['/predict?top=9', '/predict?top=9&explain=1'] * 12
        tasks = [
            pool.submit(ask, port, query, files[i % 4])
            for i, query in enumerate(queries)
        ]
        for i, task in enumerate(tasks):
            answer = task.result()
            assert ('overlay' in answer.json) == bool(i % 2)
            np.testing.assert_allclose(
                as_array(answer.json), probabilities[i % 4], atol=1e-5
            )


def test_batches(trained, expected):
    """Those that come together are a batch; each gets its own answer and map."""
    _, pixels, probabilities, cams = expected
    counts = []

    async def main():
        batcher = batcher_lib.Batcher(trained, batch_size=4, on_batch=counts.append)
        assert not batcher.ready
        await batcher.warm_up()
        assert batcher.ready and not counts
        asked = [
            batcher.predict(pixels[i % 4], explain=1 if i % 3 == 0 else None)
            for i in range(7)
        ]
        found = await asyncio.gather(*asked)
        stays, leaves = (
            asyncio.create_task(batcher.predict(pixels[i])) for i in range(2)
        )
        await asyncio.sleep(0)
        leaves.cancel()  # a client that is gone ends nobody else's batch
        found.append(await stays)
        batcher.close()
        return found

    *found, stayed = asyncio.run(main())
    np.testing.assert_allclose(stayed.probabilities, probabilities[0], atol=1e-5)
    for i, answer in enumerate(found):
        np.testing.assert_allclose(
            answer.probabilities, probabilities[i % 4], atol=1e-5
        )
        assert (answer.cam is None) == (i % 3 != 0)
        if answer.cam is not None:
            np.testing.assert_allclose(answer.cam, cams[i % 4], atol=1e-4)
    assert counts == [4, 3, 2]


JPEG = picture(0)
MULTIPART = {'Content-Type': 'multipart/form-data; boundary=x'}


@pytest.mark.parametrize(
    ('path', 'body', 'options', 'status', 'message'),
    [
        ('/none', None, {}, 404, '/none is not here; there are /, /predict'),
        ('/predict', None, {}, 405, '/predict takes POST, not GET'),
        ('/model', b'x', {}, 405, '/model takes GET, HEAD, not POST'),
        ('/predict', b'', {}, 400, 'the body is empty'),
        ('/predict', b'a text', {}, 415, 'the file is not an image (JPEG, PNG'),
        ('/predict', JPEG[: len(JPEG) // 2], {}, 415, 'the file cannot be decoded'),
        ('/predict', JPEG, {'headers': MULTIPART}, 400, 'the form cannot be used'),
        ('/predict?top=0', JPEG, {}, 400, 'top=0 must be a number from 1 on'),
        ('/predict?top=x', JPEG, {}, 400, 'top=x must be a number'),
        ('/predict?top=' + '9' * 5000, JPEG, {}, 400, 'must be a number'),
        ('/predict?explain=yes', JPEG, {}, 400, 'explain=yes must be 0, 1'),
        ('/predict?class=ants', JPEG, {}, 400, 'explain=1'),
        ('/predict?explain=1&class=ant', JPEG, {}, 400, 'did you mean ants?'),
        ('/predict?explain=1&class=q', JPEG, {}, 400, 'GET /model lists the classes'),
        ('/predict?tops=3', JPEG, {}, 400, 'tops= is not known; there are top,'),
        ('/', None, {'headers': {'Host': 'evil.example'}}, 403, 'use localhost'),
        ('/', None, {'headers': {'Host': 'localhost.evil.example'}}, 403, 'localhost'),
        ('/', None, {'headers': {'Host': 'hub.example'}}, 403, '--allowed_hosts'),
        ('/predict', JPEG, {'headers': {'Origin': 'null'}}, 403, 'other sites'),
        (
            '/predict',
            JPEG,
            {'headers': {'Origin': 'http://evil.example'}},
            403,
            'pages of other sites may not use this server',
        ),
        (
            '/predict',
            JPEG,
            {'headers': {'Sec-Fetch-Site': 'cross-site'}},
            403,
            'other sites',
        ),
    ],
)
def test_refusals(port, path, body, options, status, message):
    answer = ask(port, path, body, **options)
    assert answer.status == status
    assert message in answer.json['error']
    assert len(answer.body) < 400
    assert answer.headers['X-Content-Type-Options'] == 'nosniff'
    if status == 405:
        assert answer.headers['Allow']


@pytest.mark.parametrize(
    'headers',
    [
        {'Host': 'LocalHost:1'},
        {'Host': '[::1]:8000'},
        {'Host': '127.0.0.1', 'Origin': 'http://127.0.0.1'},
        {'Sec-Fetch-Site': 'same-origin', 'Origin': 'https://proxy'},
    ],
)
def test_own_pages_are_answered(port, headers):
    assert ask(port, '/predict', JPEG, headers=headers).status == 200


def test_metrics(port):
    def figure(name):
        lines = ask(port, '/metrics').body.decode().splitlines()
        found = [line.split()[-1] for line in lines if line.startswith(name + ' ')]
        return float(found[0]) if found else 0.0

    good = 'flax_densenet_requests_total{path="/predict",status="200"}'
    bad = 'flax_densenet_requests_total{path="/predict",status="415"}'
    computed = 'flax_densenet_images_total'
    before = [figure(name) for name in (good, bad, computed)]
    for body in (JPEG, JPEG, b'a text'):
        ask(port, '/predict', body)
    after = [figure(name) for name in (good, bad, computed)]
    assert np.subtract(after, before).tolist() == [2, 1, 2]
    assert figure('flax_densenet_ready') == 1
    assert figure('flax_densenet_images_held') == 0
    assert figure('flax_densenet_batch_images_sum') == after[2]
    assert figure('flax_densenet_request_seconds_count{path="/metrics"}') > 5


@pytest.fixture(scope='module')
def strict_port(trained):
    limits = {'max_megabytes': 0.1, 'max_megapixels': 0.05, 'max_requests': 2}
    with running(trained, **limits, request_timeout_s=0.8) as port:
        yield port


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
    started = time.monotonic()
    with half_sent(strict_port) as connection:
        for _ in range(3):  # a drop now and then does not buy more time
            time.sleep(0.25)
            connection.sendall(b'x')
        answer = answer_of(connection)
    assert answer.status == 408
    assert answer.json['error'] == 'the image did not arrive within 0.8 seconds'
    assert 0.7 < time.monotonic() - started < 1.7


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
        assert not caplog.records

        def fail(self, *args):
            raise RuntimeError('out of memory, say')

        monkeypatch.setattr(predictor_lib.Predictor, 'compute', fail)
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
    assert time.monotonic() - started < 2
    idle.close()


def test_mistakes(monkeypatch):
    with server.listen('127.0.0.1', 0) as listener:
        assert server.is_loopback(listener)
        port = listener.getsockname()[1]
        assert server.address_of(listener) == f'http://127.0.0.1:{port}'
        with pytest.raises(UserError, match=f'--port={port} is taken by another'):
            server.listen('127.0.0.1', port)
    for host, port, message in [
        ('127.0.0.1', 65536, '--port=65536 must be from 0 to 65535'),
        ('no host', 0, '--host=no host is no name or address'),
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


def test_open_to_others(trained, monkeypatch):
    """On other addresses any name is answered, and a warning says what that means."""
    with server.listen('0.0.0.0', 0) as listener:
        assert not server.is_loopback(listener)
        access = server.make_access(listener, (), '')
        told = server._welcome('bugs', server.address_of(listener), access)
    assert 'warning: whoever reaches this machine' in told
    told = server._welcome('bugs', 'http://127.0.0.1:1', guard.Access())
    assert 'warning' not in told
    monkeypatch.setattr(server, 'is_loopback', lambda listener: False)
    with running(trained) as port:
        assert ask(port, '/health', headers={'Host': 'a.example'}).status == 200


def test_addresses_of_the_page_are_relative(port):
    text = ask(port, '/').body.decode()
    assert not re.search(r"""(href|src|action)=["']?/|fetch\(["'`]/""", text)
    assert [f'<a href="{name}">' in text for name in ('model', 'health')] == [True] * 2


@pytest.fixture(scope='module')
def proxied_port(trained):
    hosts = ('Hub.Example.org, *.lab.example', 'other.example:8443')
    with running(trained, hosts=hosts, root_path='user/one/') as port:
        yield port


@pytest.mark.parametrize(
    ('host', 'status'),
    [
        ('hub.example.org', 200),
        ('HUB.example.org:443', 200),
        ('a.lab.example', 200),
        ('a.b.lab.example:1', 200),
        ('other.example:8443', 200),
        ('localhost', 200),
        ('127.0.0.1:8000', 200),
        ('other.example', 403),
        ('lab.example.evil.example', 403),
        ('evil-lab.example', 403),
        ('hub.example.org.evil.example', 403),
        ('', 403),
    ],
)
def test_allowed_hosts(proxied_port, host, status):
    assert ask(proxied_port, '/health', headers={'Host': host}).status == status


def test_allowed_hosts_on_all_addresses(trained, monkeypatch):
    """Where some are named, no other is answered to."""
    monkeypatch.setattr(server, 'is_loopback', lambda listener: False)
    with running(trained, hosts=('hub.example',)) as port:
        for host, status in ('hub.example', 200), ('a.example', 403):
            assert ask(port, '/health', headers={'Host': host}).status == status


@pytest.mark.parametrize(
    ('origin', 'status'),
    [
        ('https://hub.example.org', 200),  # the proxy put localhost as Host
        ('https://evil.example', 403),
        ('null', 403),
        ('http://[', 403),
    ],
)
def test_origin_behind_a_proxy(proxied_port, origin, status):
    assert ask(proxied_port, '/predict', JPEG, headers={'Origin': origin}).status == (
        status
    )


def test_every_host_is_not_every_page():
    access = guard.Access(allowed_hosts=('*',))
    assert access.is_allowed('any.example')
    around = guard.RequestGuard(None, figures=None, access=access)
    assert around._is_own('https://a.example', 'a.example')
    assert not around._is_own('https://evil.example', 'a.example')


def test_root_path(proxied_port):
    """Whether or not the proxy takes its path off; metrics count the same path."""
    for path in '/health', '/user/one/health':
        assert ask(proxied_port, path).json == {'status': 'ok'}
    assert ask(proxied_port, '/user/one/predict', JPEG).status == 200
    assert 'What does the model see' in ask(proxied_port, '/user/one/').body.decode()
    answer = ask(proxied_port, '/user/one')
    assert (answer.status, answer.headers['Location']) == (307, 'one/')
    assert ask(proxied_port, '/user/onehealth').status == 404
    counted = ask(proxied_port, '/user/one/metrics').body.decode()
    assert 'requests_total{path="/health",status="200"}' in counted


@pytest.mark.parametrize('text', ['http://a.example', 'a b', 'a/b', '*a', 'a@b'])
def test_what_is_no_host(text):
    with pytest.raises(UserError, match=re.escape(f'--allowed_hosts={text} is no')):
        guard.Access(allowed_hosts=(text,))


@pytest.mark.parametrize('text', ['https://a.example/x', '/x?y', 'x#y', 'a\nb'])
def test_what_is_no_root_path(text):
    with pytest.raises(UserError, match='--root_path='):
        guard.Access(root_path=text)
    assert guard.Access(root_path='/').root_path == ''


def test_welcome_behind_a_proxy():
    access = guard.Access(allowed_hosts=('hub.example',), root_path='/user/one')
    told = server._welcome('bugs', 'http://127.0.0.1:1', access)
    assert 'its page is at /user/one/' in told
    assert 'answers to hub.example and localhost' in told


def form_of(*parts, boundary='x1'):
    """A browser's form; a part is (name, bytes) or (name, file name, bytes)."""
    body = b''
    for name, *file, content in parts:
        extra = f'; filename="{file[0]}"' if file else ''
        body += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{extra}'
            '\r\n\r\n'
        ).encode()
        body += content + b'\r\n'
    return body + f'--{boundary}--\r\n'.encode()


FORM = {'Content-Type': 'multipart/form-data; boundary=x1'}


@pytest.mark.parametrize('name', ['image', 'file', 'größe'])
def test_form(port, name):
    body = form_of((name, 'photo 1.jpg', JPEG))
    told = ask(port, '/predict?top=3', body, headers=FORM)
    assert told.json == ask(port, '/predict?top=3', JPEG).json


def test_form_with_options(port):
    """Fields are options; the address counts more; an empty second file is none."""
    body = form_of(('top', b'2'), ('image', 'a.jpg', JPEG), ('more', '', b''))
    assert len(ask(port, '/predict', body, headers=FORM).json['predictions']) == 2
    told = ask(port, '/predict?top=1&explain=map', body, headers=FORM).json
    assert len(told['predictions']) == 1 and told['map']


@pytest.mark.parametrize(
    ('body', 'headers', 'status', 'message'),
    [
        (form_of(('top', b'2')), FORM, 400, 'it has no file; send one, as with curl'),
        (form_of(('a', 'a', JPEG), ('b', 'b', JPEG)), FORM, 400, 'it has 2 files'),
        (form_of(('a', 'a.jpg', b'')), FORM, 400, 'the file in the form is empty'),
        (form_of(('a', 'a.jpg', b'text')), FORM, 415, 'the file is not an image'),
        (form_of(('a', 'a', JPEG), ('top', b'0')), FORM, 400, 'top=0 must be'),
        (form_of(('a', 'a', JPEG), ('b', b'0')), FORM, 400, 'b= is not known'),
        (form_of(('image', b'x' * 2000)), FORM, 400, 'send the image as a file'),
        (form_of(*[(f'a{i}', b'x') for i in range(30)]), FORM, 400, 'more than 16'),
        (form_of(('a', 'a', JPEG))[:-20], FORM, 400, 'it is cut off'),
        (
            form_of(('a', 'a', JPEG)).replace(b' name="a";', b''),
            FORM,
            400,
            'cannot be parsed',
        ),
        (JPEG, FORM, 400, 'cannot be parsed'),
        (b'', FORM, 400, 'the body is empty'),
        (JPEG, {'Content-Type': 'multipart/form-data'}, 400, 'has no boundary'),
        (JPEG, {'Content-Type': 'multipart/mixed; boundary=x'}, 400, 'must be multi'),
    ],
)
def test_forms_that_cannot_be_used(port, body, headers, status, message):
    answer = ask(port, '/predict', body, headers=headers)
    assert answer.status == status
    assert message in answer.json['error']
    assert len(answer.body) < 400


def test_damaged_forms_are_one_line(port):
    """Whatever bytes come: an answer with a reason, or the prediction."""
    rng = np.random.default_rng(0)
    whole = form_of(('top', b'2'), ('image', 'a.jpg', JPEG[:300]))
    for _ in range(150):
        body = bytearray(whole)
        for place in rng.integers(0, len(body), rng.integers(1, 6)):
            body[place] = rng.integers(0, 256)
        answer = ask(port, '/predict', bytes(body[rng.integers(0, 9) :]), headers=FORM)
        assert answer.status in (400, 415) and answer.json['error']


def test_large_form(strict_port):
    for length in 101_000, 130_000:
        body = form_of(('a', 'a', b'x' * length))
        assert ask(strict_port, '/predict', body, headers=FORM).status == 413
    assert half_form_is_refused(strict_port)


def half_form_is_refused(port):
    """By its length alone, before a byte of it came."""
    head = b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n'
    head += b'Content-Type: multipart/form-data; boundary=x\r\n\r\n'
    with socket.create_connection(('127.0.0.1', port), timeout=60) as connection:
        connection.sendall(head)
        connection.shutdown(socket.SHUT_WR)
        return answer_of(connection).status == 413
