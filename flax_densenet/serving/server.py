"""Serves a trained model: the socket, the server's life from start to signal.

hypercorn, since it closes connections whose headers do not arrive in time
(`keep_alive_timeout`), which uvicorn waits for without end; how long a body may take
is up to `app.App`.
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
    from flax_densenet.serving import guard

# Connections that wait to be accepted.
_BACKLOG = 1024
# Seconds for the headers of a request to arrive, and between two requests.
_HEADERS_S = 5.0
# Milliseconds after which a client that takes nothing of its answer is cut off.
_SEND_MS = 30_000
# Seconds for the answers under way once the server is to end.
_LEAVE_S = 4.0


def check_installed():
    """Raises where the packages of the extra `serve` are missing."""
    with errors.extra('serve', 'serve'):
        import hypercorn  # noqa: F401
        import jinja2  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; clients wait there until the model is loaded.

    Args:
      host: a name or an address of this machine; `0.0.0.0` or `::` are all of them.
      port: 0 takes a free one.

    Raises:
      UserError: it cannot be had.
    """
    if not 0 <= port < 65536:
        raise UserError(f'--port={port} must be from 0 to 65535')
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise UserError(
            f'--host={host} is no name or address; use 127.0.0.1, or 0.0.0.0 for all '
            'of this machine'
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
        return f'--port={port} is taken by another program; use another, or 0 for any'
    if error.errno == errno.EACCES:
        return f'--port={port} needs rights that you do not have; use 1024 or above'
    if error.errno == errno.EADDRNOTAVAIL:
        return f'--host={host} is not an address of this machine; use 127.0.0.1'
    return f'--host={host} --port={port}: {error.strerror}'


def is_loopback(listener: socket.socket) -> bool:
    """True where only programs of this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def address_of(listener: socket.socket) -> str:
    """`http://127.0.0.1:8000`, as a browser takes it."""
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
    access: 'guard.Access | None' = None,
    explain: Sequence[explain_lib.Options] = (explain_lib.DEFAULT,),
):
    """Serves until SIGINT or SIGTERM, then finishes what it has.

    Args:
      trained: an `trained.Trained`.
      listener: of `listen`; closed at the end.
      name: of the model, for people.
      limits: a `guard.Limits`.
      access: of `make_access`; without it, of no proxy.
      explain: methods of maps that requests can choose, the usual one first.
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
        )
        _LOGGER.info('stopped')

    asyncio.run(main())


def make_access(
    listener: socket.socket, allowed_hosts: Sequence[str], root_path: str
) -> 'guard.Access':
    """Who may ask, by the address of the socket and what the flags say.

    Raises:
      UserError: what they say is no host name or no path.
    """
    from flax_densenet.serving import guard

    names = [name for text in allowed_hosts for name in text.split(',')]
    return guard.Access(is_loopback(listener), tuple(names), root_path)


def _welcome(name, address, access):
    lines = [
        f'serving {name} at {address} (Ctrl-C ends it)',
        f"  curl --data-binary @photo.jpg '{address}/predict?top=3'",
    ]
    if access.root_path:
        lines.append(f'  behind a proxy: its page is at {access.root_path}/')
    if access.allowed_hosts:
        lines.append(f'  answers to {", ".join(access.allowed_hosts)} and localhost')
    if not access.loopback:
        lines.append(
            'warning: whoever reaches this machine can use it: there is no password '
            'and no encryption; --host=127.0.0.1 is for this machine alone'
        )
    return '\n'.join(lines)


def _make_error_handler():
    """Tells once a minute that there are too many connections.

    asyncio alone would write a trace for each that finds no file descriptor, thousands
    in a second.
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
    # No bound of its own is needed: the app reads what comes, or has answered and the
    # connection is closed. With one, hypercorn 0.18 can wait for ever to tell an app
    # that answered before the body's end that it is over, and the connection stays.
    config.max_app_queue_size = 0
    return config


async def serve(
    trained,
    listener: socket.socket,
    *,
    name: str,
    limits,
    stop: asyncio.Event,
    access: 'guard.Access | None' = None,
    explain: Sequence[explain_lib.Options] = (explain_lib.DEFAULT,),
):
    """Serves until `stop` is set; `run` without the signals."""
    import hypercorn.asyncio

    from flax_densenet.serving import app as app_lib

    asyncio.get_running_loop().set_exception_handler(_make_error_handler())
    access = access or make_access(listener, (), '')
    app = app_lib.App(trained, name=name, limits=limits, access=access, explain=explain)
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
            warming.result()  # what went wrong with it ends the server
            _LOGGER.info('ready after %.1f s', time.monotonic() - started)
            await asyncio.wait({server, stopping}, return_when='FIRST_COMPLETED')
    finally:
        stop.set()
        warming.cancel()
        # Python 3.12 and later wait for every connection when a server closes, also
        # for one that never ends.
        await asyncio.wait({server}, timeout=_LEAVE_S)
        server.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await server
        app.close()
