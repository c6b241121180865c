"""A run goes on after its data moved; changed data and settings are told or refused."""

import dataclasses
import json
import os
import shutil

import pytest

from flax_densenet import settings as settings_lib
from flax_densenet.data import dataset, identity, labeled_images, notes
from flax_densenet.errors import UserError
from flax_densenet.train import fit, resume
from helpers.paths import ROOT
from helpers.runs import read_records, tiny_config, write_images


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'photos', {'a': 12, 'b': 12}, seed=0)
    return tmp_path / 'photos'


def load(source):
    return dataset.load_source(source, image_size=8)


def saved_by(source, **changed):
    """Metadata of a checkpoint, through JSON."""
    saved = {
        'data': {'source': source.name},
        'class_names': list(source.class_names),
        'images': {'train': len(source.train), 'test': len(source.test)},
        'identity': identity.describe(source),
    }
    return json.loads(json.dumps(saved | changed))


def rename_one(folder):
    name = min(os.listdir(folder / 'a'))
    os.rename(folder / 'a' / name, folder / 'a' / f'new-{name}')


def check(saved, source, labels=''):
    return resume.check_data('run', saved, source, labels)


@pytest.mark.parametrize('text', ['photos/', './photos', '{}', 'link', '$HERE/photos'])
def test_the_same_folder(photos, monkeypatch, text):
    os.symlink('photos', 'link')
    monkeypatch.setenv('HERE', os.getcwd())
    saved = saved_by(load('folder:photos'))
    line = check(saved, load(f'folder:{text.format(photos)}'))
    assert line == ''
    # Of a version that kept no names.
    line = check(saved | {'identity': None}, load(f'folder:{text.format(photos)}'))
    assert line == ''


@pytest.mark.parametrize('remembers', [True, False])
def test_data_that_moved(photos, remembers):
    saved = saved_by(load('folder:photos'))
    if not remembers:
        del saved['identity']
    os.rename('photos', 'moved')
    line = check(saved, load('folder:moved'))
    assert (
        line
        == 'the data has moved from folder:photos to folder:moved; the run continues'
    )


def test_a_copy_beside_the_old_place(photos):
    saved = saved_by(load('folder:photos'))
    shutil.copytree('photos', 'copy')
    assert 'has moved' in check(saved, load('folder:copy'))
    del saved['identity']  # it cannot be told what it is
    with pytest.raises(UserError, match='link to it from there'):
        check(saved, load('folder:copy'))


@pytest.mark.parametrize('count', [11, 13])
def test_images_that_were_added_or_removed(photos, tmp_path, count):
    saved = saved_by(load('folder:photos'))
    shutil.rmtree('photos')
    write_images(tmp_path / 'photos', {'a': count, 'b': 12}, seed=0)
    for known in saved, saved | {'identity': None}:
        with pytest.raises(UserError) as refusal:
            check(known, load('folder:photos'))
        assert 'images were added or removed; bring' in str(refusal.value)
        assert '--config.init_from=run and another --workdir' in str(refusal.value)


def test_other_data(photos, tmp_path):
    saved = saved_by(load('folder:photos'))
    write_images(tmp_path / 'other', {'a': 12, 'b': 12}, seed=1)
    rename_one(tmp_path / 'other')
    with pytest.raises(UserError, match='and these are other images'):
        check(saved, load('folder:other'))
    with pytest.raises(UserError, match='data.source=folder:photos, not digits'):
        check(saved, load('digits'))


def test_images_that_were_replaced(photos, tmp_path):
    saved = saved_by(load('folder:photos'))
    rename_one(photos)
    assert 'not the same ones' in check(saved, load('folder:photos'))


def test_images_that_were_edited(photos, tmp_path):
    """The same names: some have another content; all have, and other names too."""
    source = load('folder:photos')
    saved = saved_by(source)
    for position in (0, 5):
        os.unlink(source.train.name(position))
        shutil.copy(source.train.name(position + 1), source.train.name(position))
    line = check(saved, load('folder:photos'))
    assert '0 are missing and 2 have other content; the run continues' in line
    assert 'before' not in line
    for folder in photos.iterdir():
        for path in list(folder.iterdir()):
            path.rename(folder / f'x{path.name}')
    with pytest.raises(UserError) as refusal:
        check(saved, load('folder:photos'))
    assert 'holds a run on other images than those of data.source' in str(refusal.value)


def test_tables(photos, tmp_path):
    source = load('folder:photos')
    saved = saved_by(source)
    saved['data']['labels'] = 'a.csv'
    (tmp_path / 'a.csv').write_text('x')
    (tmp_path / 'b.csv').write_text('x')
    assert check(saved, source, f'{tmp_path}/a.csv') == ''
    for labels in ('b.csv', ''):
        with pytest.raises(UserError, match='give the table of the run'):
            check(saved, source, labels)
    os.rename('a.csv', 'c.csv')
    assert check(saved, source, 'c.csv') == ''


