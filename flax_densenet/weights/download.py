"""Downloads weight files into a cache folder, with paths derived from their addresses.

Besides this module, only the libraries of the Hub, of TensorFlow Datasets and of the
experiment trackers open network connections, for what a user names. A file gets its
final name only when it is complete and its checksum is right, so every file in the
cache is complete. The next call resumes an interrupted download. Processes that want
the same file take turns.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
import time
import urllib.parse

from flax_densenet.errors import UserError
from flax_densenet.system import hub

_LOGGER = logging.getLogger(__name__)

ATTEMPTS = 5
WAIT = 1.0  # seconds before the second attempt; doubles with each further one
TIMEOUT = 30.0  # seconds without a single byte
SLOWEST = 1024, 120.0  # the lowest speed: this many bytes in this many seconds
LARGEST = 2**32  # bytes, the limit for files of unknown size
_CHUNK = 2**18
_LOOPBACK = ('127.0.0.1', '::1', 'localhost')
_PASSING = (408, 425, 429, 500, 502, 503, 504)


@dataclasses.dataclass(frozen=True)
class Checksum:
    """A digest in hexadecimal digits, or at least its first eight digits.

    Attributes:
      kind: `sha256` or `md5`.
    """

    kind: str
    digits: str

    def check(self, path: str) -> str | None:
        """Why a file is not the expected one; None if it is."""
        found = digest(path, self.kind)
        if found.startswith(self.digits):
            return None
        name = {'sha256': 'SHA-256', 'md5': 'MD5'}[self.kind]
        shown = found[: len(self.digits)]
        return f'its {name} is {shown}, not {self.digits}'


class _Interrupted(Exception):
    """An attempt that can be resumed; the message says why it ended."""


def cache_folder() -> str:
    """`flax_densenet/weights` in `$XDG_CACHE_HOME` or ~/.cache."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.path.join(base, 'flax_densenet', 'weights')


def place_of(url: str) -> str:
    """The path in the cache for an address: `CACHE/HOST/PATH`."""
    parts = urllib.parse.urlsplit(url)
    names = [parts.netloc, *parts.path.split('/')]
    names = [re.sub(r'[^\w.-]', '_', name) for name in names if name.strip('.')]
    if parts.query:
        names[-1] += f'-{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}'
    return os.path.join(cache_folder(), *names)


def digest(path: str, kind: str = 'sha256') -> str:
    """The digest of a file, in hexadecimal digits."""
    with open(path, 'rb') as file:
        # MD5 only if the publisher offers nothing better; it is not used for security.
        return hashlib.file_digest(
            file, lambda: hashlib.new(kind, usedforsecurity=kind != 'md5')
        ).hexdigest()


def fetch(
    url: str, *, checksum: Checksum | None = None, size: int | None = None
) -> str:
    """The local path of a file; downloads it if it is not in the cache yet.

    Args:
      url: `https://...`; `http://` is allowed only for this machine.
      checksum: the digest that the file must have. If None, the digest of the first
        download is kept, and the file must have that digest from then on.
      size: published size in bytes; a much larger file is refused.

    Raises:
      UserError: the file cannot be downloaded, or is not the expected one.
    """
    path = place_of(url)
    _check_address(url)
    if os.path.isfile(path):
        return _check_cached(path, url, checksum)
    if hub.is_offline():
        raise UserError(f'{url} is not in the cache, and {hub.OFFLINE} forbids '
                        f'downloading it; {_by_hand(url, path)}')  # fmt: skip
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _alone(path):
            if not os.path.isfile(path):  # another process may have downloaded it
                _LOGGER.info(f'downloading {url} to {path}')
                _download(url, path, checksum, size)
    except OSError as error:
        raise UserError(
            f'{error.filename or path} cannot be written ({error.strerror or error}); '
            'set XDG_CACHE_HOME to a folder for downloads'
        ) from error
    return path


def _by_hand(url, path):
    return f'download it elsewhere and put it at {path}'


def _check_cached(path, url, checksum):
    wrong = checksum.check(path) if checksum else _check_digest(path)
    if wrong:
        raise UserError(
            f'{path} is not the file of {url}: {wrong}; remove it, and the next call '
            'downloads it again'
        )
    return path


