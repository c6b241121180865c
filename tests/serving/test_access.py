"""The token, pages of other sites, and the log of requests."""

import asyncio
import re
import socket

import pytest

from flax_densenet.errors import UserError
from flax_densenet.serving import access as access_lib
from flax_densenet.serving import guard, request_log, server
from helpers.servers import FORM, JPEG, TOKEN, answer_of, ask, form_of

pytest.importorskip('starlette')
pytest.importorskip('hypercorn')
pytest.importorskip('prometheus_client')
pytest.importorskip('python_multipart')

SENT = {'Authorization': f'Bearer {TOKEN}'}
SITE = 'https://app.example'


@pytest.mark.parametrize(
    ('headers', 'message', 'challenge'),
    [
        ({}, 'this server needs a token; send the header Auth', 'Bearer'),
        ({'Authorization': f'Bearer {TOKEN}x'}, 'the token is wrong', 'invalid_token'),
        ({'Authorization': f'Bearer {TOKEN[:-1]}'}, 'is wrong', 'invalid_token'),
        ({'Authorization': TOKEN}, 'the token is wrong', 'invalid_token'),
        ({'Authorization': f'Basic {TOKEN}'}, 'the token is wrong', 'invalid_token'),
        ({'Authorization': 'Bearer'}, 'the token is wrong', 'invalid_token'),
        ({'Authorization': 'Bearer \xe4'}, 'the token is wrong', 'invalid_token'),
    ],
)
def test_wrong_tokens(guarded_port, headers, message, challenge):
    """All that tells something is refused, also what does not exist."""
    paths = ('/predict', JPEG), ('/model', None), ('/metrics', None), ('/none', None)
    for path, body in paths:
        answer = ask(guarded_port, path, body, headers=headers)
        assert answer.status == 401, path
        assert list(answer.json) == ['error'] and message in answer.json['error']
        assert challenge in answer.headers['WWW-Authenticate']
        assert answer.headers['WWW-Authenticate'].startswith('Bearer')
        assert TOKEN not in answer.body.decode()


def test_right_token(guarded_port):
    for headers in SENT, {'Authorization': f'bearer  {TOKEN} '}:
        assert ask(guarded_port, '/predict', JPEG, headers=headers).status == 200
        for path in '/model', '/metrics', '/':
            assert ask(guarded_port, path, headers=headers).status == 200
    body = form_of(('image', 'a.jpg', JPEG))
    assert ask(guarded_port, '/predict', body, headers=FORM).status == 401
    assert ask(guarded_port, '/predict', body, headers=FORM | SENT).status == 200


def test_what_needs_no_token(guarded_port):
    """Monitoring, and what does not describe the model."""
    for path in '/health', '/docs', '/openapi.json':
        answer = ask(guarded_port, path)
        assert answer.status == 200
        assert 'ants' not in answer.body.decode()
        assert 'bugs' not in answer.body.decode()


@pytest.mark.slow
def test_page_asks_for_the_token(guarded_port, port):
    text = ask(guarded_port, '/').body.decode()
    assert 'This server needs a token' in text and 'id="token"' in text
    assert 'sessionStorage' in text and 'localStorage' not in text
    assert not any(word in text for word in ('ants', 'bugs', 'BC-L10k4', TOKEN))
    assert ask(guarded_port, '/', headers={'Authorization': 'Bearer x'}).status == 401
    text = ask(guarded_port, '/', headers=SENT).body.decode()
    assert 'What does the model see' in text and 'ants' in text
    assert 'id="token"' not in text
    assert 'id="token"' not in ask(port, '/').body.decode()


@pytest.mark.parametrize('fields', [{'token': TOKEN}, {'origins': (SITE,)}])
def test_start_of_the_server_needs_no_token(fields):
    """It is no request; an error there would be logged at every start."""
    taken = []

    async def routes(scope, receive, send):
        taken.append(scope)

    access = access_lib.Access(**fields)
    guarded = guard.RequestGuard(routes, figures=None, access=access)
    asyncio.run(guarded({'type': 'lifespan'}, None, None))
    assert taken == [{'type': 'lifespan'}]


