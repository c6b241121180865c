"""Files of weights arrive complete or not at all, once, and never over plain http."""

import hashlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from flax_densenet.errors import UserError
from flax_densenet.weights import download
from helpers.paths import ROOT

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
SHA256 = download.Checksum('sha256', DIGEST)


def fails(line, url, **options):
    with pytest.raises(UserError, match=line) as caught:
        download.fetch(url, **options)
    text = str(caught.value)
    assert '\n' not in text
    assert not os.path.exists(download.place_of(url))
    return text


def test_file_arrives_once(host, capfd):
    url = host.put('/models/a-b.pth', CONTENT)
    path = download.fetch(url, checksum=SHA256)
    assert path == download.place_of(url) and path.endswith('/models/a-b.pth')
    assert pathlib.Path(path).read_bytes() == CONTENT
    assert download.fetch(url, checksum=SHA256) == path
    assert host.count('GET') == 1
    assert sorted(os.listdir(os.path.dirname(path))) == ['a-b.pth', 'a-b.pth.lock']
    out = capfd.readouterr()
    assert f'downloading {url} to {path}' in out.out and '%|' not in out.err


@pytest.mark.parametrize(
    'checksum',
    [
        download.Checksum('sha256', DIGEST[:8]),
        download.Checksum('md5', hashlib.md5(CONTENT).hexdigest()),
    ],
    ids=['first digits', 'md5'],
)
def test_other_checksums(checksum, host):
    url = host.put('/a', CONTENT)
    download.fetch(url, checksum=checksum)
    wrong = download.Checksum(checksum.kind, '0' * len(checksum.digits))
    with pytest.raises(UserError, match='is not the file of .* remove it'):
        download.fetch(url, checksum=wrong)


@pytest.mark.parametrize('resumes', [True, False])
def test_resumes_after_cuts(resumes, host):
    url = host.put('/a', CONTENT, cuts=[1000, 70000, 300], ranges=resumes)
    path = download.fetch(url, checksum=SHA256)
    assert pathlib.Path(path).read_bytes() == CONTENT
    ranges = [h.get('Range') for m, p, h in host.requests]
    assert ranges[:2] == [None, 'bytes=1000-'] and len(ranges) == 4
    if resumes:
        assert ranges[2:] == ['bytes=71000-', 'bytes=71300-']


def test_next_call_resumes(host):
    url = host.put('/a', CONTENT, cuts=[100] * download.ATTEMPTS)
    line = fails('the next call resumes', url, checksum=SHA256)
    assert f'{host.url[7:]} ended the connection too early, in 5 attempts; ' in line
    assert f'put it at {download.place_of(url)}' in line
    assert host.count('GET') == download.ATTEMPTS
    assert os.path.getsize(f'{download.place_of(url)}.part') == 500
    download.fetch(url, checksum=SHA256)
    assert host.requests[-1][2]['Range'] == 'bytes=500-'


def test_file_that_changes_meanwhile(host):
    """If-Range makes the server send the new one; without a tag the checksum tells."""
    url = host.put('/a', b'old' * 9000, cuts=[600] * download.ATTEMPTS)
    fails('resumes', url, checksum=SHA256)
    host.put('/a', CONTENT, etag='"two"')
    path = download.fetch(url, checksum=SHA256)
    assert pathlib.Path(path).read_bytes() == CONTENT
    url = host.put('/unknown', b'old' * 9000, cuts=[600] * download.ATTEMPTS)
    fails('resumes', url)
    host.put('/unknown', CONTENT, etag='"two"')
    assert pathlib.Path(download.fetch(url)).read_bytes() == CONTENT
    url = host.put('/b', b'old' * 9000, cuts=[600] * download.ATTEMPTS, etag=None)
    fails('resumes', url, checksum=SHA256)
    host.put('/b', CONTENT, etag=None)
    path = download.fetch(url, checksum=SHA256)
    assert pathlib.Path(path).read_bytes() == CONTENT
    url = host.put('/c', bytes(10**6), cuts=[60000] * download.ATTEMPTS, etag=None)
    fails('resumes', url, checksum=SHA256)
    host.put('/c', CONTENT, etag=None)  # shorter than what is there: status 416
    assert os.path.getsize(f'{download.place_of(url)}.part') > len(CONTENT)
    path = download.fetch(url, checksum=SHA256)
    assert pathlib.Path(path).read_bytes() == CONTENT


