"""Which data eval and report measure on, and what they say of it."""

import functools
import json
import shutil
import types

import pytest

from flax_densenet.cli import command_line, commands, own_images, trained_model
from flax_densenet.data import dataset, identity
from flax_densenet.export import model_card_facts
from flax_densenet.weights import trained as trained_lib
from helpers import commands as helper
from helpers.paths import ROOT
from helpers.runs import write_images

OWN = {'source': 'folder:photos', 'labels': '', 'split_seed': 5, 'image_size': 8}
OWN |= {'test_fraction': 0.3, 'batch_size': 4}


def choose(*arguments, own=OWN):
    argv = ['launch.py', 'eval', *arguments]
    found = command_line.parse(argv, commands.COMMANDS)
    metadata = {'data': own, 'image_size': 8}
    return trained_model.data_settings(found, metadata)


@pytest.mark.parametrize(
    ('arguments', 'source', 'place'),
    [
        ([], 'folder:photos', ''),
        # What sets no data, or the same in another spelling.
        (['--config=densenet121'], 'folder:photos', ''),
        (['--config=folder:./photos/'], 'folder:photos', ''),
        (['--config=folder:others'], 'folder:others', '--config'),
        (['--config=chexnet:photos'], 'folder:photos', '--config'),
        (
            ['--config=folder:others', '--config.data.source=digits'],
            'digits',
            '--config.data.source',
        ),
        (['--config.data.source=digits'], 'digits', '--config.data.source'),
        (['--config.data.labels=x.csv'], 'folder:photos', '--config.data.labels'),
        (['--config.data.tta=flip'], 'folder:photos', ''),
    ],
)
def test_which_data_wins(arguments, source, place):
    settings, found = choose(*arguments)
    assert (settings.data.source, found) == (source, place)
    assert settings.preparation.image_size == 8
    # Another split of the same images would have training images in it.
    assert settings.data.split_seed == (0 if place == '--config' else 5)


def test_labels_come_with_the_recipe():
    settings, _ = choose('--config=chexnet:photos')
    assert settings.data.labels == 'labels.csv'


def test_a_model_without_data_takes_the_recipes():
    settings, place = choose('--config=folder:others', own={'batch_size': 4})
    assert (settings.data.source, place) == ('folder:others', '')


def test_eval_says_which_data_it_is(monkeypatch, capfd, tmp_path):
    """A recipe with other data is measured and named, and the run's results stay."""
    run = helper.make_main(monkeypatch, capfd)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / 'tests' / 'data' / 'v0' / 'run', 'run')
    write_images(tmp_path / 'others', {'3': 4, '8': 5})
    before = (tmp_path / 'run/eval.json').read_bytes()
    rows = (tmp_path / 'run/predictions.csv').read_bytes()
    status, out, err = run('eval', 'run', '--config=folder:others')
    assert (status, err) == (0, '')
    line, table = out.splitlines()[:2]
    assert line == (
        'evaluating on folder:others (from --config); the model was trained on digits'
    )
    assert '(9 images of folder:others, best checkpoint: epoch 5, step 113)' in table
    assert out.splitlines()[-1] == (
        'eval.json and predictions.csv are in run; those of its own images are in '
        'run/own'
    )
    found = read_eval(tmp_path / 'run')
    expected = {'version': 2, 'data': 'folder:others', 'epoch': 5, 'step': 113}
    assert expected | {'tta': 'none', 'weights': None, 'count': 9, 'own': False} == {
        name: found[name] for name in (*expected, 'tta', 'weights', 'count', 'own')
    }
    status, out, err = run('eval', 'run', 'others', '--config.data.tta=flip')
    assert (status, err) == (0, '') and out.startswith(
        'evaluating on folder:others (from --config.data.source); the model was'
    )
    assert read_eval(tmp_path / 'run')['tta'] == 'flip'
    assert (tmp_path / 'run/own/eval.json').read_bytes() == before
    assert (tmp_path / 'run/own/predictions.csv').read_bytes() == rows
    status, out, err = run('eval', 'run')
    assert (status, err) == (0, '') and 'evaluating' not in out
    assert out.startswith('Test_acc') and '(360 test images of digits, best' in out
    assert out.splitlines()[-1] == 'eval.json and predictions.csv are in run'
    assert not (tmp_path / 'run/own').exists()
    assert 'own' not in read_eval(tmp_path / 'run')


def read_eval(folder):
    return json.loads((folder / 'eval.json').read_text())


