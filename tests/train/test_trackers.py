"""Trackers follow a run, take nothing from it when they fail, and are the real ones."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from flax_densenet import errors
from flax_densenet.errors import UserError
from flax_densenet.train import fit, tensorboard, trackers
from helpers.paths import ROOT
from helpers.runs import tiny_config

CONFIG = {'train.epochs': 2, 'model.variant': 'densenet121', 'data.mean': '(0.5,)'}

NAMES = ('wandb', 'mlflow', 'trackio')


class Fake:
    """A tracker that notes its calls; `fails` names a method that raises."""

    calls: list
    fails = ''

    def __getattr__(self, name):
        if name not in ('start', 'log', 'send', 'finish'):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, *arguments))
            if name == self.fails:
                raise ConnectionError('the network\nis down')
            return 'run-1'

        return call


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(Fake, 'calls', [], raising=False)
    monkeypatch.setitem(trackers.TRACKERS, 'wandb', Fake)
    monkeypatch.setattr(
        errors, 'is_installed', lambda *names: 'tensorboardX' not in names
    )
    return Fake


def test_names(fake, monkeypatch):
    assert trackers.parse(' wandb ,mlflow,wandb') == ['wandb', 'mlflow']
    with pytest.raises(UserError, match='comet is not known; use some of wandb,mlflow'):
        trackers.parse('wandb,comet')
    monkeypatch.setattr(errors, 'is_installed', lambda *names: False)
    with pytest.raises(UserError, match=r"pip install 'flax_densenet\[mlflow\]'"):
        trackers.parse('mlflow')


@pytest.mark.slow
def test_a_run_is_followed_and_continued(fake, tmp_path):
    config = tiny_config(**{'train.trackers': 'wandb', 'train.epochs': 1})
    folder = tmp_path / 'digits'
    result = fit.fit(config, str(folder))
    names = [call[0] for call in fake.calls]
    assert names == ['start', 'log', 'finish']
    about, step, metrics = fake.calls[0][1], *fake.calls[1][1:]
    assert (about.name, about.group, about.identity) == ('digits', '', None)
    assert about.config['train.epochs'] == 1 and about.config['data.source'] == 'digits'
    record = json.loads((folder / 'metrics.jsonl').read_text())
    assert step == record['step'] and metrics['epoch'] == 1
    assert metrics['accuracy/test'] == record['test_accuracy']
    assert fake.calls[2] == ('finish', False)
    fake.calls.clear()
    result.send_files()
    assert [call[0] for call in fake.calls] == ['start', 'send', 'finish']
    assert fake.calls[0][1].identity == 'run-1'
    files, best = fake.calls[1][1:]
    assert {'config.json', 'metrics.jsonl'} <= set(map(os.path.basename, files))
    assert os.path.isdir(best) and os.path.dirname(best) == str(folder / 'checkpoints')
    fake.calls.clear()
    dataclasses.replace(result, trained=False).send_files()  # they were sent before
    assert not fake.calls


@pytest.mark.parametrize('method', ['start', 'log', 'finish'])
def test_failures_end_nothing(method, fake, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fake, 'fails', method)
    with trackers.open_trackers(str(tmp_path), ['wandb'], CONFIG) as tracked:
        tracked.call('log', 1, {'a': 1.0})
        tracked.call('log', 2, {'a': 1.0})
    line = capfd.readouterr().out
    assert line.count('warning: wandb failed (the network is down) and gets') == 1
    counts = {'start': 1, 'log': 2, 'finish': 4}
    assert len(fake.calls) == counts[method]


def test_an_error_of_the_run_is_told(fake, tmp_path):
    with (
        pytest.raises(KeyError),
        trackers.open_trackers(str(tmp_path), ['wandb'], CONFIG),
    ):
        raise KeyError
    assert fake.calls[-1] == ('finish', True)


def test_runs_of_a_sweep_are_grouped(fake, tmp_path):
    folder = tmp_path / 'sweep' / 'trials' / '001' / 'seed0'
    folder.mkdir(parents=True)
    (tmp_path / 'sweep' / 'sweep.json').write_text('{}')
    with trackers.open_trackers(str(folder), ['wandb'], CONFIG):
        about = fake.calls[0][1]
    assert (about.name, about.group) == ('trials/001/seed0', 'sweep')


@pytest.mark.parametrize(('part', 'other'), [('test', 'val'), ('val', 'test')])
def test_metrics_have_the_names_of_tensorboard(part, other):
    names = tensorboard.SCALARS.values()
    record = {name: 0.5 for name in names if not name.startswith(other)}
    record |= {'epoch': 3, f'{part}_auroc': {'cat': 0.9}, 'memory_gib': None}
    record[f'{part}_mean_auroc'] = 0.8
    found = trackers.metrics_of(record)
    assert found.pop('auroc/cat') == 0.9 and found.pop('epoch') == 3
    assert found.pop('auroc/mean') == 0.8 and found['accuracy/train'] == 0.5
    missing = {'speed/memory_gib', f'accuracy/{other}', f'loss/{other}'}
    assert found.keys() == tensorboard.SCALARS.keys() - missing


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run of a sweep; the user's home is empty."""
    folder = tmp_path / 'sweep' / 'trials' / '001' / 'seed0'
    (folder / 'checkpoints' / '8').mkdir(parents=True)
    (folder / 'checkpoints' / '8' / 'arrays.bin').write_bytes(b'arrays')
    (folder / 'report.html').write_text('report')
    (tmp_path / 'sweep' / 'sweep.json').write_text('{}')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tmp_path / 'home').mkdir()
    for name in ('WANDB_API_KEY', 'WANDB_MODE', 'MLFLOW_TRACKING_URI'):
        monkeypatch.delenv(name, raising=False)
    return folder


