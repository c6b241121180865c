"""The flags of `serve` for access and log, from the command line to the server."""

import pytest

from flax_densenet.serving import server
from flax_densenet.weights import precision as precision_lib
from flax_densenet.weights import trained as trained_lib
from helpers.commands import make_main
from helpers.servers import TOKEN, make_trained

pytest.importorskip('starlette')
pytest.importorskip('hypercorn')


@pytest.fixture
def serve(monkeypatch, capfd, tmp_path):
    """Runs the command up to the server; gives its status, errors and what it got."""
    served = {}

    def run(trained, listener, **options):
        listener.close()
        served.update(options)

    (tmp_path / 'x.safetensors').write_bytes(b'')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('FLAX_DENSENET_TOKEN', raising=False)
    monkeypatch.setattr(trained_lib, 'load_trained', lambda *_, **__: make_trained())
    monkeypatch.setattr(precision_lib, 'resolve', lambda trained, *_: trained)
    monkeypatch.setattr(server, 'run', run)
    main = make_main(monkeypatch, capfd)

    def serve(*flags):
        served.clear()
        status, _, err = main('serve', 'x.safetensors', '--port=0', *flags)
        return status, err, dict(served)

    return serve


def test_flags_reach_the_server(serve, monkeypatch, tmp_path):
    status, err, served = serve()
    assert status == 0, err
    access = served['access']
    assert (access.token, access.origins) == (None, ())
    assert served['log_requests'] is False
    (tmp_path / 'token').write_text(TOKEN + '\n')
    monkeypatch.setenv('FLAX_DENSENET_TOKEN', 'x' * 20)
    flags = '--allow_origin=https://a.example,https://b.example', '--log_requests'
    _, _, served = serve('--token_file=token', *flags)
    assert served['access'].token == TOKEN
    assert served['access'].origins == ('https://a.example', 'https://b.example')
    assert served['log_requests'] is True
    assert serve()[2]['access'].token == 'x' * 20


def test_mistakes_are_one_line(serve, monkeypatch):
    for flag, message in [
        ('--token_file=none', 'none cannot be read: no such file or directory'),
        ('--token_file=', '--token_file= is empty; name a file with the token'),
        ('--allow_origin=a.example', '--allow_origin=a.example is not an origin;'),
    ]:
        status, err, served = serve(flag)
        assert (status, served) == (2, {})
        assert message in err and err.count('\n') == 1
    monkeypatch.setenv('FLAX_DENSENET_TOKEN', '')
    status, err, served = serve()
    assert (status, served) == (2, {}) and 'FLAX_DENSENET_TOKEN is empty;' in err
    # The value could be a secret, and is not repeated.
    status, err, _ = serve('--token=my-secret')
    assert status == 2 and 'my-secret' not in err