def test_a_report_of_other_data_is_apart(monkeypatch, capfd, tmp_path):
    """The run's page stays; comparisons and model cards are of its own images."""
    run = helper.make_main(monkeypatch, capfd)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / 'tests' / 'data' / 'v0' / 'run', 'run')
    write_images(tmp_path / 'others', {'3': 4, '8': 5})
    (tmp_path / 'run/report.html').write_text('own')
    private = '--config.report.private=True'  # no pictures, which take time
    other = '--config.data.source=folder:others'
    status, out, err = run('report', 'run', other, private)
    assert (status, err) == (0, '')
    assert 'run/report-others.html: open it' in out
    assert 'are in run; those of its own images are in run/own' in out
    assert (tmp_path / 'run/report.html').read_text() == 'own'
    assert (read_eval(tmp_path / 'run')['count'], 360) == (
        *(9, read_eval(tmp_path / 'run/own')['count']),
    )
    assert '9 images' in (tmp_path / 'run/report-others.html').read_text()
    shutil.copytree('run', 'again')
    status, out, err = run('report', 'run', 'again', '--out=compare.html')
    assert (status, err) == (0, '')
    page = (tmp_path / 'compare.html').read_text()
    shown = [read_eval(tmp_path / name)['accuracy'] for name in ('run/own', 'run')]
    assert f'{shown[0]:.1%}' in page and f'{shown[1]:.1%}' not in page
    trained = trained_lib.load_trained('run')
    card = model_card_facts.describe_metrics(trained, 'run')
    assert (card['count'], card['own']) == (360, True)


def are_own(overrides, *, known, found=None, step=7, members=1, trained_on=True):
    """Of a model that was trained on `known` and measured on `found`."""
    own = {'source': 'folder:photos', 'split_seed': 0}
    trained = types.SimpleNamespace(
        step=step,
        module=types.SimpleNamespace(members=members),
        metadata={'data': own, 'identity': identity.describe(known)},
    )
    invocation = types.SimpleNamespace(overrides=overrides)
    return own_images.are_measured(
        invocation, trained, source=found or known, trained_on=trained_on
    )


def test_which_images_are_its_own(tmp_path):
    write_images(tmp_path / 'photos', {'a': 6, 'b': 6})
    load = functools.partial(
        dataset.load_source, f'folder:{tmp_path}/photos', image_size=8
    )
    known, divided = load(), load(split_seed=3)
    check = functools.partial(are_own, known=known)
    moved, seed = {'data.source': 'folder:/x/copy'}, {'data.split_seed': 3}
    assert check({}) and check({'data.tta': 'flip'}) and check(moved) and check(seed)
    assert not check(moved, trained_on=False)
    assert not check({}, trained_on=False)  # others in its place
    assert not check(seed, found=divided)
    arrays = dataset.load_source('digits', image_size=8)  # without names
    assert not check(seed, known=arrays)
    assert check({'data.split_seed': 0}, known=arrays)
    assert check(moved, step=None, trained_on=False)  # weights have none
    assert not check({}, step=None, members=5)  # its own are out of fold


@pytest.mark.parametrize(
    ('source', 'labels', 'name'),
    [
        ('folder:/x/old photos/', '', 'old-photos'),
        ('tar:/x/a.tar,/x/b.tar', '', 'a.tar'),
        ('hf:owner/birds', '', 'birds'),
        ('folder:..', '', 'data'),
        ('digits', '/x/reader2.csv', 'digits-reader2'),
        ('digits', '/y/t.csv', 'digits'),
    ],
)
def test_names_of_other_data(source, labels, name):
    data = types.SimpleNamespace(source=source, labels=labels)
    assert own_images.name_of(data, {'labels': '/x/t.csv'}) == name


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A run of ten classes, images of three of them, and a table to write."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / 'tests' / 'data' / 'v0' / 'run', 'run')
    write_images(tmp_path, {'new': 10})

    def write(labels, heading='image,label'):
        rows = [f'{i:03}.jpg,{label}' for i, label in enumerate(labels)]
        (tmp_path / 't.csv').write_text('\n'.join([heading, *rows]))

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    ('labels', 'count'), [(['3'] * 10, 10), (['0', '1'] * 4, 8), (['9', '3'], 2)]
)
def test_tables_of_few_classes(labels, count, digits, monkeypatch, capfd, tmp_path):
    """One class, two called 0 and 1, one image of each: for a model it is enough."""
    digits(labels)
    run = helper.make_main(monkeypatch, capfd)
    status, out, err = run('eval', 'run', 'new', '--config.data.labels=t.csv')
    assert (status, err) == (0, '')
    assert read_eval(tmp_path / 'run')['count'] == count
    assert f'{len(set(labels))} classes' in out


def test_a_class_of_a_table_in_another_case(digits, monkeypatch, capfd):
    digits(['cat', 'dog'])
    run = helper.make_main(monkeypatch, capfd)
    status, _, err = run('eval', 'run', 'new', '--config.data.labels=t.csv')
    assert (
        status == 2 and 'class cat is not one of the classes that the model was' in err
    )
