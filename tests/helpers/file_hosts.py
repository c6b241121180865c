"""A local server that imitates file hosts and the Hugging Face Hub."""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse

COMMIT = '0123456789abcdef0123456789abcdef01234567'


@dataclasses.dataclass
class File:
    """A file on the server, with its faults.

    Attributes:
      cuts: for each request, the number of bytes after which the connection ends.
      statuses: for each request, a status to send instead of the file.
      redirect: an address to redirect to.
      announced: a length for the header instead of the real one; '' for no length.
      pause: seconds between pieces of `piece` bytes.
      endless: whether to send forever.
      etag: the ETag; None for a server without ETags.
      gate: an event to wait for before the second half.
    """

    content: bytes = b''
    cuts: list = dataclasses.field(default_factory=list)
    statuses: list = dataclasses.field(default_factory=list)
    redirect: str = ''
    announced: int | str | None = None
    pause: float = 0.0
    piece: int = 2**16
    endless: bool = False
    ranges: bool = True
    etag: str | None = '"one"'
    gate: threading.Event | None = None
    headers: dict = dataclasses.field(default_factory=dict)


class Host:
    """The server; `files` by path, `requests` as (method, path, headers)."""

    def __init__(self):
        self.files, self.requests, self.hub = {}, [], {}
        self.repos, self.stored, self.commits = {}, {}, []
        handler = type('Handler', (_Handler,), {'host': self})
        self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        threading.Thread(
            target=self._server.serve_forever, kwargs={'poll_interval': 0.05}
        ).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def clear(self):
        """Forgets all files and requests."""
        stores = self.files, self.hub, self.repos, self.stored
        for kept in (*stores, self.requests, self.commits):
            kept.clear()

    def put(self, path, content=b'', **how) -> str:
        """Serves a file; returns its address."""
        self.files[path] = File(content, **how)
        return f'{self.url}{path}'

    def put_repo(self, name, files, *, error=''):
        """Serves a repository of the Hub: `{file: bytes}`.

        Args:
          error: an error, by its name on the Hub, to send instead of files.
        """
        self.hub[name] = (files, error)

    def count(self, method, path=''):
        """The number of requests."""
        return sum(m == method and p.startswith(path) for m, p, _ in self.requests)


_RESOLVE = r'/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)'
_ERRORS = {'GatedRepo': 403, 'RepoNotFound': 404, 'Unauthorized': 401}


