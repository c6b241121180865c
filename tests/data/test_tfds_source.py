"""Sets of tensorflow-datasets, read without TensorFlow."""

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset, labeled_images, pipeline, tfds_source
from helpers.sources import take


@pytest.fixture(scope='module')
def tfds():
    return pytest.importorskip('tensorflow_datasets')


def make_builder(tfds, class_name, image, with_test, *, three=False):
    """A TFDS builder of 12 images, 8 to train on; the label is in each image.

    Args:
      three: also with a split `validation`, and features of patients and views.
    """

    def info(self):
        features = {
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
            'label': tfds.features.ClassLabel(names=['left', 'right']),
        }
        if three:
            features['patient_id'] = tfds.features.Text()
            features['view'] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def split_generators(self, downloads):
        parts = {'train': self._generate_examples(range(8))}
        if with_test:
            parts['extra'] = self._generate_examples(range(12, 13))
            parts['test'] = self._generate_examples(range(8, 12))
        if three:
            parts['validation'] = self._generate_examples(range(6, 8))
        return parts

    def generate_examples(self, numbers):
        for number in numbers:
            example = {'image': image(number), 'label': number % 2}
            more = {
                'patient_id': f'p{number // 2}',
                'view': ('front', 'side')[number // 2 % 2],
            }
            yield number, example | (more if three else {})

    return type(
        class_name,
        (tfds.core.GeneratorBasedBuilder,),
        {
            'VERSION': tfds.core.Version('1.0.0'),
            'pkg_dir_path': None,
            '_info': info,
            '_split_generators': split_generators,
            '_generate_examples': generate_examples,
        },
    )


def png(number):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new('RGB', (12, 10), (number * 20, number % 2 * 255, 0)).save(file, 'PNG')
    file.seek(0)
    return file


@pytest.mark.parametrize('with_test', [True, False])
def test_tfds_without_tensorflow(tfds, tmp_path, with_test):
    name = 'TinyWith' if with_test else 'TinyWithout'
    make_builder(tfds, name, png, with_test)(
        data_dir=tmp_path, file_format='array_record'
    ).download_and_prepare()
    name = 'tfds:tiny_with' if with_test else 'tfds:tiny_without'
    source = dataset.load_source(name, image_size=8, tfds_dir=str(tmp_path))
    assert source.class_names == ('left', 'right')
    sizes = (8, 4) if with_test else (6, 2)
    assert (len(source.train), len(source.test)) == sizes
    for part in (source.train, source.test):
        for i in range(len(part)):
            example = part[i]
            assert example['image'].shape == (8, 8, 3)
            assert (example['image'][0, 0, 1] == 255) == example['label']
        assert part.labels.tolist() == [part[i]['label'] for i in range(len(part))]
    batch = take(pipeline.train_batches(source.train, batch_size=4, seed=0), 1)[0]
    assert batch['image'].shape == (4, 8, 8, 3)
    everything = labeled_images.join(source.train, source.test)
    assert sorted(everything[i]['image'][0, 0, 0] for i in range(len(everything)))[
        -1
    ] == (220 if with_test else 140)


def test_several_splits_of_tfds(tfds, tmp_path):
    make_builder(tfds, 'TinySplits', png, True)(
        data_dir=tmp_path, file_format='array_record'
    ).download_and_prepare()
    fields = dict(image_size=8, tfds_dir=str(tmp_path))
    source = dataset.load_source('tfds:tiny_splits', tfds_train='train+extra', **fields)
    assert (len(source.train), len(source.test)) == (9, 4)
    seen = sorted(source.train[i]['image'][0, 0, 0] for i in range(9))
    assert seen == [20 * n for n in (*range(8), 12)]
    assert source.train.name(8).startswith('extra[')
    source = dataset.load_source('tfds:tiny_splits', tfds_train='test', **fields)
    assert (len(source.train), len(source.test)) == (3, 1)  # a split of it
    for name in ('train+none', 'train+train', 'train+'):
        with pytest.raises(UserError, match=f'tfds_train={name.replace("+", ".")}'):
            dataset.load_source('tfds:tiny_splits', tfds_train=name, **fields)


def test_three_splits_of_tfds(tfds, tmp_path, capsys, monkeypatch):
    make_builder(tfds, 'TinyThree', png, True, three=True)(
        data_dir=tmp_path, file_format='array_record'
    ).download_and_prepare()
    fields = dict(image_size=8, tfds_dir=str(tmp_path))
    source = dataset.load_source('tfds:tiny_three', **fields)
    counts = {name: len(part) for name, part in source.parts.items()}
    assert counts == {'train': 8, 'val': 2, 'test': 4}
    assert source.val.name(0).startswith('validation[')
    out = capsys.readouterr().out
    assert 'trains on train, validation chooses the best epoch, tests once on' in out
    # The images of validation are also in train.
    assert 'grouped by the feature patient_id, 1 of 6 groups are in more than' in out
    for n, view in enumerate(source.train.subgroups['view']):
        number = source.train[n]['image'][0, 0, 0] // 20
        assert view == ('front', 'side')[number // 2 % 2]
    monkeypatch.setattr(tfds_source, '_GROUPED', 10)
    source = dataset.load_source('tfds:tiny_three', **fields)
    assert source.train.groups is None
    out = capsys.readouterr().out
    assert 'data.groups=column:patient_id first reads it from all 14' in out
    assert 'data.subgroups=view reads them of all 14' in out
    assert not source.train.subgroups
    # A split of ours keeps patients together, though labels are read one by one.
    source = dataset.load_source(
        'tfds:tiny_three',
        tfds_train='train+test',
        val_fraction=0.25,
        groups='column:patient_id',
        **fields,
    )
    assert not set(source.train.groups) & set(source.val.groups)
    assert (len(source.train), len(source.val), len(source.test)) == (10, 2, 2)
    for groups in ('column:age', 'path'):
        with pytest.raises(UserError, match='has the features image, label, patient_i'):
            dataset.load_source('tfds:tiny_three', groups=groups, **fields)


def test_tfds_set_that_needs_tensorflow(tfds, tmp_path):
    make_builder(tfds, 'TinyArrays', lambda n: np.zeros((8, 8, 3), np.uint8), True)
    with pytest.raises(UserError, match=r"pip install 'flax_densenet\[prepare\]'"):
        dataset.load_source('tfds:tiny_arrays', tfds_dir=str(tmp_path))


def test_stock_tfds_set_without_network(tfds, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, '_has_network', lambda: False)
    with pytest.raises(UserError, match='tfds:mnist: cannot be downloaded into'):
        dataset.load_source('tfds:mnist', tfds_dir=str(tmp_path))