def _check_digest(path):
    """Like `Checksum.check`, with the digest of the first download, if any."""
    try:
        known = pathlib.Path(f'{path}.sha256').read_text(encoding='ascii').strip()
    except (OSError, ValueError):
        return None  # put there by hand
    found = digest(path)
    return (
        None if found == known else f'its SHA-256 is {found}, at first it was {known}'
    )


def _check_address(url, before=''):
    """Raises unless a connection to this address is encrypted or local."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == 'https' and parts.hostname:
        return
    at_home = parts.scheme == 'http' and parts.hostname in _LOOPBACK
    if at_home and not before.startswith('https:'):
        return
    raise UserError(
        f'{before}{" redirects to " if before else ""}{url}, which is not https; '
        'only https:// is downloaded from'
    )


@contextlib.contextmanager
def _alone(path):
    """Holds the lock of a file to download; waits if another process has it."""
    import filelock

    lock = filelock.FileLock(f'{path}.lock')
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _LOGGER.info(f'another process is downloading {path}; waiting for it')
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(url, path, checksum, size):
    """Downloads the file of an address to its path in the cache."""
    part = f'{path}.part'
    resumed = _receive(url, part, path, checksum, size)
    wrong = checksum.check(part) if checksum else None
    if wrong and resumed:  # the file changed on the server in between
        os.unlink(part)
        _receive(url, part, path, checksum, size)
        wrong = checksum.check(part)
    if wrong:
        os.unlink(part)
        raise UserError(
            f'{url}: {wrong}; the file was changed or damaged on its way, and is not '
            f'kept; try again later, or {_by_hand(url, path)}'
        )
    if checksum is None:
        found = digest(part)
        pathlib.Path(f'{path}.sha256').write_text(found, encoding='ascii')
        _LOGGER.warning(
            f'{url}: no checksum is published, so only the connection vouches for it; '
            f'its SHA-256 is {found}, which it must have from now on'
        )
    with open(part, 'rb') as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    with contextlib.suppress(OSError):
        os.unlink(f'{part}.tag')


def _receive(url, part, path, checksum, size):
    """Fills `part`; whether some of it was there before."""
    import requests
    import urllib3

    resumed, answered = False, False
    for attempt in range(ATTEMPTS):
        try:
            with _make_session() as session:
                had = _had(part)
                resumed |= _attempt(session, url, part, checksum, size)
                return resumed
        except _Interrupted as error:
            answered, reason = True, str(error)
        except (
            *(requests.ConnectionError, requests.Timeout, ConnectionError),
            *(urllib3.exceptions.HTTPError, TimeoutError),
        ) as error:
            answered |= _had(part) > had
            reason = _reason(error)
        except requests.RequestException as error:
            raise UserError(
                f'{url}: {_reason(error)}; {_by_hand(url, path)}'
            ) from error
        if not answered and attempt:  # there is no network, or no such host
            break
        if attempt + 1 < ATTEMPTS:
            time.sleep(WAIT * 2**attempt)
    if answered:
        raise UserError(
            f'{url}: {reason}, in {ATTEMPTS} attempts; the next call resumes where '
            f'they ended; or {_by_hand(url, path)}'
        )
    raise UserError(f'{url} cannot be reached ({reason}); {_by_hand(url, path)}')


def _had(part):
    return os.path.getsize(part) if os.path.isfile(part) else 0


def _reason(error):
    """The innermost reason of a connection error, in a few words."""
    while True:
        inner = getattr(error, 'reason', None) or (error.args[0] if error.args else 0)
        if not isinstance(inner, Exception):
            break
        error = inner
    text = ' '.join(str(error).split()) or type(error).__name__
    text = text.rpartition('>: ')[2]
    # `HTTPSConnection(host='h.org', port=443): Failed to resolve ...`
    return re.sub(r'^\w+\([^()]*\): ', '', text)[:200]


def _make_session():
    import requests

    class Session(requests.Session):
        """A session that follows no redirect to an address without encryption."""

        def get_redirect_target(self, resp):
            target = super().get_redirect_target(resp)
            if target:
                try:
                    _check_address(urllib.parse.urljoin(resp.url, target), resp.url)
                except UserError:
                    resp.close()
                    raise
            return target

    session = Session()
    session.max_redirects = 10
    return session


def _attempt(session, url, part, checksum, size):
    """Receives the missing bytes; returns whether it continued an earlier attempt."""
    have, tag = _had(part), _read_tag(part)
    headers = {'Accept-Encoding': 'identity'}
    if have and (tag or checksum):
        headers['Range'] = f'bytes={have}-'
        if tag:
            headers['If-Range'] = tag
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        status = answer.status_code
        if status == 416:  # the file became shorter, or is already complete
            os.unlink(part)
            raise _Interrupted('the part that was there did not fit')
        if status in _PASSING:
            raise _Interrupted(f'{_host(url)} answers {status} {answer.reason}')
        if status not in (200, 206):
            raise UserError(_explain_status(url, answer))
        resumes = status == 206
        if resumes and not answer.headers.get('Content-Range', '').startswith(
            f'bytes {have}-'
        ):
            os.unlink(part)
            raise _Interrupted('the server sent another part than was asked for')
        have = have if resumes else 0
        total = _total(answer, have)
        most = LARGEST if size is None else size + size // 20 + 2**20
        if total is not None and total > most:
            raise UserError(_too_large(url, f'announces {total} bytes', size, most))
        _write_tag(part, answer)
        _store(answer, url, part, have, total, most, size)
    return resumes


def _store(answer, url, part, have, total, most, size):
    import tqdm

    began, last = time.monotonic(), have
    with (
        open(part, 'ab' if have else 'wb') as file,
        tqdm.tqdm(
            total=total,
            initial=have,
            unit='B',
            unit_scale=True,
            desc=os.path.basename(part).removesuffix('.part'),
            # None: only on a terminal.
            disable=None if sys.stderr is not None else True,
        ) as bar,
    ):
        for chunk in _pieces(answer, url):
            have += len(chunk)
            if have > (most if total is None else total):
                file.truncate(0)
                said = f'sends more than {most if total is None else total} bytes'
                raise UserError(_too_large(url, said, size, most))
            file.write(chunk)
            bar.update(len(chunk))
            if time.monotonic() - began > SLOWEST[1]:
                if have - last < SLOWEST[0]:
                    raise _Interrupted(f'{_host(url)} nearly stopped sending')
                began, last = time.monotonic(), have
    if total is not None and have < total:
        raise _Interrupted(f'it ended after {have} of {total} bytes')


def _pieces(answer, url):
    """Yields the bytes of a response; raises `_Interrupted` if they stop."""
    import urllib3

    try:
        yield from answer.raw.stream(_CHUNK, decode_content=False)
    except urllib3.exceptions.ReadTimeoutError as error:
        raise _Interrupted(
            f'{_host(url)} sent nothing for {TIMEOUT:g} seconds (timed out)'
        ) from error
    except urllib3.exceptions.ProtocolError as error:
        raise _Interrupted(f'{_host(url)} ended the connection too early') from error


def _total(answer, have):
    length = answer.headers.get('Content-Length', '')
    return have + int(length) if length.isascii() and length.isdecimal() else None


def _host(url):
    return urllib.parse.urlsplit(url).netloc


def _too_large(url, what, size, most):
    published = f'{most} are the limit'
    if size is not None:
        published = f'about {size} are published'
    return f'{url} {what}, where {published}; it is not kept'


def _explain_status(url, answer):
    if answer.status_code in (401, 403):
        return (
            f'{url}: {_host(url)} refuses it ({answer.status_code} {answer.reason}); '
            f'if it needs a login, {_by_hand(url, place_of(url))}'
        )
    return (
        f'{url}: {_host(url)} answers {answer.status_code} {answer.reason}; check the '
        f'address, or {_by_hand(url, place_of(url))}'
    )


def _read_tag(part):
    """The validator (ETag or date) that the server sent for the partial file."""
    try:
        with open(f'{part}.tag', encoding='utf-8') as file:
            tag = json.load(file)
    except (OSError, ValueError):
        return None
    return tag if isinstance(tag, str) else None


def _write_tag(part, answer):
    tag = answer.headers.get('ETag', '')
    if not tag or tag.startswith('W/'):
        tag = answer.headers.get('Last-Modified')
    with open(f'{part}.tag', 'w', encoding='utf-8') as file:
        json.dump(tag, file)
