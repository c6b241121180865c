"""What TensorBoard reads of a run; a resumed run's curves do not overlap."""

import io
import types

import numpy as np
import pytest
from PIL import Image

from flax_densenet.report import figures
from flax_densenet.train import tensorboard
from helpers.runs import (
    Stopped,
    read_records,
    stop_after,
    tiny_config,
    train_with_pages,
)

pytestmark = pytest.mark.drawn

event_accumulator = pytest.importorskip(
    'tensorboard.backend.event_processing.event_accumulator'
)
hparams_metadata = pytest.importorskip('tensorboard.plugins.hparams.metadata')


def read(folder):
    """All of the folder's events, as TensorBoard takes them."""
    return event_accumulator.EventAccumulator(str(folder), {'scalars': 0}).Reload()


def steps(events, tag):
    return [event.step for event in events.Scalars(tag)]


def hyperparameters(events):
    content = events.PluginTagToContent('hparams')
    start = hparams_metadata.parse_session_start_info_plugin_data(
        content['_hparams_/session_start_info']
    )
    return start.hparams, '_hparams_/session_end_info' in content


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_resumed_run_is_shown_once(tmp_path, monkeypatch):
    # 1437 images in batches of 128: epochs end after the steps 12 and 23.
    shown = {'train.tensorboard': True, 'train.report': True}
    config = tiny_config(**{'model.block_sizes': (1, 1)} | shown)
    with monkeypatch.context() as patch:
        stop_after(patch, 18)
        with pytest.raises(Stopped):
            train_with_pages(config, tmp_path)
    events = read(tmp_path)
    before = steps(events, 'loss/step')
    assert before == [*range(1, max(before) + 1)]
    assert max(before) > 12  # there is something to hide
    assert steps(events, 'accuracy/test') == [12]
    fields, ended = hyperparameters(events)
    assert not ended
    assert fields['optimizer.learning_rate'].number_value == 3e-3
    assert fields['model.variant'].string_value == 'BC-L10k4'
    assert fields['data.mean'].string_value == '(0.485, 0.456, 0.406)'
    assert fields['model.fast'].bool_value is True

    train_with_pages(config, tmp_path).send_files()
    events = read(tmp_path)
    assert len(events.Images('confusion_matrix')) == 1
    assert steps(events, 'loss/step') == [*range(1, 24)]
    records = read_records(tmp_path)
    for tag, name in [
        ('accuracy/train', 'train_accuracy'),
        ('accuracy/test', 'test_accuracy'),
        ('loss/test', 'test_loss'),
        ('learning_rate', 'learning_rate'),
        ('speed/images_per_second', 'images_per_second'),
        ('speed/peak_memory_gib', 'peak_memory_gib'),
    ]:
        assert steps(events, tag) == [12, 23]
        values = [event.value for event in events.Scalars(tag)]
        assert values == pytest.approx([record[name] for record in records], rel=1e-6)
    # The steps' losses are those that the epoch's mean is made of.
    last = [e.value for e in events.Scalars('loss/step') if e.step > 12]
    assert np.mean(last) == pytest.approx(records[-1]['train_loss'], abs=0.02)
    assert [image.step for image in events.Images('samples')] == [1, 13]
    shown = Image.open(io.BytesIO(events.Images('samples')[-1].encoded_image_string))
    saved = Image.open(tmp_path / 'samples.png').convert('RGB')
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(saved))
    (text,) = events.Tensors('config/text_summary')[-1].tensor_proto.string_val
    assert '"variant": "BC-L10k4"' in text.decode()
    assert hyperparameters(events)[1]


