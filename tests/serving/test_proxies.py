"""The server behind a proxy, and which hosts it answers to."""

import re

import pytest

from flax_densenet.errors import UserError
from flax_densenet.serving import access as access_lib
from flax_densenet.serving import guard, server
from helpers.servers import JPEG, ask, running

pytest.importorskip('starlette')
pytest.importorskip('hypercorn')
pytest.importorskip('prometheus_client')
pytest.importorskip('python_multipart')


def test_open_to_others(trained, monkeypatch):
    """On other addresses any name is answered, and a warning says what that means."""
    with server.listen('0.0.0.0', 0) as listener:
        assert not server.is_loopback(listener)
        access = server.make_access(listener, (), '')
        told = server._welcome('bugs', server.address_of(listener), access)
    assert 'warning: anyone who can reach this machine' in told
    told = server._welcome('bugs', 'http://127.0.0.1:1', access_lib.Access())
    assert 'warning' not in told
    monkeypatch.setattr(server, 'is_loopback', lambda listener: False)
    with running(trained) as port:
        assert ask(port, '/health', headers={'Host': 'a.example'}).status == 200


def test_addresses_of_the_page_are_relative(port):
    text = ask(port, '/').body.decode()
    assert not re.search(r"""(href|src|action)=["']?/|fetch\(["'`]/""", text)
    assert [f'<a href="{name}">' in text for name in ('model', 'health')] == [True] * 2


@pytest.mark.parametrize(
    ('host', 'status'),
    [
        ('hub.example.org', 200),
        ('HUB.example.org:443', 200),
        ('a.lab.example', 200),
        ('a.b.lab.example:1', 200),
        ('other.example:8443', 200),
        ('localhost', 200),
        ('127.0.0.1:8000', 200),
        ('other.example', 403),
        ('lab.example.evil.example', 403),
        ('evil-lab.example', 403),
        ('hub.example.org.evil.example', 403),
        ('', 403),
    ],
)
def test_allowed_hosts(proxied_port, host, status):
    assert ask(proxied_port, '/health', headers={'Host': host}).status == status


def test_allowed_hosts_on_all_addresses(trained, monkeypatch):
    """Where some are named, no other is answered to."""
    monkeypatch.setattr(server, 'is_loopback', lambda listener: False)
    with running(trained, hosts=('hub.example',)) as port:
        for host, status in ('hub.example', 200), ('a.example', 403):
            assert ask(port, '/health', headers={'Host': host}).status == status


@pytest.mark.parametrize(
    ('origin', 'status'),
    [
        ('https://hub.example.org', 200),  # the proxy put localhost as Host
        ('https://evil.example', 403),
        ('null', 403),
        ('http://[', 403),
    ],
)
def test_origin_behind_a_proxy(proxied_port, origin, status):
    assert ask(proxied_port, '/predict', JPEG, headers={'Origin': origin}).status == (
        status
    )


def test_every_host_is_not_every_page():
    access = access_lib.Access(allowed_hosts=('*',))
    assert access.is_allowed('any.example')
    around = guard.RequestGuard(None, figures=None, access=access)
    assert around._is_own('https://a.example', 'a.example')
    assert not around._is_own('https://evil.example', 'a.example')


def test_root_path(proxied_port):
    """Whether or not the proxy takes its path off; metrics count the same path."""
    for path in '/health', '/user/one/health':
        assert ask(proxied_port, path).json == {'status': 'ok'}
    assert ask(proxied_port, '/user/one/predict', JPEG).status == 200
    assert 'What does the model see' in ask(proxied_port, '/user/one/').body.decode()
    answer = ask(proxied_port, '/user/one')
    assert (answer.status, answer.headers['Location']) == (307, 'one/')
    assert ask(proxied_port, '/user/onehealth').status == 404
    counted = ask(proxied_port, '/user/one/metrics').body.decode()
    assert 'requests_total{path="/health",status="200"}' in counted


@pytest.mark.parametrize('text', ['http://a.example', 'a b', 'a/b', '*a', 'a@b'])
def test_what_is_no_host(text):
    with pytest.raises(UserError, match=re.escape(f'--allowed_hosts={text} is no')):
        access_lib.Access(allowed_hosts=(text,))


@pytest.mark.parametrize('text', ['https://a.example/x', '/x?y', 'x#y', 'a\nb'])
def test_what_is_no_root_path(text):
    with pytest.raises(UserError, match='--root_path='):
        access_lib.Access(root_path=text)
    assert access_lib.Access(root_path='/').root_path == ''


def test_welcome_behind_a_proxy():
    access = access_lib.Access(allowed_hosts=('hub.example',), root_path='/user/one')
    told = server._welcome('bugs', 'http://127.0.0.1:1', access)
    assert 'its page is at /user/one/' in told
    assert 'accepts the names hub.example and localhost' in told