def test_without_checksum_the_first_download_counts(host, capfd):
    url = host.put('/a', CONTENT)
    path = download.fetch(url)
    assert f'its SHA-256 is {DIGEST}' in capfd.readouterr().out
    assert download.fetch(url) == path
    pathlib.Path(path).write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=f'at first it was {DIGEST}; remove it'):
        download.fetch(url)


def test_wrong_checksum(host):
    url = host.put('/a', CONTENT[:-1] + b'x')
    line = fails('is not kept', url, checksum=SHA256)
    assert DIGEST in line
    assert not os.path.exists(f'{download.place_of(url)}.part')
    assert host.count('GET') == 1


@pytest.mark.parametrize(
    ('status', 'line'),
    [
        (404, 'answers 404 .*check the address'),
        (410, 'answers 410'),
        (401, r'refuses it \(401.*needs a login'),
        (403, r'refuses it \(403'),
    ],
)
def test_refusals(status, line, host):
    fails(line, host.put('/a', CONTENT, statuses=[status]), checksum=SHA256)
    assert host.count('GET') == 1


def test_busy_servers_are_asked_again(host):
    url = host.put('/a', CONTENT, statuses=[503, 429, 500])
    download.fetch(url, checksum=SHA256)
    assert host.count('GET') == 4
    url = host.put('/b', CONTENT, statuses=[503] * download.ATTEMPTS)
    fails('answers 503', url, checksum=SHA256)


def test_no_network(host):
    line = fails('cannot be reached', 'http://127.0.0.1:9/a/b.pth', checksum=SHA256)
    assert download.place_of('http://127.0.0.1:9/a/b.pth') in line
    assert '(Failed to establish a new connection: ' in line and 'refused' in line
    line = fails('cannot be reached', 'https://no-such-host.invalid/b', size=9)
    assert 'download it elsewhere and put it at' in line


