"""Runs with three parts: validation chooses, the test images are measured once."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import flax_densenet
from flax_densenet import UserError, settings
from flax_densenet.data import dataset
from flax_densenet.export import model_card
from flax_densenet.report import compare, finished, render
from flax_densenet.train import announce
from helpers import shared
from helpers.runs import write_images

TINY = {
    'model': {'variant': 'BC-L10k4', 'block_sizes': (1, 1)},
    'optimizer': {'learning_rate': 1e-2},
}


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    """A run on the digits with a validation part that was split off."""
    config = {**shared.DIGITS, 'train': {'epochs': 3, 'tensorboard': False}}
    config['data'] = config['data'] | {'val_fraction': 0.2}
    return config, flax_densenet.train(config, tmp_path_factory.mktemp('three') / 'run')


@pytest.mark.slow
def test_validation_images_choose(three):
    """The test images have no part in the records."""
    _, result = three
    for record in result.records:
        assert {'val_accuracy', 'val_loss', 'train_accuracy'} <= record.keys()
        assert not [name for name in record if name.startswith('test')]
    best = max(result.records, key=lambda row: (row['val_accuracy'], -row['val_loss']))
    assert result.best == best


@pytest.mark.slow
def test_the_test_images_are_measured_once(three):
    config, result = three
    assert result.test['count'] == 360
    folder = pathlib.Path(result.workdir)
    saved = json.loads((folder / 'eval.json').read_text())
    assert saved['accuracy'] == result.test['accuracy']
    again = flax_densenet.evaluate(result.workdir)
    assert again.metrics['accuracy'] == result.test['accuracy']
    metadata = flax_densenet.load(result.workdir).trained.metadata
    assert metadata['images'] == {'train': 1149, 'val': 288, 'test': 360}
    source = dataset.load_source('digits', image_size=8, val_fraction=0.2)
    assert np.array_equal(again.labels, source.test.labels)
    assert announce.describe_parts(source) == (
        '1,149 training, 288 validation and 360 test images'
    )


@pytest.mark.slow
def test_a_finished_run_does_not_measure_again(three, monkeypatch, caplog):
    config, result = three
    monkeypatch.setattr(finished.results, 'collect', None)
    again = flax_densenet.train(config, result.workdir)
    assert again.test['accuracy'] == result.test['accuracy']
    low, high = result.test['accuracy_interval']
    assert (
        f'best: epoch {result.best["epoch"]}, Val_acc: '
        f'{result.best["val_accuracy"]:.1%}; Test_acc: {result.test["accuracy"]:.1%} '
        f'({low:.1%} to {high:.1%}), measured once on 360 test images, which were not'
    ) in caplog.text


@pytest.mark.slow
def test_another_validation_part_is_another_run(three):
    config, result = three
    data = config['data'] | {'val_fraction': 0.1}
    with pytest.raises(UserError, match='holds a run with data.val_fraction=0.2, not'):
        flax_densenet.train(config | {'data': data}, result.workdir)


@pytest.mark.slow
def test_the_page_says_which_images_chose(three):
    _, result = three
    page = (pathlib.Path(result.workdir) / 'report.html').read_text()
    assert 'chosen for its accuracy on 288 validation images, which are not' in page
    assert 'Training and validation accuracy' in page
    assert 'Training, validation and test images' in page
    assert 'same test images' not in page and 'test loss' not in page


@pytest.mark.slow
def test_runs_are_compared_by_their_tests(three, tmp_path):
    _, result = three
    path = tmp_path / 'compare.html'
    compare.save([result.workdir, result.workdir], str(path))
    page = path.read_text()
    assert 'the runs are sorted by these: the test images were not used' in page
    assert 'Validation accuracy' in page and 'Solid lines: validation' in page
    share = render.percent(result.test['accuracy'])
    chosen = render.percent(result.best['val_accuracy'])
    assert share != chosen
    assert f'>{chosen}</td>' in page and f'>{share}</td>' in page


@pytest.mark.slow
def test_the_card_is_of_the_test_images(three):
    _, result = three
    model = flax_densenet.load(result.workdir).trained
    card = model_card.render(model, workdir=result.workdir)
    assert 'on 360 test images of `digits`' in card
    assert 'chosen on validation images; the test images were not used' in card
    assert '288 to choose the epoch by, 360 to test on' in card
    alone = model_card.render(model)
    assert 'on 288 validation images of `digits`' in alone


@pytest.mark.slow
def test_without_a_report_the_test_is_measured(tmp_path, caplog):
    config = shared.DIGITS | {
        'data': shared.DIGITS['data'] | {'val_fraction': 0.2},
        'train': {'epochs': 1, 'tensorboard': False, 'report': False},
    }
    result = flax_densenet.train(config, tmp_path / 'run')
    assert (tmp_path / 'run' / 'eval.json').is_file()
    assert not (tmp_path / 'run' / 'report.html').exists()
    assert f'Test_acc: {result.test["accuracy"]:.1%}' in caplog.text
    assert 'Val_acc: ' in caplog.text and 'Epoch:  1.' in caplog.text


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_of_two_parts_goes_on_with_three(tmp_path):
    """Versions that knew of two parts left the test part of a folder aside."""
    for part, count in ('train', 12), ('val', 4), ('test', 5):
        write_images(tmp_path / part, {'a': count, 'b': count}, size=(8, 8), seed=count)
    shutil.move(tmp_path / 'test', tmp_path / 'away')
    config = TINY | {
        'data': {'source': f'folder:{tmp_path}', 'image_size': 8, 'batch_size': 8},
        'train': {'epochs': 1, 'tensorboard': False, 'report': False},
    }
    before = flax_densenet.train(config, tmp_path / 'away' / 'run')
    assert before.test is None and 'test_accuracy' in before.best
    shutil.move(tmp_path / 'away' / 'run', tmp_path.parent / f'{tmp_path.name}-run')
    shutil.move(tmp_path / 'away', tmp_path / 'test')
    config = config | {'train': config['train'] | {'epochs': 3}}
    after = flax_densenet.train(config, tmp_path.parent / f'{tmp_path.name}-run')
    assert after.records[0] == before.records[0]
    assert 'val_accuracy' in after.records[1] and after.test['count'] == 10
    metadata = flax_densenet.load(after.workdir).trained.metadata
    assert metadata['images'] in (
        {'train': 24, 'test': 8},  # of the first epoch
        {'train': 24, 'val': 8, 'test': 10},
    )


@pytest.mark.parametrize(
    ('data', 'groups'),
    [
        ({'source': 'folder:x'}, 'none'),
        ({'source': 'folder:x', 'groups': 'auto'}, 'none'),
        ({'source': 'tar:x'}, 'none'),
        ({'source': 'folder:x', 'groups': 'path'}, 'path'),
        ({'source': 'folder:x', 'labels': 't.csv'}, 'auto'),
        ({'source': 'packed:x'}, 'auto'),
        ({'source': 'folder:x', 'val_fraction': 0.0}, 'auto'),
    ],
)
def test_groups_of_runs_of_earlier_versions(data, groups):
    """A folder's images were split one by one, and still are for such a run."""
    assert settings.from_saved({'data': data}).data.groups == groups