def follow(name, folder):
    """Two stretches of a run, then its files."""
    for step, loss in ((4, 1.5), (8, 0.5)):
        with trackers.open_trackers(str(folder), [name], CONFIG) as tracked:
            tracked.call('log', step, {'loss/test': loss})
            assert tracked._trackers, 'it failed'
    with trackers.open_trackers(str(folder), [name], CONFIG) as tracked:
        tracked.call(
            'send', [str(folder / 'report.html')], str(folder / 'checkpoints' / '8')
        )
        assert tracked._trackers, 'it failed'
    return json.loads((folder / trackers.FILE).read_text())[name]


def check_mlflow(client, identity):
    found = client.get_run(identity)
    assert found.info.status == 'FINISHED'
    assert found.data.params == {k: str(v) for k, v in CONFIG.items()}
    history = client.get_metric_history(identity, 'loss/test')
    assert [(m.step, m.value) for m in history] == [(4, 1.5), (8, 0.5)]
    assert {f.path for f in client.list_artifacts(identity)} == {'best', 'report.html'}
    parent = client.get_run(found.data.tags['mlflow.parentRunId'])
    assert parent.info.run_name == 'sweep'


@pytest.mark.slow
def test_mlflow_without_a_server(run, tmp_path):
    mlflow = pytest.importorskip('mlflow')
    identity = follow('mlflow', run)
    client = mlflow.MlflowClient(tracking_uri=f'sqlite:///{tmp_path}/mlflow.db')
    check_mlflow(client, identity)
    kept = tmp_path / 'mlartifacts' / identity / 'artifacts' / 'best' / 'arrays.bin'
    assert kept.read_bytes() == b'arrays'


@pytest.mark.slow
def test_mlflow_in_a_folder(run, tmp_path, monkeypatch, capfd):
    """The store of files, which MLflow wants to be asked for."""
    mlflow = pytest.importorskip('mlflow')
    address = (tmp_path / 'mlruns').as_uri()
    monkeypatch.setenv('MLFLOW_TRACKING_URI', address)
    monkeypatch.delenv('MLFLOW_ALLOW_FILE_STORE', raising=False)
    with trackers.open_trackers(str(run), ['mlflow'], CONFIG):
        pass
    assert f'{address} is a folder' in capfd.readouterr().out
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    identity = follow('mlflow', run)
    check_mlflow(mlflow.MlflowClient(tracking_uri=address), identity)
    kept = list((tmp_path / 'mlruns').rglob('arrays.bin'))
    assert [path.read_bytes() for path in kept] == [b'arrays']


