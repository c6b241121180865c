"""Middleware of the server: limits, access control, response headers, metrics and log.

>>> Limits(max_requests=0)
Traceback (most recent call last):
flax_densenet.errors.UserError: --max_requests=0 must be above 0
"""

import asyncio
import contextlib
import dataclasses
import math
import time
import urllib.parse

import prometheus_client
from PIL import Image
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import cors
from starlette.responses import JSONResponse, Response

from flax_densenet.errors import UserError
from flax_densenet.serving import queries, request_log

PATHS = ('/', '/predict', '/model', '/health', '/metrics', '/docs', '/openapi.json')
# They describe the program but neither the model nor its use, so they need no token.
_OPEN_PATHS = ('/health', '/docs', '/openapi.json')
# Seconds for which the rest of a refused body is read and dropped: a client that is
# still sending when the connection closes may never see the response.
_DRAIN_S = 10.0
_HEADERS = {
    'X-Content-Type-Options': 'nosniff',
    'X-Frame-Options': 'DENY',
    'Referrer-Policy': 'no-referrer',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Cross-Origin-Opener-Policy': 'same-origin',
    'Cache-Control': 'no-store',
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on requests.

    Attributes:
      max_megabytes: maximum size of a body, in 10^6 bytes.
      max_megapixels: maximum size of an image according to its header, in 10^6 pixels.
      max_requests: maximum number of images received, decoded or computed at a time.
      request_timeout_s: seconds within which a body has to arrive.
    """

    max_megabytes: float = 20.0
    max_megapixels: float = 64.0
    max_requests: int = 32
    request_timeout_s: float = 30.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f'--{field.name}={value} must be above 0')
        # Pillow refuses to open larger images.
        most = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        if self.max_megapixels > most:
            raise UserError(
                f'--max_megapixels={self.max_megapixels} must be at most {most:.0f}'
            )

    @property
    def max_bytes(self) -> int:
        """Maximum size of a body in bytes."""
        return int(self.max_megabytes * 1e6)


class Metrics:
    """The content of `/metrics`, in Prometheus' text format."""

    def __init__(self):
        """All at zero."""
        self.registry = prometheus_client.CollectorRegistry()
        options = {'registry': self.registry, 'namespace': 'flax_densenet'}
        self.requests = prometheus_client.Counter(
            'requests', 'Responses by path and status.', ['path', 'status'], **options
        )
        self.seconds = prometheus_client.Histogram(
            'request_seconds',
            'From headers to response, in seconds.',
            ['path'],
            **options,
        )
        self.images = prometheus_client.Counter('images', 'Images computed.', **options)
        self.batches = prometheus_client.Histogram(
            'batch_images',
            'Number of images per batch.',
            buckets=(1, 2, 4, 8, 12, 16, 32, 64),
            **options,
        )
        self.held = prometheus_client.Gauge(
            'images_held', 'Images being received, decoded or computed.', **options
        )
        self.ready = prometheus_client.Gauge(
            'ready', '1 once every shape is compiled.', **options
        )

    def count_batch(self, count: int):
        """Counts one batch of `count` images."""
        self.batches.observe(count)
        self.images.inc(count)


class RequestGuard:
    """Wraps the routes: access, response headers, metrics, log, unread bodies."""

    def __init__(self, routes, *, figures, access, log_requests=False):
        self._figures = figures
        self._access = access
        self._log_requests = log_requests
        self._unguarded = routes
        self._routes = self._require_token(routes)
        if access.origins:
            # Outside the token, which preflight requests do not carry. Without cookies
            # there are no credentials to allow.
            every = '*' in access.origins
            self._routes = cors.CORSMiddleware(
                self._routes,
                allow_origins=['*'] if every else [],
                allow_origin_regex=None if every else access.origin_pattern(),
                allow_methods=['GET', 'HEAD', 'POST'],
                allow_headers=['*'],
                allow_private_network=True,
                expose_headers=['Retry-After', 'WWW-Authenticate'],
            )

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':  # the server's start and end, without headers
            await self._unguarded(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        # Below a path that a proxy adds, every path is as without it.
        path = self._access.path_below(scope['path'])
        refusal = self._refusal(scope['method'], exchange.headers)
        app = self._routes
        if not path:  # the page's links are relative to a folder
            path, folder = '/', scope['path'].rpartition('/')[2] + '/'
            app = Response(None, 307, {'Location': urllib.parse.quote(folder)})
        if refusal:
            app = JSONResponse({'error': refusal}, 403)
        try:
            await app({**scope, 'path': path}, exchange.receive, exchange.send)
        finally:
            path = path if path in PATHS else 'other'
            self._figures.requests.labels(path, exchange.status).inc()
            self._figures.seconds.labels(path).observe(exchange.seconds)
            if self._log_requests:
                request_log.write(
                    scope['method'],
                    request_log.describe_path(
                        path, scope['query_string'], options=queries.OPTIONS
                    ),
                    status=exchange.status,
                    seconds=exchange.seconds,
                    received=exchange.received,
                    sent=exchange.sent,
                )

    def _require_token(self, routes):
        """The routes behind the token, if there is one."""
        if self._access.token is None:
            return routes

        async def app(scope, receive, send):
            headers = Headers(scope=scope)
            sent = headers.get('authorization')
            is_open = scope['path'] in _OPEN_PATHS
            # Asks for the token; with a wrong one it is refused like the others.
            is_open |= scope['path'] == '/' and sent is None
            answer = routes
            if not is_open and not self._access.accepts_token(sent):
                answer = _refuse_token(sent)
            await answer(scope, receive, send)

        return app

    def _refusal(self, method, headers):
        host, origin = headers.get('host', ''), headers.get('origin')
        if not self._access.is_allowed(host):
            return (
                f'{host[:80]!r} is not a name of this machine; use localhost, or start '
                'the server with --allowed_hosts and the name that a proxy forwards'
            )
        if method in ('GET', 'HEAD'):  # no other origin can read the response
            return None
        site = headers.get('sec-fetch-site')
        if site is None:
            own = origin is None or self._is_own(origin, host)
        else:
            own = site in ('same-origin', 'none')
        if own or self._access.allows_origin(origin):
            return None
        return (
            f'pages of other sites may not use this server; {_flag_for(origin)} allows '
            'this one; if it is the name of its proxy, start the server with '
            '--allowed_hosts and that name'
        )

    def _is_own(self, origin, host):
        try:
            name = urllib.parse.urlsplit(origin).netloc
        except ValueError:
            return False
        if '*' in self._access.allowed_hosts:  # of the header Host; no page is named
            return name == host
        return bool(name) and (name == host or self._access.is_named(name))


class _Exchange:
    """One request and its response: counts both, and drops what the app left unread."""

    def __init__(self, scope, receive, send):
        self.headers = Headers(scope=scope)
        self.status, self.received, self.sent = 500, 0, 0
        self._receive, self._send = receive, send
        self._has_more = (
            'transfer-encoding' in self.headers or 'content-length' in self.headers
        )
        self._started = time.monotonic()

    @property
    def seconds(self):
        """Since the headers arrived."""
        return time.monotonic() - self._started

    async def receive(self):
        message = await self._receive()
        self._has_more = message.get('more_body', False)
        self.received += len(message.get('body', b''))
        return message

    async def send(self, message):
        if message['type'] == 'http.response.start':
            self.status = message['status']
            MutableHeaders(scope=message).update(_HEADERS)
        else:
            self.sent += len(message.get('body', b''))
            if self._has_more and not message.get('more_body', False):
                await self._send({**message, 'more_body': True})
                await self._drain()
                message = {'type': 'http.response.body', 'body': b''}
        await self._send(message)

    async def _drain(self):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while self._has_more:
                    await self.receive()


def _refuse_token(sent):
    """401; browsers show no dialog for `Bearer`."""
    if sent is None:
        text, challenge = 'this server needs a token', 'Bearer'
    else:
        text, challenge = 'the token is wrong', 'Bearer error="invalid_token"'
    return JSONResponse(
        {'error': f'{text}; send the header Authorization: Bearer TOKEN'},
        401,
        headers={'WWW-Authenticate': challenge},
    )


def _flag_for(origin):
    """The flag that allows an origin, if it looks like one."""
    is_origin = origin is not None and '://' in origin and len(origin) <= 100
    return f'--allow_origin={origin if is_origin else "ORIGIN"}'
