"""Published weights by name: what is served is what is loaded, with what is known."""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import time

import jax
import numpy as np
import pytest

import flax_densenet
from configs import base
from flax_densenet import settings
from flax_densenet.errors import UserError
from flax_densenet.export import formats
from flax_densenet.inference import check
from flax_densenet.models import factory
from flax_densenet.train import prepare
from flax_densenet.weights import (
    download,
    heads,
    published,
    published_table,
    weight_file,
)
from helpers import commands, file_hosts, weight_files
from helpers.paths import ROOT

OUTPUTS = {'ImageNet': 1000, 'findings': 18, 'none': 0}


@pytest.fixture
def main(monkeypatch, capfd):
    return commands.make_main(monkeypatch, capfd)


def change(monkeypatch, name, **fields):
    """Puts an entry with other fields into the table."""
    changed = published.WeightsTable(
        dataclasses.replace(entry, **fields) if entry.name == name else entry
        for entry in published.TABLE
    )
    monkeypatch.setattr(published, 'TABLE', changed)


@pytest.fixture
def serve(host, monkeypatch, tmp_path):
    """Puts bytes, or a file of arrays, where an entry of the table points to."""

    def put(name, content, **how):
        if not isinstance(content, bytes):
            path = weight_files.write_safetensors(tmp_path / 'served', content)
            content = pathlib.Path(path).read_bytes()
        entry = published.find(name)
        url = host.put('/' + entry.address.rpartition('/')[2], content, **how)
        (tmp_path / 'digest').write_bytes(content)
        digits = download.digest(tmp_path / 'digest')[:8]
        checksum = download.Checksum('sha256', digits)
        change(monkeypatch, name, address=url, checksum=checksum, size=None)
        return url

    return put


@pytest.fixture(scope='module')
def of_imagenet():
    """Arrays with torchvision's names, of a small network with 1000 outputs."""
    return weight_files.state_dict(num_classes=1000)


def test_table_is_consistent():
    names = [entry.name for entry in published.TABLE]
    assert len(set(names)) == len(names) >= 24
    for entry in published.TABLE:
        module = factory.create_model(entry.variant, num_classes=OUTPUTS[entry.classes])
        channels = entry.preparation['channels']
        kernel = 7 * 7 * 64 * (3 - channels)  # of the first convolution
        assert entry.parameters == module.count_parameters() - kernel
        assert len(entry.class_names or ()) == OUTPUTS[entry.classes]
        assert len(entry.preparation['mean']) == channels
        assert (entry.accuracy is None) == (entry.accuracy_source is None)
        assert published.find(entry.name) is entry
        if not entry.name.startswith('hf:'):
            assert re.match(r'https://[\w.]+/.*[^/]$', entry.address)
        if entry.size:  # float32 and little else
            assert 0.98 < entry.size / (4 * entry.parameters) < 1.05
        # No published file was ever seen by this project.
        assert entry.fingerprint is None
    assert all(
        published.find(full).variant == n for n, full in published.DEFAULTS.items()
    )
    kinds = [entry.checksum.kind for entry in published.TABLE[:10]]
    assert kinds == ['sha256'] * 4 + ['md5'] * 6


@pytest.mark.parametrize('name', ['torchvision', 'keras', 'torchxrayvision'])
def test_preparation_is_the_readers(name):
    kind = {'torchxrayvision': 'xrv'}.get(name, name)
    usual = weight_file.PREPROCESSING[name]
    found = published.list_weights(f'{kind}:')
    assert found and all(entry.preparation == usual for entry in found)


def test_page_has_the_table():
    """docs/pretrained.md is what `weights --markdown` prints."""
    page = (ROOT / 'docs' / 'pretrained.md').read_text(encoding='utf-8')
    assert published_table.format_markdown(published.TABLE) in page


@pytest.mark.parametrize('name', ['torchvision:densenet121', 'densenet121'])
def test_load_by_name(name, serve, of_imagenet, host, capfd):
    serve('torchvision:densenet121', of_imagenet)
    weights = weight_file.load(name)
    assert weights.path == 'torchvision:densenet121'
    assert weights.class_names == heads.find_known(1000, channels=3).class_names
    assert weights.outputs == heads.SOFTMAX
    assert weights.preprocessing == weight_file.PREPROCESSING['torchvision']
    lines = capfd.readouterr().out
    assert ('densenet121 means torchvision:densenet121' in lines) == (':' not in name)
    weight_file.load(name)
    assert host.count('GET') == 1


def test_predictor_by_name(serve, of_imagenet, capfd):
    """All that a stranger's file leaves open is known of a published one."""
    serve('torchvision:densenet121', of_imagenet)
    model = flax_densenet.load('torchvision:densenet121')
    assert model.class_names[0] == 'tench' and not model.multi_label
    assert model.preparation.crop_fraction == 0.875
    assert 'assumed' not in capfd.readouterr().out


