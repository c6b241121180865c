"""Which data eval and report measure on, and what they say of it."""

import json
import shutil

import pytest

from flax_densenet.cli import command_line, commands, trained_model
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
    """A recipe with other data is measured and named; eval.json has it too."""
    run = helper.make_main(monkeypatch, capfd)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / 'tests' / 'data' / 'v0' / 'run', 'run')
    write_images(tmp_path / 'others', {'3': 4, '8': 5})
    status, out, err = run('eval', 'run', '--config=folder:others')
    assert (status, err) == (0, '')
    line, table = out.splitlines()[:2]
    assert line == (
        'evaluating on folder:others (from --config); the model was trained on digits'
    )
    assert '(9 images of folder:others, best checkpoint: epoch 5, step 113)' in table
    found = json.loads((tmp_path / 'run' / 'eval.json').read_text())
    expected = {'version': 2, 'data': 'folder:others', 'epoch': 5, 'step': 113}
    assert expected | {'tta': 'none', 'weights': None, 'count': 9} == {
        name: found[name] for name in (*expected, 'tta', 'weights', 'count')
    }
    status, out, err = run('eval', 'run', 'others', '--config.data.tta=flip')
    assert (status, err) == (0, '') and out.startswith(
        'evaluating on folder:others (from --config.data.source); the model was'
    )
    assert json.loads((tmp_path / 'run' / 'eval.json').read_text())['tta'] == 'flip'
    status, out, err = run('eval', 'run')
    assert (status, err) == (0, '') and 'evaluating' not in out
    assert out.startswith('Test_acc') and '(360 test images of digits, best' in out


def read_eval(folder):
    return json.loads((folder / 'eval.json').read_text())


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
