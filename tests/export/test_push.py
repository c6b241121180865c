"""`push` shows what it would send, asks, and sends that to the Hub's own client."""

import io
import json
import re

import pytest

from flax_densenet.export import formats, release
from flax_densenet.weights import weight_file
from helpers import commands, file_hosts, runs, weight_files

FILES = ['README.md', 'config.json', 'model.safetensors']


@pytest.fixture
def push(host, monkeypatch, capfd):
    main = commands.make_main(monkeypatch, capfd)

    def run(*arguments, answer=None):
        stdin = io.StringIO(answer)
        stdin.isatty = lambda: answer is not None
        monkeypatch.setattr('sys.stdin', stdin)
        return main('push', *arguments)

    return run


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('push') / 'birds'
    trained = weight_files.trained_of(*weight_files.tiny())
    formats.save(str(folder), trained, 'huggingface')
    return folder


def test_a_folder_is_sent_and_comes_back(push, folder, host):
    status, out, err = push(folder, 'me/birds', '--yes')
    assert status == 0, err
    (name, files), = host.commits  # fmt: skip
    assert name == 'me/birds'
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert host.repos == {'me/birds': False}
    assert f'sent: {host.url}/me/birds/commit/{file_hosts.COMMIT}' in out
    assert f'to {host.url}/me/birds (new; public: anyone can see' in out
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert re.search(r'in all (\d+ bytes|[\d.]+ MB)', out) and total
    assert '  | # ' in out and '  | ---' in out  # the card and its header
    host.put_repo('me/birds', files)
    found = weight_file.load('hf:me/birds')
    weight_files.assert_same(found.variables, weight_files.tiny()[1])


@pytest.mark.parametrize(
    ('answer', 'sent'), [('y\n', 1), ('n\n', 0), ('\n', 0), ('', 0)]
)
def test_it_asks(answer, sent, push, folder, host):
    status, out, _ = push(folder, 'me/birds', '--private', answer=answer)
    assert len(host.commits) == sent and 'Upload it? [y/N]' in out
    assert status == 1 - sent and ('nothing was uploaded' in out) == (not sent)
    assert host.repos == ({'me/birds': True} if sent else {})


def test_a_model_is_exported_first(push, host, tmp_path, monkeypatch):
    def export(out, what, samples):  # without the process that verifies
        assert len(samples.images)
        formats.save(out, what.trained, what.file_format, what.options)

    monkeypatch.setattr(release, 'run', export)
    file = runs.make_weights(tmp_path / 'birds.safetensors', classes=5)
    status, out, err = push(file, 'me/birds', '--yes', '--license=mit')
    assert status == 0, err
    files = host.commits[0][1]
    assert sorted(files) == FILES and b'license: "mit"' in files['README.md']
    assert json.loads(files['config.json'])['num_classes'] == 5


def test_repositories_that_exist(push, folder, host):
    host.repos['me/birds'] = False
    status, _, err = push(folder, 'me/birds', '--yes', '--private')
    assert status == 2 and 'me/birds exists and is public; make it private' in err
    assert not host.commits
    status, out, _ = push(folder, 'me/birds', '--yes')
    assert status == 0 and '(exists; public' in out and len(host.commits) == 1
    host.repos['me/birds'] = True
    status, out, _ = push(folder, 'me/birds', '--yes')
    assert status == 0 and '(exists; private)' in out
    assert host.count('POST', '/api/repos/create') == 0


def test_only_the_folder_of_an_export_is_sent(push, folder, host, tmp_path):
    (tmp_path / 'secret.txt').write_text('password')
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    status, out, _ = push(tmp_path, 'me/birds', '--yes')
    assert status == 0 and 'not sent: ' in out and 'secret.txt' in out
    assert sorted(host.commits[0][1]) == FILES
    (tmp_path / 'README.md').unlink()
    status, _, err = push(tmp_path, 'me/birds', '--yes')
    assert status == 2 and 'has no README.md; write the folder with: export' in err


def test_mistakes(push, folder, host, monkeypatch):
    for arguments, line in (
        ((folder,), 'push needs a repository'),
        ((folder, 'me'), 'give the repository as OWNER/NAME'),
        ((folder, 'others/birds'), 'others/birds.*403'),
        ((folder, 'me/birds', '--license=mit'), 'edit its README.md'),
        ((folder / 'none', 'me/birds'), 'none'),
    ):
        status, _, err = push(*arguments, '--yes')
        assert status == 2 and re.search(line, err), err
        assert err.count('\n') == 1 and 'Traceback' not in err
    status, _, err = push(folder, 'me/birds')
    assert status == 2 and 'in a script, give --yes' in err
    monkeypatch.setenv('HF_TOKEN', 'hf_other')
    status, _, err = push(folder, 'me/birds', '--yes')
    assert status == 2 and 'log in with' in err
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    status, _, err = push(folder, 'me/birds', '--yes')
    assert status == 2 and 'HF_HUB_OFFLINE forbids' in err
    monkeypatch.delenv('HF_HUB_OFFLINE')
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
    status, _, err = push(folder, 'me/birds', '--yes')
    assert status == 2 and 'push needs a Hub token' in err
    assert not host.commits
