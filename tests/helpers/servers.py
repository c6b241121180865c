"""A server in a thread, small requests, and forms like those of browsers."""

import asyncio
import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import socket
import time

import jax
import numpy as np
from PIL import Image

from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.inference import explain
from flax_densenet.models import factory, initialization
from flax_densenet.serving import guard, server
from flax_densenet.weights import trained as trained_lib
from helpers.reference import formula_variables

# Text that a page must not interpret as its own code.
NAMES = ('ants', 'bees', '</script><b>"wasps" & co', 'flies', 'mites', 'ticks', 'fleas')
SIDE = 16
TOKEN = 'a-token.of_some~length+/='


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
def running(
    trained,
    *,
    wait_until_ready=True,
    hosts=(),
    root_path='',
    methods=(),
    origins=(),
    token=None,
    log_requests=False,
    **limits,
):
    """Serves in a thread; yields the port."""
    listener = server.listen('127.0.0.1', 0)
    port = listener.getsockname()[1]
    access = server.make_access(
        listener, hosts, root_path, allow_origin=origins, token=token
    )
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
            explain=explain.make_several(methods),
            log_requests=log_requests,
        )

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        task = pool.submit(asyncio.run, main())
        loop, stop = started.result()
        try:
            while wait_until_ready and ask(port, '/health').status != 200:
                time.sleep(0.05)
            yield port
        finally:
            with contextlib.suppress(RuntimeError):  # it already ended
                loop.call_soon_threadsafe(stop.set)
            task.result()


class Answer:
    """Status, headers and body of a response."""

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
    """A connection with an incomplete body."""
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


def from_data_url(url):
    head, _, data = url.partition(',')
    assert head == 'data:image/png;base64'
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def as_array(told):
    by_name = {p['class']: p['probability'] for p in told['predictions']}
    return np.array([by_name[name] for name in NAMES])


JPEG = picture(0)
MULTIPART = {'Content-Type': 'multipart/form-data; boundary=x'}


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
