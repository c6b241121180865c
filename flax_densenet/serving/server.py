"""Serves a trained model: the socket, and the server from start to signal.

It uses hypercorn, which closes connections if their headers do not arrive in time
(`keep_alive_timeout`), while uvicorn would wait forever. `app.App` limits the time for
a body.
"""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import signal
import socket
import time
import typing
from collections.abc import Sequence

from flax_densenet import errors
from flax_densenet.errors import UserError
from flax_densenet.inference import explain as explain_lib

_LOGGER = logging.getLogger(__name__)

if typing.TYPE_CHECKING:
    from flax_densenet.serving import access as access_lib

# Number of connections that wait to be accepted.
_BACKLOG = 1024
# Seconds to wait for the headers of a request, and between two requests.
_HEADERS_S = 5.0
# Milliseconds after which a client that does not read its response is disconnected.
_SEND_MS = 30_000
# Seconds for pending responses when the server shuts down.
_LEAVE_S = 4.0


def check_installed():
    """Raises if the packages of the extra `serve` are missing."""
    with errors.extra('serve', 'serve'):
        import hypercorn  # noqa: F401
        import jinja2  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket; clients wait there until the model is loaded.

    Args:
      host: a name or an address of this machine; `0.0.0.0` or `::` for all addresses.
      port: 0 picks a free port.

    Raises:
      UserError: the socket cannot be opened.
    """
    if not 0 <= port < 65536:
        raise UserError(f'--port={port} must be from 0 to 65535')
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise UserError(
            f'--host={host} is not a name or address; use 127.0.0.1, or 0.0.0.0 for '
            'all addresses of this machine'
        ) from error
    family, _, _, _, address = found[0]
    try:
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UserError(_why_not(error, host, port)) from error
    if hasattr(socket, 'TCP_USER_TIMEOUT'):  # Linux; connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SEND_MS)
    return listener


def _why_not(error, host, port):
    if error.errno == errno.EADDRINUSE:
        return (
            f'--port={port} is in use by another program; use another port, or 0 for a '
            'free one'
        )
    if error.errno == errno.EACCES:
        return f'--port={port} needs privileges that you do not have; use 1024 or above'
    if error.errno == errno.EADDRNOTAVAIL:
        return f'--host={host} is not an address of this machine; use 127.0.0.1'
    return f'--host={host} --port={port}: {error.strerror}'


def is_loopback(listener: socket.socket) -> bool:
    """Whether only programs on this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def address_of(listener: socket.socket) -> str:
    """The address for a browser, such as `http://127.0.0.1:8000`."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


def run(
    trained,
    listener: socket.socket,
    *,
    name: str,
    limits,
    access: 'access_lib.Access | None' = None,
    explain: Sequence[explain_lib.Options] = (explain_lib.DEFAULT,),
    log_requests: bool = False,
):
    """Serves until SIGINT or SIGTERM, then finishes pending requests.

    Args:
      trained: a `trained.Trained`.
      listener: from `listen`; closed at the end.
      name: display name of the model.
      limits: a `guard.Limits`.
      access: from `make_access`; by default without a proxy.
      explain: methods for heat maps that requests can choose, the default first.
      log_requests: whether each request is logged in one line.
    """
    access = access or make_access(listener, (), '')
    stop = asyncio.Event()

    async def main():
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        address = address_of(listener)
        _LOGGER.info('%s', _welcome(name, address, access))
        await serve(
            *(trained, listener),
            name=name,
            limits=limits,
            stop=stop,
            access=access,
            explain=explain,
            log_requests=log_requests,
        )
        _LOGGER.info('stopped')

    asyncio.run(main())


def make_access(
    listener: socket.socket,
    allowed_hosts: Sequence[str],
    root_path: str,
    *,
    allow_origin: Sequence[str] = (),
    token: str | None = None,
) -> 'access_lib.Access':
    """Access rules from the address of the socket and the flags.

    Args:
      allowed_hosts, allow_origin: each text can have several, separated by commas.
      token: from `access.read_token`.

    Raises:
      UserError: a flag is not a host name, not an origin or not a path.
    """
    from flax_densenet.serving import access as access_lib

    names, origins = (
        tuple(name for text in texts for name in text.split(','))
        for texts in (allowed_hosts, allow_origin)
    )
    return access_lib.Access(is_loopback(listener), names, root_path, origins, token)


def _welcome(name, address, access):
    from flax_densenet.serving import access as access_lib

    header = "-H 'Authorization: Bearer TOKEN' " if access.token else ''
    lines = [
        f'serving {name} at {address} (Ctrl-C ends it)',
        f"  curl {header}--data-binary @photo.jpg '{address}/predict?top=3'",
    ]
    if access.root_path:
        lines.append(f'  behind a proxy: its page is at {access.root_path}/')
    if access.allowed_hosts:
        lines.append(
            f'  accepts the names {", ".join(access.allowed_hosts)} and localhost'
        )
    if access.token:
        lines.append('  requires the token, except for /health and /docs')
    if '*' in access.origins:
        lines.append(
            '  warning: pages of all sites may use it from browsers that reach it '
            '(--allow_origin=*)'
        )
    elif access.origins:
        lines.append(f'  pages of {", ".join(access.origins)} may use it')
    if not access.loopback and not access.token:
        lines.append(
            'warning: anyone who can reach this machine can use the server; '
            f'--token_file=FILE or {access_lib.TOKEN_VARIABLE} requires a token, and '
            '--host=127.0.0.1 limits it to this machine'
        )
    if not access.loopback and access.token:
        lines.append(
            'warning: the connection is not encrypted, so others in the network can '
            'read the token and the images; a proxy with HTTPS prevents that'
        )
    return '\n'.join(lines)


def _make_error_handler():
    """Warns about too many connections, once a minute.

    asyncio itself would write a traceback for each connection without a file
    descriptor, thousands per second.
    """
    told = -math.inf

    def handle(loop, context):
        nonlocal told
        error = context.get('exception')
        if not isinstance(error, OSError) or error.errno != errno.EMFILE:
            loop.default_exception_handler(context)
        elif time.monotonic() > told + 60:
            told = time.monotonic()
            _LOGGER.warning(
                'warning: too many connections; some wait (ulimit -n raises the limit)'
            )

    return handle


def _make_config(listener):
    import hypercorn

    config = hypercorn.Config()
    config.bind = [f'fd://{listener.detach()}']
    config.backlog = _BACKLOG
    config.loglevel = 'WARNING'
    config.keep_alive_timeout = _HEADERS_S
    config.graceful_timeout = _LEAVE_S / 2
    config.include_server_header = False
    # No limit is needed here: the app reads everything, or it has responded and the
    # connection is closed. With a limit, hypercorn 0.18 can wait forever to notify an
    # app that responded before the end of the body, and the connection stays open.
    config.max_app_queue_size = 0
    return config


async def serve(
    trained,
    listener: socket.socket,
    *,
    name: str,
    limits,
    stop: asyncio.Event,
    access: 'access_lib.Access | None' = None,
    explain: Sequence[explain_lib.Options] = (explain_lib.DEFAULT,),
    log_requests: bool = False,
):
    """Serves until `stop` is set; `run` without the signals."""
    import hypercorn.asyncio

    from flax_densenet.serving import app as app_lib

    asyncio.get_running_loop().set_exception_handler(_make_error_handler())
    access = access or make_access(listener, (), '')
    app = app_lib.App(
        trained,
        name=name,
        limits=limits,
        access=access,
        explain=explain,
        log_requests=log_requests,
    )
    server = asyncio.create_task(
        hypercorn.asyncio.serve(
            app.asgi, _make_config(listener), shutdown_trigger=stop.wait
        )
    )
    stopping = asyncio.create_task(stop.wait())
    started = time.monotonic()
    warming = asyncio.create_task(app.batcher.warm_up())
    try:
        await asyncio.wait({server, stopping, warming}, return_when='FIRST_COMPLETED')
        if warming.done():
            warming.result()  # its errors end the server
            _LOGGER.info('ready after %.1f s', time.monotonic() - started)
            await asyncio.wait({server, stopping}, return_when='FIRST_COMPLETED')
    finally:
        stop.set()
        warming.cancel()
        # When a server closes, Python 3.12 and later wait for every connection, even
        # one that never ends.
        await asyncio.wait({server}, timeout=_LEAVE_S)
        server.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await server
        app.close()
