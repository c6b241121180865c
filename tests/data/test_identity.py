"""The same data is known wherever it is; training images are found among others."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from flax_densenet.data import dataset, identity, labeled_images
from flax_densenet.data.packed import writer
from helpers.runs import write_images

FIELDS = {'image_size': 8}


def load(source, **fields):
    return dataset.load_source(source, **FIELDS | fields)


def saved_by(source, **changed):
    """Metadata of a checkpoint, through JSON."""
    return json.loads(
        json.dumps(
            {
                'data': {'source': source.name},
                'class_names': list(source.class_names),
                'images': {'train': len(source.train), 'test': len(source.test)},
                'identity': identity.describe(source),
            }
            | changed
        )
    )


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'photos', {'a': 12, 'b': 12}, seed=0)
    return tmp_path / 'photos'


@pytest.mark.parametrize(
    'text', ['photos', 'photos/', './photos', '{}', '{}/', 'photos/../photos', 'link']
)
def test_spellings(photos, text):
    os.symlink('photos', 'link')
    saved = saved_by(load('folder:photos'))
    found = identity.compare(saved, load(f'folder:{text.format(photos)}'))
    assert found == identity.Relation(True)
    before = {k: v for k, v in saved.items() if k != 'identity'}  # of earlier versions
    found = identity.compare(before, load(f'folder:{text.format(photos)}'))
    assert found == identity.Relation(True)


def test_moved_copies(photos, tmp_path):
    saved = saved_by(load('folder:photos'))
    shutil.copytree('photos', 'copy')
    writer.pack('folder:copy', str(tmp_path / 'pack'))
    shutil.rmtree('photos')
    for source in ('folder:copy', f'packed:{tmp_path}/pack'):
        found = identity.compare(saved, load(source))
        assert found.own
        assert 'has the same images as folder:photos' in found.line


def test_other_data_of_the_same_names(photos, tmp_path):
    """As cameras and numbering programs make them."""
    saved = saved_by(load('folder:photos'))
    write_images(tmp_path / 'other', {'a': 12, 'b': 12}, seed=1)
    assert identity.compare(saved, load('folder:other')) == identity.Relation(False)
    shutil.rmtree('photos')
    os.rename('other', 'photos')
    found = identity.compare(saved, load('folder:photos'))
    assert not found.own and 'does not hold the images' in found.line


def test_changed_data(photos):
    source = load('folder:photos')
    saved = saved_by(source)
    gone = source.train.name(0)
    os.remove(gone)
    found = identity.compare(saved, load('folder:photos'))
    assert found.own
    assert 'has changed since training: 19 images to train on' in found.line
    assert '1 are missing' in found.line


def test_checkpoints_that_remember_nothing(photos):
    saved = saved_by(load('folder:photos'), identity=None)
    shutil.copytree('photos', 'copy')
    found = identity.compare(saved, load('folder:copy'))
    assert not found.own and 'if it is a copy, these' in found.line
    os.remove(load('folder:copy').train.name(0))
    assert identity.compare(saved, load('folder:copy')) == identity.Relation(False)


def test_training_images_among_others(photos, tmp_path):
    source = load('folder:photos')
    saved = saved_by(source)
    assert identity.find_trained_on(saved, source.test) == ''
    line = identity.find_trained_on(saved, source.train)
    assert '19 of 19 with checksums in the checkpoint' in line
    # Under other names, in another split, in a tar-like pack: by what is in them.
    write_images(tmp_path / 'new', {'a': 5, 'b': 5}, seed=3)
    shutil.copy(source.train.name(3), 'new/a/renamed.png')
    new = load('folder:new')
    every = labeled_images.join(new.train, new.test)
    assert '1 of 19' in identity.find_trained_on(saved, every)
    other_split = load('folder:photos', split_seed=5).test
    assert 'training images are among the 5 images' in (
        identity.find_trained_on(saved, other_split)
    )


def test_many_images_are_a_sample(photos, monkeypatch):
    monkeypatch.setattr(identity, 'SAMPLE', 5)
    source = load('folder:photos')
    saved = saved_by(source)
    assert len(saved['identity']['sample']) == 5
    assert identity.compare(saved, source).own
    assert '5 of 5' in identity.find_trained_on(saved, source.train)


def test_images_without_names():
    source = load('digits')
    saved = saved_by(source)
    assert saved['identity'] == {'names': '', 'sample': [], 'labels': ''}
    assert identity.compare(saved, source) == identity.Relation(True)
    assert identity.find_trained_on(saved, source.train) == ''


def test_one_class_or_image_is_enough_for_a_model(tmp_path):
    write_images(tmp_path / 'new', {'b': 1}, seed=0)
    with pytest.raises(dataset.UserError, match='only one class'):
        load(f'folder:{tmp_path}/new')
    source = load(f'folder:{tmp_path}/new', known_classes=('a', 'b'))
    assert source.class_names == ('b',)
    assert len(source.train) + len(source.test) == 1


def test_an_image_that_vanishes(photos):
    source = load('folder:photos')
    saved = saved_by(source)
    os.remove(source.train.name(0))
    assert identity.find_trained_on(saved, source.train)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(source.train.name(1))
    assert identity.compare(saved, source).own