@pytest.mark.slow
def test_mlflow_with_a_server(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    port = 20000 + os.getpid() % 10000
    address = f'http://127.0.0.1:{port}'
    server = subprocess.Popen(
        [
            *(sys.executable, '-m', 'mlflow', 'server', '--port', str(port)),
            *('--backend-store-uri', f'sqlite:///{tmp_path}/server.db'),
            *('--artifacts-destination', str(tmp_path / 'server'), '--workers', '1'),
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        import requests

        for _ in range(240):
            try:
                requests.get(f'{address}/health', timeout=2).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.5)
        monkeypatch.setenv('MLFLOW_TRACKING_URI', address)
        identity = follow('mlflow', run)
        check_mlflow(mlflow.MlflowClient(tracking_uri=address), identity)
        assert list((tmp_path / 'server').rglob('arrays.bin'))
        assert not (tmp_path / 'mlflow.db').exists()
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its workers, too
        server.wait(30)


@pytest.mark.slow
def test_wandb_offline(run, capfd):
    pytest.importorskip('wandb')
    identity = follow('wandb', run)
    out, err = capfd.readouterr()
    assert f'`wandb sync {run}/wandb/offline-run-*`' in out and out.count('\n') == 1
    assert not err
    stretches = sorted((run / 'wandb').glob(f'offline-run-*-{identity}'))
    assert len(stretches) == 3
    first, second, last = (next(folder.glob('*.wandb')) for folder in stretches)
    for _ in range(120):  # another process of wandb writes it
        if b'arrays.bin' in last.read_bytes():
            break
        time.sleep(0.5)
    assert b'report.html' in last.read_bytes() and b'arrays.bin' in last.read_bytes()
    assert b'loss/test' in first.read_bytes() and b'loss/test' in second.read_bytes()
    assert b'sweep' in first.read_bytes()


def test_runs_that_never_started_get_no_files(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(fake, 'fails', 'start')
    with trackers.open_trackers(str(tmp_path), ['wandb'], CONFIG):
        pass
    fake.calls.clear()
    trackers.send_files(str(tmp_path), ['wandb'], CONFIG)
    assert not fake.calls


@pytest.mark.slow
def test_wandb_without_a_network(run, monkeypatch, capfd):
    """With a key, but no server: the run is kept on this machine."""
    wandb = pytest.importorskip('wandb')
    monkeypatch.setattr(trackers, '_has_wandb_login', lambda: True)
    modes = []

    def init(mode, **options):
        modes.append(mode)
        if mode != 'offline':
            raise wandb.errors.CommError('the network\nis down')
        return made(mode=mode, **options)

    made = wandb.init
    monkeypatch.setattr(wandb, 'init', init)
    follow('wandb', run)
    assert modes == [None, 'offline'] * 3
    line = 'warning: wandb: the network is down; so the run is kept in '
    assert line in capfd.readouterr().out
    assert len(list((run / 'wandb').glob('offline-run-*'))) == 3


@pytest.mark.slow
def test_login_of_wandb(run, tmp_path, monkeypatch):
    """Each place of a key, without a connection."""
    pytest.importorskip('wandb')
    code = 'from flax_densenet.train import trackers as t; print(t._has_wandb_login())'

    def logged_in(**environment):
        done = subprocess.run(
            [sys.executable, '-c', code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {'PYTHONPATH': str(ROOT), **environment},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1] == 'True'

    assert not logged_in()
    assert logged_in(WANDB_API_KEY='a' * 40)
    entry = 'machine {}\n  login user\n  password ' + 'a' * 40
    netrc = tmp_path / 'home' / '.netrc'
    netrc.write_text(entry.format('api.wandb.ai'))
    assert logged_in() and not logged_in(WANDB_BASE_URL='https://wandb.example')
    netrc.write_text(entry.format('wandb.example'))
    assert logged_in(WANDB_BASE_URL='https://wandb.example') and not logged_in()


@pytest.mark.slow
def test_trackio_on_this_machine(run, tmp_path):
    """In a process of its own, since Trackio finds its folder when it is imported."""
    pytest.importorskip('trackio')
    code = (
        'import sys, pathlib; from importlib import util; '
        'from flax_densenet.system import logs; logs.show_messages(); '
        'spec = util.spec_from_file_location("t", sys.argv[2]); '
        't = util.module_from_spec(spec); spec.loader.exec_module(t); '
        't.follow("trackio", pathlib.Path(sys.argv[1]))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, run, __file__],
        capture_output=True,
        text=True,
        env=os.environ | {'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'},
    )
    assert done.returncode == 0, done.stderr
    line = r'trackio: the run is kept in \S+; to see it: `trackio show --project \w+`\n'
    assert re.fullmatch(line, done.stdout) and not done.stderr, done
    kept = list((tmp_path / 'home').rglob('arrays.bin'))
    assert len(kept) == 1 and re.search('trackio', str(kept[0]))
    assert list((tmp_path / 'home').rglob('report.html'))