def test_findings_by_name(serve):
    arrays = weight_files.state_dict(num_classes=18, channels=1)
    serve('xrv:densenet121-res224-nih', arrays)
    weights = weight_file.load('xrv:densenet121-res224-nih')
    assert weights.class_names[13:15] == ('Hernia', 'Lung Lesion (not trained)')
    assert weights.outputs == heads.SIGMOID
    assert weights.preprocessing['mean'] == (0.5,)


def test_another_network_under_the_name(serve, host):
    arrays = weight_files.state_dict(num_classes=5)
    serve('torchvision:densenet121', arrays)
    with pytest.raises(UserError, match='has 5 outputs, but .* has 1000; remove it'):
        weight_file.load('torchvision:densenet121')
    serve('torchvision:densenet169', arrays)
    with pytest.raises(UserError, match='densenet121, but .*169 is a densenet169'):
        weight_file.load('torchvision:densenet169')


def test_downloaded_pickles_run_nothing(serve, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    serve('torchvision:densenet121', pickle.dumps({'a': Evil()}, protocol=2))
    with pytest.raises(UserError):
        weight_file.load('torchvision:densenet121')
    assert not (tmp_path / 'ran').exists()


def test_address_with_checksum(host, of_imagenet, tmp_path):
    path = weight_files.write_safetensors(tmp_path / 'served', of_imagenet)
    url = host.put('/mine.bin', pathlib.Path(path).read_bytes())
    name = f'{url}#sha256={download.digest(path).upper()}'
    found = weight_file.load(name)
    assert found.path == url and found.num_classes == 1000
    for wrong in (url, f'{url}#sha256=12', f'{url}#md5={"0" * 32}'):
        with pytest.raises(UserError, match='end it with #sha256=DIGEST'):
            weight_file.load(wrong)
    with pytest.raises(UserError, match='is not the file of'):
        weight_file.load(f'{url}#sha256={"0" * 64}')
    with pytest.raises(UserError, match='is a page; .*give hf:timm/densenet121'):
        weight_file.load('https://huggingface.co/timm/densenet121/tree/main')


@pytest.mark.parametrize(
    ('name', 'line'),
    [
        ('torchvision:densenet12', 'did you mean torchvision:densenet121'),
        ('keras:densenet161', 'There are keras:densenet121, keras:densenet169'),
        ('xrv:densenet121-res224', 'did you mean xrv:densenet121-res224-'),
        ('densenet12', 'no such file or folder; did you mean densenet121'),
        ('densenet264', 'by name there are densenet121, densenet161'),
        ('timm/densenet121.ra_in1k', 'you mean hf:timm/densenet121.ra_in1k'),
        ('hf:timm', 'give hf:OWNER/NAME'),
        ('hf:a/b/c', 'give hf:OWNER/NAME'),
        ('HTTP://example.com/a.pth#sha256=' + '0' * 64, 'which is not https'),
    ],
)
def test_unknown_names(name, line, host):
    with pytest.raises(UserError, match=line):
        weight_file.load(name)
    assert not host.requests


def test_files_come_before_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert published.is_name('densenet121')
    (tmp_path / 'densenet121').mkdir()
    assert not published.is_name('densenet121')
    assert not published.is_name('C:\\photos') and not published.is_name('a/b')


@pytest.fixture(scope='module')
def hub_folder(tmp_path_factory):
    """The files of a folder for the Hub of ours, and of one as timm writes it."""
    module, variables = weight_files.tiny()
    folder = tmp_path_factory.mktemp('hub') / 'made'
    trained = weight_files.trained_of(module, variables)
    formats.save(str(folder), trained, 'huggingface', formats.Options())
    ours = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(ours['config.json'])
    del config['flax_densenet'], config['label_names']
    arrays = folder.parent / 'arrays'
    weight_files.write_safetensors(arrays, formats.torch_arrays(module, variables))
    timm = {
        'config.json': json.dumps(config).encode(),
        'model.safetensors': arrays.read_bytes(),
    }
    return {'ours': ours, 'timm': timm}


@pytest.mark.parametrize('kind', ['ours', 'timm'])
@pytest.mark.parametrize('revision', ['', '@v1'])
def test_folder_of_the_hub(kind, revision, hub_folder, host, capfd):
    host.put_repo('me/birds', hub_folder[kind] | {'other.bin': b'large'})
    found = weight_file.load(f'hf:me/birds{revision}')
    assert found.is_own == (kind == 'ours')
    weight_files.assert_same(found.variables, weight_files.tiny()[1])
    assert file_hosts.COMMIT[:12] in capfd.readouterr().out
    asked = {p for m, p, h in host.requests if m == 'GET'}
    assert {p.rpartition('/')[2] for p in asked} == {'config.json', 'model.safetensors'}
    for _, _, headers in host.requests:
        sent = {name.lower(): value for name, value in headers.items()}
        assert sent['authorization'] == 'Bearer hf_test'


def test_preparation_of_a_folder_counts(hub_folder, host):
    """Not that of the table: the folder says what this revision was trained with."""
    host.put_repo('me/birds', hub_folder['timm'])
    found = weight_file.load('hf:me/birds')
    entry = published.find('hf:timm/densenet121.ra_in1k')
    entry = dataclasses.replace(entry, classes='none')
    assert entry.image_size != found.preprocessing['image_size']
    described = published.Fetched('hf:me/birds', 'folder', entry).describe(found)
    assert described.preprocessing == found.preprocessing


def test_statistics_of_the_hub(hub_folder, host, capfd):
    """The file of scores and sets is had as well, if config.json says that it is."""
    config = json.loads(hub_folder['ours']['config.json'])
    config['flax_densenet']['decisions'] = {'statistics': True}
    files = hub_folder['ours'] | {
        'config.json': json.dumps(config).encode(),
        'statistics.safetensors': b'content',
    }
    host.put_repo('me/scored', files)
    found = weight_file.load('hf:me/scored')
    assert found.path == 'hf:me/scored'
    file = pathlib.Path(found.folder, 'statistics.safetensors')
    assert file.read_bytes() == b'content'


def test_hub_offline_once_cached(hub_folder, host, monkeypatch):
    from huggingface_hub import constants

    host.put_repo('me/birds', hub_folder['timm'])
    weight_file.load('hf:me/birds')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')  # no network
    weight_file.load('hf:me/birds')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    weight_file.load('hf:me/birds')
    with pytest.raises(UserError, match='HF_HUB_OFFLINE forbids .*hf download me/new'):
        weight_file.load('hf:me/new')


def test_hub_without_network(host, monkeypatch, capfd):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # between 6 attempts
    with pytest.raises(UserError, match='cannot be reached.*hf download me/b') as error:
        weight_file.load('hf:me/b')
    assert '/cache/hub' in str(error.value) and not host.requests
    out, err = capfd.readouterr()  # one line for all attempts
    assert out.startswith('hf:me/b: http://127.0.0.1:9 cannot be reached (') and not err
    assert out.endswith('; trying again\n') and out.count('\n') == 1


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        ('GatedRepo', 'is gated: accept its terms at .*HF_TOKEN'),
        ('RepoNotFound', 'no such repository .*or it is private'),
        ('Unauthorized', r'/me/birds refuses it \(401\); log in with'),
    ],
)
def test_refusals_of_the_hub(error, line, host):
    host.put_repo('me/birds', {}, error=error)
    with pytest.raises(UserError, match=f'^hf:me/birds.*{line}'):
        weight_file.load('hf:me/birds')