def test_body_without_token_is_not_kept(guarded_port):
    """The answer comes before the body; the rest of it is dropped."""
    head = b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n'
    with socket.create_connection(('127.0.0.1', guarded_port), timeout=60) as client:
        client.sendall(head)
        client.shutdown(socket.SHUT_WR)
        assert answer_of(client).status == 401


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'is empty; it must have a token, such as the output of `openssl'),
        (' \n', 'is empty; it must have a token'),
        ('short', 'the token has 5 characters, which can be guessed; use at least 16'),
        ('two words that are long', 'one token of ASCII characters without spaces'),
        ('a' * 20 + '\n' + 'b' * 20, 'one token of ASCII characters without spaces'),
        ('größer als sechzehn', 'one token of ASCII characters without spaces'),
    ],
)
def test_tokens_that_cannot_be_used(tmp_path, monkeypatch, text, message):
    file = tmp_path / 'token'
    file.write_text(text, encoding='utf-8')
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        access_lib.read_token(str(file))
    assert str(caught.value).startswith(f'--token_file={file}')
    monkeypatch.setenv('FLAX_DENSENET_TOKEN', text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        access_lib.read_token(None)
    assert str(caught.value).startswith('FLAX_DENSENET_TOKEN')


def test_where_the_token_is_from(tmp_path, monkeypatch):
    monkeypatch.delenv('FLAX_DENSENET_TOKEN', raising=False)
    assert access_lib.read_token(None) is None
    monkeypatch.setenv('FLAX_DENSENET_TOKEN', 'e' * 20)
    assert access_lib.read_token(None) == 'e' * 20
    (tmp_path / 'token').write_text('f' * 20 + '\n')
    assert access_lib.read_token(str(tmp_path / 'token')) == 'f' * 20
    for file, reason in ('none', 'no such file'), ('', 'is a directory'):
        with pytest.raises(UserError, match=f'cannot be read: {reason}'):
            access_lib.read_token(f'{tmp_path}/{file}')
    with pytest.raises(UserError, match='--token_file= is empty; name a file'):
        access_lib.read_token('')
    assert 'e' * 20 not in repr(access_lib.Access(token='e' * 20))


def preflight(port, origin, path='/predict', **more):
    headers = {
        'Origin': origin,
        'Access-Control-Request-Method': 'POST',
        'Access-Control-Request-Headers': 'authorization,content-type',
        'Sec-Fetch-Site': 'cross-site',
    }
    return ask(port, path, method='OPTIONS', headers=headers | more)


@pytest.mark.parametrize('origin', [SITE, 'https://a.lab.example'])
def test_pages_of_allowed_sites(guarded_port, origin):
    """The preflight, which has no token, then the request; also its errors are read."""
    answer = preflight(guarded_port, origin)
    assert answer.status == 200
    assert answer.headers['Access-Control-Allow-Origin'] == origin
    assert 'POST' in answer.headers['Access-Control-Allow-Methods']
    assert 'authorization' in answer.headers['Access-Control-Allow-Headers']
    private = {'Access-Control-Request-Private-Network': 'true'}
    answer = preflight(guarded_port, origin, **private)
    assert answer.headers['Access-Control-Allow-Private-Network'] == 'true'
    sent = {'Origin': origin, 'Sec-Fetch-Site': 'cross-site'}
    for headers, body, status in [
        (SENT, JPEG, 200),
        (SENT, b'a text', 415),
        ({}, JPEG, 401),
    ]:
        answer = ask(guarded_port, '/predict', body, headers=sent | headers)
        assert answer.status == status
        assert answer.headers['Access-Control-Allow-Origin'] == origin
        assert 'Origin' in answer.headers['Vary']
        assert 'Access-Control-Allow-Credentials' not in answer.headers
    answer = ask(guarded_port, '/model', headers=sent | SENT)
    assert answer.headers['Access-Control-Allow-Origin'] == origin


@pytest.mark.parametrize(
    'origin',
    [
        'https://evil.example',
        'http://app.example',
        'https://app.example:8443',
        'https://app.example.evil.example',
        'https://evil-app.example',
        'https://lab.example',
        'https://a.lab.example.evil.example',
        'null',
    ],
)
def test_pages_of_other_sites(guarded_port, port, origin):
    for server_port in guarded_port, port:
        answers = [preflight(server_port, origin)]
        for site in {}, {'Sec-Fetch-Site': 'cross-site'}:
            headers = {'Origin': origin} | site | SENT
            answers.append(ask(server_port, '/predict', JPEG, headers=headers))
        for answer in answers:
            assert answer.status == 403
            assert '--allow_origin=' in answer.json['error']
            assert 'Access-Control-Allow-Origin' not in answer.headers
        answer = ask(server_port, '/model', headers={'Origin': origin} | SENT)
        assert 'Access-Control-Allow-Origin' not in answer.headers
    if origin != 'null':  # the whole remedy, to copy
        assert f'--allow_origin={origin} allows this one' in answers[0].json['error']


def test_other_names_are_refused_to_allowed_sites(guarded_port):
    """A page whose name points here is none of the server's, whatever its origin."""
    headers = {'Host': 'evil.example', 'Origin': SITE} | SENT
    assert ask(guarded_port, '/predict', JPEG, headers=headers).status == 403


def test_every_site():
    access = access_lib.Access(origins=('*', SITE))
    around = guard.RequestGuard(None, figures=None, access=access)
    headers = {'host': 'localhost', 'sec-fetch-site': 'cross-site'}
    for origin in 'https://evil.example', 'null':
        assert not around._refusal('POST', headers | {'origin': origin})
    assert around._routes.allow_all_origins
    closed = guard.RequestGuard(None, figures=None, access=access_lib.Access())
    assert closed._refusal('POST', headers | {'origin': SITE})


@pytest.mark.parametrize(
    ('text', 'clean'),
    [
        ('https://App.example/', 'https://app.example'),
        ('https://app.example:443', 'https://app.example'),
        ('http://app.example:8080', 'http://app.example:8080'),
        ('http://[::1]:5173', 'http://[::1]:5173'),
        ('chrome-extension://abcd', 'chrome-extension://abcd'),
    ],
)
def test_origins(text, clean):
    access = access_lib.Access(origins=(text,))
    assert access.origins == (clean,) and access.allows_origin(clean)


@pytest.mark.parametrize(
    'text',
    ['app.example', 'https://', 'https://a/b', 'null', 'https://bücher.example', '*.a'],
)
def test_what_is_not_an_origin(text):
    message = f'--allow_origin={text} is not an origin; give the scheme'
    with pytest.raises(UserError, match=re.escape(message)):
        access_lib.Access(origins=(text,))


def test_welcome():
    """It says who may use the server, and which setting changes that."""

    def told(**options):
        access = access_lib.Access(**options)
        return server._welcome('bugs', 'http://a:1', access)

    assert 'warning' not in told() and 'token' not in told()
    text = told(loopback=False)
    assert 'warning: anyone who can reach this machine' in text
    assert '--token_file=FILE or FLAX_DENSENET_TOKEN' in text
    text = told(loopback=False, token=TOKEN)
    assert 'anyone' not in text and TOKEN not in text
    assert "curl -H 'Authorization: Bearer TOKEN' --data-binary" in text
    assert 'warning: the connection is not encrypted' in text
    assert 'requires the token' in text
    assert 'warning' not in told(token=TOKEN)
    assert 'pages of https://a.example may use it' in told(
        origins=('https://a.example',)
    )
    assert 'warning: pages of all sites may use it' in told(origins=('*',))


def test_log(guarded_port, port, caplog):
    """A line for each request, without what was sent; none where it is not asked."""
    caplog.set_level('INFO', request_log.__name__)
    body = form_of(('image', 'jane doe.jpg', JPEG))
    headers = FORM | SENT | {'Referer': 'http://localhost/jane'}

    def lines_of(port, count):
        caplog.clear()
        ask(port, '/predict?top=2&explain=map', body, headers=headers)
        ask(port, '/predict?top=2%0AX&jane=1', JPEG, headers=SENT)
        ask(port, '/jane.jpg?top=1', JPEG)
        ask(port, '/', headers={'Host': 'jane.example'})
        for _ in range(5 if count == 0 else 600):
            ask(port, '/health')
            # A line is written after its answer.
            found = [line for line in caplog.messages if ' /health ' not in line]
            if len(found) == count > 0:
                break
        return found

    size = len(body)
    expected = [
        r'GET / 403 \d+ ms, 0 bytes in, \d+ bytes out',
        rf'POST /predict\?top=2%0AX&\.\.\. 400 \d+ ms, {len(JPEG)} bytes in, \d+ bytes',
        rf'POST /predict\?top=2&explain=map 200 \d+ ms, {size} bytes in, \d{{3,}}',
        r'POST other\?top=1 401 \d+ ms, \d+ bytes in, \d+ bytes out',
    ]
    lines = [line.partition(' ') for line in lines_of(guarded_port, 4)]
    for (time, _, rest), pattern in zip(
        sorted(lines, key=lambda line: line[2]), expected, strict=True
    ):
        assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}', time)
        assert re.match(pattern, rest), rest
    assert not any(word in caplog.text for word in ('jane', TOKEN))
    assert lines_of(port, 0) == []
