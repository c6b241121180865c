"""Middleware of the server: limits, access control, response headers and metrics.

>>> Limits(max_requests=0)
Traceback (most recent call last):
flax_densenet.errors.UserError: --max_requests=0 must be above 0
"""

import asyncio
import contextlib
import dataclasses
import math
import re
import time
import urllib.parse

import prometheus_client
from PIL import Image
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response

from flax_densenet.errors import UserError

PATHS = ('/', '/predict', '/model', '/health', '/metrics')
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
# Host names with which a browser on this machine reaches it. Any other may be an
# external page that let its own name point here (DNS rebinding).
_LOCAL = re.compile(r'(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?', re.IGNORECASE)


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


@dataclasses.dataclass(frozen=True)
class Access:
    """The host names and the root path of the server.

    Attributes:
      loopback: whether only programs on this machine can connect; then only its own
        names and `allowed_hosts` are accepted.
      allowed_hosts: further names, as forwarded by a proxy: `hub.example.org`,
        `*.example.org`, or `*` for all. If there are any, no other names are accepted,
        whatever the address.
      root_path: path prefix that a proxy adds, such as `/models/one`, or nothing.
    """

    loopback: bool = True
    allowed_hosts: tuple[str, ...] = ()
    root_path: str = ''

    def __post_init__(self):
        hosts = tuple(_clean_host(name) for name in self.allowed_hosts)
        object.__setattr__(self, 'allowed_hosts', tuple(filter(None, hosts)))
        path = self.root_path.strip()
        if '?' in path or '#' in path or '://' in path or not path.isprintable():
            raise UserError(
                f'--root_path={self.root_path} is not a path; give the prefix that the '
                'proxy adds to /predict, such as --root_path=/models/one'
            )
        parts = [part for part in path.split('/') if part]
        object.__setattr__(self, 'root_path', ''.join(f'/{part}' for part in parts))

    def is_allowed(self, host: str) -> bool:
        """Whether a request with this `Host` header is accepted.

        >>> proxied = Access(allowed_hosts=('*.example.org',))
        >>> proxied.is_allowed('hub.Example.org:8000'), proxied.is_allowed('localhost')
        (True, True)
        >>> proxied.is_allowed('example.net')
        False
        """
        if not self.loopback and not self.allowed_hosts:
            return True
        return bool(_LOCAL.fullmatch(host)) or self.is_named(host)

    def is_named(self, host: str) -> bool:
        """Whether `allowed_hosts` contains a name, with or without its port."""
        host = host.lower()
        bare = re.sub(r':\d*$', '', host)
        return any(
            name in ('*', host, bare)
            or (name.startswith('*.') and bare.endswith(name[1:]))
            for name in self.allowed_hosts
        )

    def path_below(self, path: str) -> str:
        """A request's path without `root_path`, whether or not the proxy removed it.

        >>> [Access(root_path='a/').path_below(path) for path in ('/a/x', '/x', '/a')]
        ['/x', '/x', '']
        """
        if path == self.root_path or path.startswith(self.root_path + '/'):
            return path[len(self.root_path) :]
        return path


def _clean_host(text):
    name = text.strip().lower().rstrip('.')
    if not re.fullmatch(r'(\*|(\*\.)?[^\s*/?#@,]+)?', name):
        raise UserError(
            f'--allowed_hosts={text} is not a host name; give names such as '
            'hub.example.org or *.example.org, separated by commas, without http:// '
            'and path'
        )
    return name


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
    """Wraps the routes: access control, response headers, metrics, unread bodies."""

    def __init__(self, routes, *, figures, access):
        self._routes = routes
        self._figures = figures
        self._access = access

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            await self._routes(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        headers = Headers(scope=scope)
        has_more = 'transfer-encoding' in headers or 'content-length' in headers

        async def receive_part():
            nonlocal has_more
            message = await receive()
            has_more = message.get('more_body', False)
            return message

        async def send_part(message):
            nonlocal status
            if message['type'] == 'http.response.start':
                status = message['status']
                MutableHeaders(scope=message).update(_HEADERS)
            elif has_more and not message.get('more_body', False):
                await send({**message, 'more_body': True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_DRAIN_S):
                        while has_more:
                            await receive_part()
                message = {'type': 'http.response.body', 'body': b''}
            await send(message)

        # Below a path that a proxy adds, every path is as without it.
        path = self._access.path_below(scope['path'])
        refusal = self._refusal(scope['method'], headers)
        app = self._routes
        if not path:  # the page's links are relative to a folder
            path, folder = '/', scope['path'].rpartition('/')[2] + '/'
            app = Response(None, 307, {'Location': urllib.parse.quote(folder)})
        if refusal:
            app = JSONResponse({'error': refusal}, 403)
        try:
            await app({**scope, 'path': path}, receive_part, send_part)
        finally:
            path = path if path in PATHS else 'other'
            self._figures.requests.labels(path, status).inc()
            self._figures.seconds.labels(path).observe(time.monotonic() - started)

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
        if own:
            return None
        return (
            'pages of other sites may not use this server; if this is the name of its '
            'proxy, start it with --allowed_hosts and that name'
        )

    def _is_own(self, origin, host):
        try:
            name = urllib.parse.urlsplit(origin).netloc
        except ValueError:
            return False
        if '*' in self._access.allowed_hosts:  # of the header Host; no page is named
            return name == host
        return bool(name) and (name == host or self._access.is_named(name))
