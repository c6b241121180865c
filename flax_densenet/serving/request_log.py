"""One line per request for `--log_requests`, without what was sent.

A line has the time, method, path, status, duration and sizes. It has the options of
/predict, but no other part of an address, no header and no file name.
"""

import logging
import time
import urllib.parse

_LOGGER = logging.getLogger(__name__)
# Longer values are cut.
_MAX_VALUE = 40


def describe_path(path: str, query: bytes, *, options: tuple[str, ...]) -> str:
    """The part of an address to log.

    Args:
      path: a known path; the caller replaces any other.
      query: as sent, with `%` escapes.
      options: names of the query that are logged with their values.

    >>> describe_path('/predict', b'top=3&key=abc', options=('top',))
    '/predict?top=3&...'
    """
    pairs = urllib.parse.parse_qsl(query[:1000].decode('latin-1'), True)
    known = [(name, value[:_MAX_VALUE]) for name, value in pairs if name in options]
    # Encoded again, so that no value can start a line of its own.
    text = urllib.parse.urlencode(known)
    if len(known) < len(pairs):
        text += '&...' if text else '...'
    return f'{path}?{text}' if text else path


def write(
    method: str,
    address: str,
    *,
    status: int,
    seconds: float,
    received: int,
    sent: int,
):
    """Logs a request.

    Args:
      address: from `describe_path`.
      received: bytes of the body.
      sent: bytes of the body of the response.
    """
    name = method if method.isalpha() else 'other'
    _LOGGER.info(
        '%s %s %s %d %.0f ms, %d bytes in, %d bytes out',
        time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        name[:10],
        address,
        status,
        1e3 * seconds,
        received,
        sent,
    )