def config_of(epochs, **fields):
    fields = {'train.epochs': epochs, 'data.source': 'folder:photos'} | fields
    return tiny_config(**{'data.image_size': 8, 'data.batch_size': 8}, **fields)


@pytest.mark.slow
def test_a_run_whose_data_and_settings_change(photos, tmp_path, monkeypatch):
    """Each is taken with a line, or ends with a remedy; orbax's words are not shown."""
    workdir, lines = str(tmp_path / 'run'), []
    monkeypatch.setattr(notes, 'say', lines.append)
    fit.fit(config_of(1), workdir)
    assert not lines
    os.rename('photos', 'moved')
    changed = {'data.source': 'folder:moved/', 'optimizer.learning_rate': 1e-4}
    fit.fit(config_of(2, **changed), workdir)
    told = '\n'.join(lines)
    lines.clear()
    assert 'the data has moved from folder:photos to folder:moved/' in told
    assert 'train.epochs=2 (before 1)' in told
    assert 'optimizer.learning_rate=0.0001 (before 0.003)' in told
    assert 'the learning rate follows the new schedule' in told
    steps = [record['step'] for record in read_records(tmp_path / 'run')]
    assert len(steps) == 2 and steps[0] < steps[1]

    here = {'data.source': 'folder:moved'}
    other = 'adam' if config_of(1)['optimizer']['name'] != 'adam' else 'sgd'
    with pytest.raises(UserError) as refusal:
        fit.fit(config_of(3, **here, **{'optimizer.name': other}), workdir)
    said = str(refusal.value)
    assert 'does not fit these settings; resume with optimizer.name=' in said
    assert '--config.init_from=' in said
    assert 'orbax' not in said.lower() and 'ShapeDtype' not in said

    shutil.rmtree(tmp_path / 'moved' / 'a')
    write_images(tmp_path / 'moved', {'a': 5}, seed=0)
    with pytest.raises(UserError, match='images were added or removed'):
        fit.fit(config_of(5, **here), workdir)
    assert len(read_records(tmp_path / 'run')) == 2
    assert not lines


def test_changes_that_matter():
    changes = {'data.augment': (True, False)}
    assert resume.describe_changes(changes) == (
        'resuming with other settings: data.augment=False (before True)'
    )
    assert resume.describe_changes({}) == ''


def test_another_split_of_the_same_images(photos):
    """Training images would become test images: another table or other groups."""
    source = load('folder:photos')
    saved = saved_by(source)
    other = dataset.load_source('folder:photos', image_size=8, split_seed=3)
    with pytest.raises(UserError, match='of the training images .* would be test im'):
        check(saved, other)
    assert identity.find_changed_part(saved, source) == 0


def test_a_split_that_changed_a_little(photos, monkeypatch):
    """One image at the boundary is told of; the run goes on."""
    source = load('folder:photos')
    saved = saved_by(source)
    train, test = source.train.indices.copy(), source.test.indices.copy()
    train[0], test[0] = test[0], train[0]
    other = dataclasses.replace(
        source,
        train=labeled_images.Examples(
            source.train.reader, train, source.train.preparation
        ),
        test=labeled_images.Examples(source.test.reader, test, source.test.preparation),
    )
    assert '; 1 training images are test images now' in check(saved, other)


def test_other_labels_for_the_same_images(photos, tmp_path):
    def read(odd):
        names = sorted(os.listdir(photos / 'a'))
        rows = [f'a/{name},{(i + odd) % 2}' for i, name in enumerate(names)]
        (tmp_path / 'a.csv').write_text('\n'.join(['image,sick', *rows]))
        return dataset.load_source('folder:photos', labels='a.csv', image_size=8)

    saved = saved_by(read(0))
    saved['data']['labels'] = 'a.csv'
    assert check(saved, read(0), 'a.csv') == ''
    assert 'has other labels for the images' in check(saved, read(1), 'a.csv')
    del saved['identity']['labels']  # of a version that kept none
    assert check(saved, read(1), 'a.csv') == ''


@pytest.mark.parametrize(
    ('field', 'value', 'weights'),
    [
        ('data.batch_size', 16, True),
        ('data.resize', 'crop', True),
        ('train.ema', 0.5, True),
        ('model.variant', 'BC-L10k6', False),
    ],
)
def test_settings_of_a_run_that_stay(field, value, weights, photos, tmp_path):
    """Another one is refused with the remedy: weights go to another network never."""
    run = tmp_path / 'run'
    shutil.copytree(ROOT / 'tests' / 'data' / 'v0' / 'run', run)
    config = json.loads((run / 'config.json').read_text())
    flat = settings_lib.flatten(settings_lib.from_config(config))
    config = {
        section: dict(fields) if isinstance(fields, dict) else fields
        for section, fields in config.items()
    }
    section, _, name = field.partition('.')
    assert flat[field] != value
    config[section][name] = value
    with pytest.raises(UserError) as refusal:
        fit.fit(config, str(run))
    said = str(refusal.value)
    assert f'holds a run with {field}=' in said and 'use another --workdir' in said
    assert ('or start from its weights: --config.init_from=' in said) == weights