def test_unfit_repositories(hub_folder, host):
    host.put_repo('me/empty', {'model.safetensors': b''})
    with pytest.raises(UserError, match='no config.json; only folders in the format'):
        weight_file.load('hf:me/empty')
    host.put_repo('me/bare', {'config.json': hub_folder['timm']['config.json']})
    with pytest.raises(UserError, match='but no model.safetensors or pytorch_model'):
        weight_file.load('hf:me/bare')
    with pytest.raises(UserError, match='no such branch, tag or commit'):
        weight_file.load('hf:me/bare@v2')


def test_damage_on_the_way_from_the_hub(hub_folder, host):
    """A cut is resumed; other bytes of the same number are seen by their SHA-256."""
    files = dict(hub_folder['timm'])
    content = files['model.safetensors']
    files['model.safetensors'] = file_hosts.File(content, cuts=[1000])
    host.put_repo('me/cut', files)
    weight_file.load('hf:me/cut')
    digest = '"' + 64 * '0' + '"'
    wrong = file_hosts.File(content, headers={'X-Linked-Etag': digest})
    host.put_repo('me/wrong', files | {'model.safetensors': wrong})
    with pytest.raises(UserError, match='not that of its name; remove it'):
        weight_file.load('hf:me/wrong')
    short = file_hosts.File(content[:-9], headers={'X-Linked-Size': str(len(content))})
    host.put_repo('me/short', files | {'model.safetensors': short})
    with pytest.raises(UserError, match='^hf:me/short.*nothing incomplete is kept'):
        weight_file.load('hf:me/short')