class _Handler(http.server.BaseHTTPRequestHandler):
    host: Host
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def do_CONNECT(self):
        self.host.requests.append((self.command, self.path, dict(self.headers)))
        self.send_error(407)

    def _answer(self):
        path = self.path.partition('?')[0]
        self.host.requests.append((self.command, self.path, dict(self.headers)))
        length = int(self.headers.get('Content-Length') or 0)
        self.body = self.rfile.read(length) if length else b''
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if path in self.host.files:
                return self._file(self.host.files[path])
            if match := re.fullmatch(_RESOLVE, path):
                return self._resolve(*match.groups())
            for pattern, answer in _API:
                if match := re.fullmatch(pattern, path):
                    return answer(self, *match.groups())
            return self._send(404, b'not here')

    def _send(self, status, content=b'', **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def _json(self, content, status=200):
        self._send(
            status, json.dumps(content).encode(), Content_Type='application/json'
        )

    def _file(self, file):
        if file.redirect:
            return self._send(302, Location=file.redirect)
        if file.statuses:
            return self._send(file.statuses.pop(0), b'no')
        first, status = 0, 200
        wanted = self.headers.get('Range', '')
        same = self.headers.get('If-Range', file.etag) == file.etag
        if file.ranges and same and (match := re.fullmatch(r'bytes=(\d+)-', wanted)):
            first, status = int(match[1]), 206
            if first >= len(file.content):
                return self._send(416)
        content = file.content[first:]
        self.send_response(status)
        announced = len(content) if file.announced is None else file.announced
        chunked = announced == ''
        if chunked:
            self.send_header('Transfer-Encoding', 'chunked')
        else:
            self.send_header('Content-Length', str(announced))
        if status == 206:
            last, size = len(file.content) - 1, len(file.content)
            self.send_header('Content-Range', f'bytes {first}-{last}/{size}')
        if file.etag:
            self.send_header('ETag', file.etag)
        for name, value in file.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self._body(file, content, chunked)
        return None

    def _body(self, file, content, chunked):
        cut = file.cuts.pop(0) if file.cuts else None
        if cut is not None:
            self.wfile.write(content[:cut])
            self.wfile.flush()
            self.close_connection = True
            return
        sent = 0
        while sent < len(content) or file.endless:
            piece = content[sent : sent + file.piece] or b'x' * file.piece
            if file.gate is not None and 2 * sent >= len(content):
                file.gate.wait(20)
            if chunked:
                piece = b'%x\r\n%s\r\n' % (len(piece), piece)
            self.wfile.write(piece)
            sent += file.piece
            if file.pause:
                self.wfile.flush()
                time.sleep(file.pause)
        if chunked:
            self.wfile.write(b'0\r\n\r\n')
        if not isinstance(file.announced, int | None) or (file.announced or 0) > sent:
            self.close_connection = True

    def _resolve(self, name, revision, path):
        files, error = self.host.hub.get(name, ({}, 'RepoNotFound'))
        headers = {'X_Error_Code': error, 'X_Error_Message': f'{error} of the tests'}
        if error:
            return self._send(_ERRORS[error], b'no', **headers)
        if revision not in ('main', 'v1', COMMIT):
            return self._send(404, b'no', X_Error_Code='RevisionNotFound')
        if path not in files:
            return self._send(
                404, b'no', X_Error_Code='EntryNotFound', X_Repo_Commit=COMMIT
            )
        found = files[path]
        file = found if isinstance(found, File) else File(found)
        digest = hashlib.sha256(file.content).hexdigest()
        file.etag = file.headers.get('X-Linked-Etag', f'"{digest}"')
        file.headers.setdefault('X-Repo-Commit', COMMIT)
        file.headers.setdefault('X-Linked-Size', str(len(file.content)))
        return self._file(file)

    def _create(self):
        asked = json.loads(self.body)
        name = f'{asked.get("organization") or "me"}/{asked["name"]}'
        if self.headers.get('Authorization') != 'Bearer hf_test':
            return self._send(401, b'{"error": "Invalid username or password."}')
        if asked.get('organization') == 'others':
            return self._send(403, b'{"error": "You have no rights to create this."}')
        private = asked.get('private') or asked.get('visibility') == 'private'
        self.host.repos[name] = bool(private)
        return self._json({'url': f'{self.host.url}/{name}', 'name': name, 'id': '1'})

    def _preupload(self, name, revision):
        files = json.loads(self.body)['files']
        return self._json(
            {
                'files': [
                    {
                        'path': file['path'],
                        'uploadMode': 'lfs'
                        if 'safetensors' in file['path']
                        else 'regular',
                        'shouldIgnore': False,
                    }
                    for file in files
                ]
            }
        )

    def _batch(self, name):
        objects = json.loads(self.body)['objects']
        answer = [
            one | {'actions': {'upload': {'href': f'{self.host.url}/lfs/{one["oid"]}'}}}
            for one in objects
        ]
        return self._json({'transfer': 'basic', 'objects': answer})

    def _store(self, digest):
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.host.stored[digest] = self.body
        return self._send(200)

    def _commit(self, name, revision):
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = {}
        for line in lines:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.host.stored[value['oid']]
        self.host.commits.append((name, files))
        return self._json(
            {
                'commitUrl': f'{self.host.url}/{name}/commit/{COMMIT}',
                'commitOid': COMMIT,
                'hookOutput': '',
                'success': True,
            }
        )

    def _valid(self):
        return self._json({'warnings': [], 'errors': []})

    def _info(self, name):
        if name not in self.host.repos:
            return self._send(404, b'no', X_Error_Code='RepoNotFound')
        private = self.host.repos[name]
        about = {'id': name, 'modelId': name, 'sha': COMMIT, 'siblings': []}
        return self._json(about | {'private': private})

    def _set(self, name):
        """The description of a data set."""
        files, error = self.host.hub.get(f'datasets/{name}', ({}, 'RepoNotFound'))
        if error == 'RepoNotFound' or error == 'Unauthorized':
            return self._send(_ERRORS[error], b'no', X_Error_Code=error)
        siblings = [{'rfilename': path} for path in files]
        about = {'id': name, 'sha': COMMIT, 'siblings': siblings, 'private': False}
        return self._json(about | {'gated': 'auto' if error else False, 'tags': []})

    def _tree(self, name, below):
        """Files and folders directly in a folder of a data set."""
        files, above = self.host.hub[f'datasets/{name}'][0], (below or '').strip('/')
        found = {}
        for path, content in files.items():
            if not above or path.startswith(f'{above}/'):
                rest = path.removeprefix(above).strip('/')
                inside = rest.partition('/')[0]
                full = f'{above}/{inside}'.strip('/')
                folder = {'type': 'directory', 'path': full, 'size': 0, 'oid': '0' * 40}
                found[full] = folder if '/' in rest else _entry(path, content)
        if not found:
            return self._send(404, b'no', X_Error_Code='EntryNotFound')
        return self._json(list(found.values()))

    def _paths(self, name):
        files = self.host.hub[f'datasets/{name}'][0]
        wanted = urllib.parse.parse_qs(self.body.decode()).get('paths', [])
        return self._json([_entry(p, files[p]) for p in wanted if p in files])

    def _whoami(self):
        return self._json({'name': 'me', 'type': 'user', 'orgs': []})


def _entry(path, content):
    content = getattr(content, 'content', content)
    oid = hashlib.sha1(content).hexdigest()
    return {'type': 'file', 'path': path, 'size': len(content), 'oid': oid}


_API = [
    (r'/api/repos/create', _Handler._create),
    (r'/api/models/([^/]+/[^/]+)/preupload/(\w+)', _Handler._preupload),
    (r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', _Handler._batch),
    (r'/lfs/(\w+)', _Handler._store),
    (r'/api/models/([^/]+/[^/]+)/commit/(\w+)', _Handler._commit),
    (r'/api/validate-yaml', _Handler._valid),
    (r'/api/models/([^/]+/[^/]+)(?:/revision/\w+)?', _Handler._info),
    (r'/api/whoami-v2', _Handler._whoami),
    (r'/api/datasets/([^/]+/[^/]+)(?:/revision/\w+)?', _Handler._set),
    (r'/api/datasets/([^/]+/[^/]+)/tree/\w+(/.*)?', _Handler._tree),
    (r'/api/datasets/([^/]+/[^/]+)/paths-info/\w+', _Handler._paths),
]


def use(host, folder, monkeypatch):
    """Makes this process use `host` for files and the Hub, with caches in `folder`."""
    from huggingface_hub import constants

    from flax_densenet.weights import download

    monkeypatch.setenv('XDG_CACHE_HOME', str(folder / 'cache'))
    monkeypatch.setenv('HF_ENDPOINT', host.url)
    monkeypatch.setenv('HF_TOKEN', 'hf_test')
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(folder / 'cache' / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(download, 'WAIT', 0.0)
    return host
