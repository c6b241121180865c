"""Who may use the server: host names, pages of other origins, and the token.

>>> Access(origins=('app.example.org',))
Traceback (most recent call last):
flax_densenet.errors.UserError: --allow_origin=app.example.org is not an origin; give \
the scheme and the name of a site, and its port if it has one, such as \
https://app.example.org or https://*.example.org, or * for all sites
"""

import dataclasses
import hmac
import os
import pathlib
import re

from flax_densenet.errors import UserError

TOKEN_VARIABLE = 'FLAX_DENSENET_TOKEN'
# Shorter tokens can be found by trying.
_MIN_TOKEN = 16
# Host names with which a browser on this machine reaches it. Any other may be an
# external page that let its own name point here (DNS rebinding).
_LOCAL = re.compile(r'(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?', re.IGNORECASE)
_ORIGIN = re.compile(
    r'([a-z][a-z0-9+.-]*)://((?:\*\.)?[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?/?'
)
# Browsers leave these ports out.
_PORTS = {'http': '80', 'https': '443'}


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may use the server, and its root path.

    Attributes:
      loopback: whether only programs on this machine can connect; then only its own
        names and `allowed_hosts` are accepted.
      allowed_hosts: further names, as forwarded by a proxy: `hub.example.org`,
        `*.example.org`, or `*` for all. If there are any, no other names are accepted,
        whatever the address.
      root_path: path prefix that a proxy adds, such as `/models/one`, or nothing.
      origins: sites whose pages may use the server: `https://app.example.org`,
        `https://*.example.org`, or `*` for all.
      token: what requests have to send; None if the server is open. See `read_token`.
    """

    loopback: bool = True
    allowed_hosts: tuple[str, ...] = ()
    root_path: str = ''
    origins: tuple[str, ...] = ()
    token: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        hosts = tuple(_clean_host(name) for name in self.allowed_hosts)
        object.__setattr__(self, 'allowed_hosts', tuple(filter(None, hosts)))
        origins = tuple(_clean_origin(name) for name in self.origins)
        object.__setattr__(self, 'origins', tuple(filter(None, origins)))
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

    def origin_pattern(self) -> str:
        """A regular expression for the `Origin` headers of `origins`.

        >>> pattern = Access(origins=('https://*.example.org',)).origin_pattern()
        >>> origins = 'https://a.example.org', 'https://example.org'
        >>> [bool(re.fullmatch(pattern, one)) for one in origins]
        [True, False]
        """
        if '*' in self.origins:
            return '.*'
        anything = '[A-Za-z0-9._-]+'
        patterns = (re.escape(one).replace(r'\*', anything) for one in self.origins)
        return '|'.join(patterns) or '(?!)'

    def allows_origin(self, origin: str | None) -> bool:
        """Whether pages of another site, from this `Origin` header, are allowed."""
        if '*' in self.origins:
            return True
        return origin is not None and bool(re.fullmatch(self.origin_pattern(), origin))

    def accepts_token(self, authorization: str | None) -> bool:
        """Whether an `Authorization` header has the token, if one is needed.

        >>> access = Access(token='a' * 20)
        >>> sent = 'Bearer ' + 'a' * 20, 'Bearer b', None
        >>> [access.accepts_token(one) for one in sent]
        [True, False, False]
        """
        if self.token is None:
            return True
        scheme, _, sent = (authorization or '').partition(' ')
        # Takes the same time however many of the characters are right.
        same = hmac.compare_digest(sent.strip().encode(), self.token.encode())
        return same and scheme.lower() == 'bearer'

    def path_below(self, path: str) -> str:
        """A request's path without `root_path`, whether or not the proxy removed it.

        >>> [Access(root_path='a/').path_below(path) for path in ('/a/x', '/x', '/a')]
        ['/x', '/x', '']
        """
        if path == self.root_path or path.startswith(self.root_path + '/'):
            return path[len(self.root_path) :]
        return path


def read_token(file: str | None) -> str | None:
    """The token from a file, or else from the environment variable; None without.

    Args:
      file: path of a file with nothing but the token.

    Raises:
      UserError: the file cannot be read, or the token is empty, short or has characters
        that a header cannot have.
    """
    if file == '':
        raise UserError('--token_file= is empty; name a file with the token')
    if file is not None:
        source = f'--token_file={file}'
        try:
            text = pathlib.Path(file).read_bytes()[:10_000].decode('ascii', 'replace')
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f'{source} cannot be read: {reason}') from error
    else:
        source, found = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
        if found is None:
            return None
        text = found
    token = text.strip()
    advice = 'such as the output of `openssl rand -hex 16`'
    if not token:
        raise UserError(f'{source} is empty; it must have a token, {advice}')
    if not re.fullmatch('[!-~]+', token):
        raise UserError(
            f'{source} must have one token of ASCII characters without spaces, {advice}'
        )
    if len(token) < _MIN_TOKEN:
        raise UserError(
            f'{source}: the token has {len(token)} characters, which can be guessed; '
            f'use at least {_MIN_TOKEN}, {advice}'
        )
    return token


def _clean_host(text):
    name = text.strip().lower().rstrip('.')
    if not re.fullmatch(r'(\*|(\*\.)?[^\s*/?#@,]+)?', name):
        raise UserError(
            f'--allowed_hosts={text} is not a host name; give names such as '
            'hub.example.org or *.example.org, separated by commas, without http:// '
            'and path'
        )
    return name


def _clean_origin(text):
    origin = text.strip().lower()
    if origin in ('', '*'):
        return origin
    found = _ORIGIN.fullmatch(origin)
    if not found:
        raise UserError(
            f'--allow_origin={text} is not an origin; give the scheme and the name of '
            'a site, and its port if it has one, such as https://app.example.org or '
            'https://*.example.org, or * for all sites'
        )
    scheme, host, port = found.groups()
    ending = '' if port in (None, _PORTS.get(scheme)) else f':{int(port)}'
    return f'{scheme}://{host}{ending}'