def test_proxies_of_the_environment(host, monkeypatch):
    for name in ('NO_PROXY', 'no_proxy', 'http_proxy', 'https_proxy'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HTTP_PROXY', host.url)
    monkeypatch.setenv('HTTPS_PROXY', host.url)
    url = 'http://127.0.0.1:9/a'
    host.put(url, CONTENT)
    assert pathlib.Path(download.fetch(url)).read_bytes() == CONTENT
    url = 'https://no-such-host.invalid/b'
    fails('cannot be reached .*Tunnel connection failed: 407', url)
    assert host.requests[-1][:2] == ('CONNECT', 'no-such-host.invalid:443')
    asked = len(host.requests)
    monkeypatch.setenv('NO_PROXY', 'no-such-host.invalid')
    fails('cannot be reached .*resolve', url)
    assert len(host.requests) == asked


def test_files_put_there_by_hand(host):
    url = 'https://no-such-host.invalid/models/b.pth'
    path = pathlib.Path(download.place_of(url))
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert download.fetch(url, checksum=SHA256) == str(path)
    assert download.fetch(url) == str(path)


def test_offline(host, monkeypatch):
    url = host.put('/a', CONTENT)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    fails('HF_HUB_OFFLINE forbids', url, checksum=SHA256)
    assert not host.requests
    monkeypatch.delenv('HF_HUB_OFFLINE')
    download.fetch(url, checksum=SHA256)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    download.fetch(url, checksum=SHA256)


@pytest.mark.parametrize(
    'url', ['http://example.com/a', 'ftp://example.com/a', 'https:///a', 'file:///a']
)
def test_only_https(url, host):
    fails('which is not https', url, checksum=SHA256)


def test_redirects(host):
    url = host.put('/a', redirect='/b')
    host.put('/b', CONTENT)
    download.fetch(url, checksum=SHA256)
    fails(
        r'redirects to http://example\.com/a, which is not https',
        host.put('/c', redirect='http://example.com/a'),
        checksum=SHA256,
    )
    fails('redirects', host.put('/d', redirect='/d'), checksum=SHA256)
    with pytest.raises(UserError, match='not https'):
        download._check_address(f'{host.url}/b', 'https://example.com/a')


def test_sizes(host):
    url = host.put('/a', CONTENT, announced=10**9)
    fails('announces 1000000000 bytes, where about 256000 are', url, size=256000)
    assert host.count('GET') == 1
    # What comes after the announced length is never read.
    url = host.put('/b', CONTENT + b'more', announced=len(CONTENT))
    download.fetch(url, checksum=SHA256)
    url = host.put('/c', CONTENT, announced=1000)
    fails('is not kept', url, checksum=SHA256)


def test_truncated_answers_that_look_complete(host):
    url = host.put('/a', CONTENT[:1000], announced='')
    fails('is not kept', url, checksum=SHA256)
    url = host.put('/b', CONTENT, announced='')
    download.fetch(url, checksum=SHA256)


def test_answers_that_announce_more_than_they_send(host, monkeypatch):
    """The server holds the connection: it was reached, and sends no more."""
    monkeypatch.setattr(download, 'TIMEOUT', 0.1)
    monkeypatch.setattr(download, 'ATTEMPTS', 2)
    url = host.put('/a', CONTENT[:900], announced=1000)
    line = fails('sent nothing for 0.1 seconds .*, in 2 attempts', url, checksum=SHA256)
    assert 'cannot be reached' not in line


def test_endless_answers(host, monkeypatch):
    url = host.put('/a', endless=True, announced='')
    fails('sends more than .* bytes, where about 10', url, size=10)
    monkeypatch.setattr(download, 'LARGEST', 10**6)
    url = host.put('/b', endless=True, announced='')
    fails('sends more than 1000000 bytes, where 1000000 are the limit', url)
    assert os.path.getsize(f'{download.place_of(url)}.part') == 0


def test_slow_servers(host, monkeypatch):
    """Slow is fine; nearly standing still is an interruption."""
    url = host.put('/a', CONTENT, pause=0.01, piece=64000)
    download.fetch(url, checksum=SHA256)
    monkeypatch.setattr(download, 'SLOWEST', (10**6, 0.02))
    monkeypatch.setattr(download, 'ATTEMPTS', 2)
    monkeypatch.setattr(download, '_CHUNK', 1000)
    url = host.put('/b', CONTENT, pause=0.03, piece=2000)
    fails('nearly stopped sending, in 2 attempts', url, checksum=SHA256)
    monkeypatch.setattr(download, 'SLOWEST', (0, 600))
    monkeypatch.setattr(download, 'TIMEOUT', 0.1)
    gate = threading.Event()
    url = host.put('/c', CONTENT, gate=gate, piece=2000)
    fails('timed out.*in 2 attempts', url, checksum=SHA256)
    gate.set()


CODE = (
    'import logging, sys; logging.basicConfig(level="INFO", format="%(message)s"); '
    'from flax_densenet.weights import download as d; '
    'd.fetch(sys.argv[1], checksum=d.Checksum("sha256", sys.argv[2]))'
)


def start(url):
    return subprocess.Popen(
        [sys.executable, '-c', CODE, url, DIGEST],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(happened):
    for _ in range(600):
        if happened():
            return
        time.sleep(0.05)
    raise AssertionError('it did not happen')


@pytest.mark.slow
def test_processes_take_turns_and_one_is_killed(host):
    """The second waits for the first, and goes on where that was killed."""
    gate = threading.Event()
    url = host.put('/a', CONTENT, gate=gate, piece=2000)
    part = f'{download.place_of(url)}.part'
    first = start(url)
    # Small pieces wait in the buffer of a file.
    wait_until(lambda: host.count('GET') == 1 and os.path.exists(part))
    second = start(url)
    line = ''
    while 'another process is downloading' not in line:
        line = second.stderr.readline()
        assert line, 'it ended'
    assert host.count('GET') == 1
    first.send_signal(signal.SIGKILL)
    first.wait()
    gate.set()
    assert second.wait(30) == 0 and host.count('GET') == 2
    assert pathlib.Path(download.place_of(url)).read_bytes() == CONTENT
    first.stderr.close()
    second.stderr.close()


def test_cache_that_cannot_be_written(host, monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    with pytest.raises(UserError, match='cannot be written .*set XDG_CACHE_HOME'):
        download.fetch(host.put('/a', CONTENT), checksum=SHA256)


def test_places_stay_in_the_cache(monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', '/cache')
    place = download.place_of
    assert place('https://h.org/a/../../b') == '/cache/flax_densenet/weights/h.org/a/b'
    assert re.fullmatch(r'.*/h\.org_80/a-\w{8}', place('https://h.org:80/a?x=1'))
    assert place('https://h.org/a?x=1') != place('https://h.org/a?x=2')