def test_what_was_told_can_be_read_at_once(tmp_path):
    """A run that is killed leaves the figures of its last checkpoint."""
    record = {'step': 3, 'test_accuracy': 0.5, 'test_loss': 2.0}
    with tensorboard.open_writer(
        str(tmp_path), enabled=True, start=0, steps_per_epoch=100
    ) as shown:
        for step in range(1, 12):
            shown.add_loss(step, 1 / step)
        shown.add_epoch(record, record)
        events = read(tmp_path)
    assert steps(events, 'loss/step') == [5, 10]  # 20 of the 100
    assert steps(events, 'accuracy/test') == [3]
    assert 'accuracy/train' not in events.Tags()['scalars']


def test_charts_together_and_single_images(tmp_path):
    images = np.zeros((2, 5, 7, 3), np.uint8)
    images[1, :, :, 2] = 200
    with tensorboard.open_writer(
        str(tmp_path), enabled=True, start=0, steps_per_epoch=1
    ) as shown:
        shown.add_config({'data': {'source': 'digits'}})
        shown.add_images('training_images', images)
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    (chart,) = events.Tensors('custom_scalars__config__')
    text = chart.tensor_proto.string_val[0]
    for tag in (b'accuracy/train', b'accuracy/test', b'loss/train', b'loss/test'):
        assert tag in text
    (one,) = events.Images('training_images/1')
    assert (one.width, one.height) == (7, 5)
    with Image.open(io.BytesIO(one.encoded_image_string)) as image:
        np.testing.assert_array_equal(np.asarray(image.convert('RGB')), images[1])


def test_the_confusion_matrix(tmp_path):
    """The one of the best epoch, after the last step; nothing where none was drawn."""
    one = tmp_path / 'one'
    found = types.SimpleNamespace(
        multi_label=False,
        class_names=('ants', 'bees'),
        labels=np.array([0, 0, 1]),
        predicted=np.array([0, 1, 1]),
    )
    for folder in (one, tmp_path / 'none'):
        folder.mkdir()
    figures.save_confusion(str(one), found)
    for folder in (one, tmp_path / 'none'):
        with tensorboard.open_writer(
            str(folder), enabled=True, start=7, steps_per_epoch=1
        ) as shown:
            shown.add_results(str(folder))
    (image,) = read(one).Images('confusion_matrix')
    with Image.open(one / 'confusion.png') as saved:
        assert (image.step, image.width, image.height) == (8, *saved.size)
    assert not read(tmp_path / 'none').Tags()['images']


def test_the_best_and_the_labels(tmp_path):
    record = {'test_accuracy': 0.5, 'test_loss': 2.0, 'test_mean_auroc': 0.75}
    areas = {'ants': 0.75, 'bees': None}
    with tensorboard.open_writer(
        str(tmp_path), enabled=True, start=0, steps_per_epoch=1
    ) as shown:
        later = {'step': 2, 'test_accuracy': 0.25, 'test_auroc': areas}
        shown.add_epoch(later, record)
    events = read(tmp_path)
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()['scalars']}
    assert found == {
        'accuracy/test': 0.25,
        'auroc/ants': 0.75,
        'best/test_accuracy': 0.5,
        'best/test_loss': 2.0,
        'best/test_mean_auroc': 0.75,
    }


def test_a_board_that_is_off_writes_nothing(tmp_path):
    with tensorboard.open_writer(
        str(tmp_path), enabled=False, start=0, steps_per_epoch=1
    ) as shown:
        shown.add_config({'model': {'variant': 'L40k12'}})
        shown.add_picture('samples', str(tmp_path / 'none.png'))
        shown.add_loss(1, 1.0)
        shown.add_epoch({'step': 1, 'test_loss': 1.0}, {'test_loss': 1.0})
        shown.add_end()
    assert not any(tmp_path.iterdir())


def test_a_restart_in_the_same_second_comes_later(tmp_path):
    for start in (0, 20):  # files are read in the order of their names
        with tensorboard.open_writer(
            str(tmp_path), enabled=True, start=start, steps_per_epoch=20
        ) as shown:
            for step in range(start + 1, start + 31):
                shown.add_loss(step, float(start))
    assert steps(read(tmp_path), 'loss/step') == [*range(1, 51)]