def test_create_model_with_weights(serve, of_imagenet, capfd):
    serve('torchvision:densenet121', of_imagenet)
    name = 'torchvision:densenet121'
    model, variables = flax_densenet.create_model(weights=name)
    assert model.num_classes == 1000
    kernel = variables['params']['classifier']['kernel']
    same, _ = flax_densenet.create_model('densenet121', weights=name, num_classes=1000,
                                         **weight_files.TINY)  # fmt: skip
    assert same == model
    few, other = flax_densenet.create_model(weights=name, num_classes=7)
    assert few.num_classes == 7 and 'starts from random' in capfd.readouterr().out
    assert other['params']['classifier']['kernel'].shape == (kernel.shape[0], 7)
    first = other['params']['conv0']['kernel']
    assert np.array_equal(first, variables['params']['conv0']['kernel'])
    bare, features = flax_densenet.create_model(weights=name, num_classes=0)
    assert 'classifier' not in features['params']
    images = np.zeros((1, 32, 32, 3), np.float32)
    pooled = jax.eval_shape(bare.apply, features, images)
    assert pooled.shape == (1, kernel.shape[0])
    with pytest.raises(UserError, match='holds a densenet121'):
        flax_densenet.create_model('densenet169', weights=name)
    for missing in ({'variant': 'densenet121'}, {'num_classes': 2}):
        with pytest.raises(UserError, match='create_model needs a'):
            flax_densenet.create_model(**missing)


def test_runs_start_from_names(serve, of_imagenet, monkeypatch):
    serve('torchvision:densenet121', of_imagenet)
    config = base.get_config()
    config.init_from = 'densenet121'
    found, weights = prepare.resolve(settings.from_config(config), None)
    assert found.preparation.crop_fraction == 0.875
    assert weights.path == 'torchvision:densenet121'
    assert found.init_from == 'densenet121'
    for start, line in (
        (
            'xrv:densenet121-res224-nih',
            'init_from=xrv:densenet121-res224-nih: https://',
        ),
        ('keras:densenet', 'init_from=keras:densenet: there are no such'),
    ):
        config.init_from = start
        monkeypatch.setenv('HF_HUB_OFFLINE', '1')
        with pytest.raises(UserError, match=f'^{line}'):
            prepare.resolve(settings.from_config(config), None)


def test_list_weights():
    found = flax_densenet.list_weights('keras:*201')
    assert [entry.name for entry in found] == ['keras:densenet201']
    assert '77.3% top-1' in repr(found) and 'keras.io' in str(found)
    assert published.UNVERIFIED in str(found)
    assert len(flax_densenet.list_weights()) == len(published.TABLE)


def test_command(main, serve, of_imagenet, host):
    status, out, err = main('weights')
    assert (status, err) == (0, '') and not host.requests
    assert all(entry.name in out for entry in published.TABLE)
    assert out.count(published.UNVERIFIED) == len(published.TABLE)
    status, out, _ = main('weights', 'xrv', '--markdown')
    assert out.count('\n') == 2 + 7 and '`keras' not in out
    status, out, err = main('weights', 'resnet')
    assert status == 2 and 'no published weights are called resnet' in err
    serve('torchvision:densenet121', of_imagenet)
    status, out, err = main('weights', '--fetch=densenet121')
    assert status == 0 and os.path.isfile(out.splitlines()[-1])


@pytest.mark.slow
def test_verify(main, serve, of_imagenet, monkeypatch):
    serve('torchvision:densenet121', of_imagenet)
    name = '--verify=torchvision:densenet121'
    status, out, _ = main('weights', name)
    assert status == 0 and published.UNVERIFIED in out and 'dahlia' in out
    assert len(re.findall(r'^ +\d+\.\d%  ', out, re.M)) == 5
    found = check.verify('torchvision:densenet121').found
    for shift, status, line in ((0.0, 0, 'verified:'), (0.1 * found[-1], 1, 'WRONG:')):
        known = tuple(number + shift for number in found)
        change(monkeypatch, 'torchvision:densenet121', fingerprint=known)
        got, out, _ = main('weights', name)
        assert got == status and f'  {line}' in out
    assert published.UNVERIFIED not in out


def test_commands_take_names(main, serve, of_imagenet, tmp_path, monkeypatch):
    """predict, summary and eval; a missing name is one line."""
    serve('torchvision:densenet121', of_imagenet)
    monkeypatch.chdir(tmp_path)
    from flax_densenet.cli import arguments

    placed = dict(arguments.place_measured('torchvision:densenet121'))
    assert placed == {
        'config.init_from': 'torchvision:densenet121',
        'workdir': os.path.join('ckpt', 'torchvision-densenet121-eval'),
    }
    status, out, _ = main('summary', 'torchvision:densenet121')
    assert status == 0 and 'densenet121 with 1000 classes' in out
    for name, meant in ('keras:densenet', 'keras:densenet'), ('densnet121', 'densenet'):
        status, out, err = main('predict', name, 'x.jpg')
        assert status == 2 and f'did you mean {meant}' in err
