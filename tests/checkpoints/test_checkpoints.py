"""Which checkpoints are kept, and what is said of those that cannot be read."""

import math

import jax
import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import writer as checkpoint_writer
from flax_densenet.distributed import mesh as mesh_lib

ACCURACIES = [0.5, 0.9, math.nan, 0.9, 0.7]
LOSSES = [0.9, 0.2, math.nan, 0.3, 0.8]


@pytest.fixture
def workdir(tmp_path):
    with checkpoint_writer.open_saver(str(tmp_path)) as saver:
        for number, (accuracy, loss) in enumerate(
            zip(ACCURACIES, LOSSES, strict=True), start=1
        ):
            array = np.full((3, 2), number, np.float32)
            saver.save(
                checkpoint_reader.Checkpoint(10 * number),
                model={'a': array},
                train={'b': array + 1},
                metadata={'number': number},
                records=[],
                metrics={'test_accuracy': np.float32(accuracy), 'test_loss': loss},
            )
    return tmp_path


def test_the_best_and_the_two_latest_are_kept(workdir):
    names = sorted(path.name for path in (workdir / 'checkpoints').iterdir())
    # Equal accuracies: the lower loss is the better. Not a number is never the best.
    assert names == ['20', '40', '50']
    assert checkpoint_reader.find_step(str(workdir), 'latest') == 50
    assert checkpoint_reader.find_step(str(workdir), 'best') == 20
    assert checkpoint_reader.load_json(str(workdir), 20, 'metadata') == {'number': 2}


@pytest.mark.slow
@pytest.mark.parametrize('devices', [1, 3, 4])
def test_restore_on_any_number_of_devices(workdir, devices):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    shape = {'a': jax.ShapeDtypeStruct((3, 2), np.float32)}
    items = checkpoint_reader.restore(
        str(workdir), 20, sharding=mesh_lib.replicated(mesh), model=shape
    )
    assert items.keys() == {'model'}
    assert len(items['model']['a'].sharding.device_set) == devices
    np.testing.assert_array_equal(items['model']['a'], np.full((3, 2), 2))


def test_no_checkpoint(tmp_path):
    assert not checkpoint_reader.has_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match='holds no checkpoint; train there first'):
        checkpoint_reader.find_step(str(tmp_path), 'best')
    with pytest.raises(UserError, match='no checkpoint: there is no such file or fold'):
        checkpoint_reader.find_step(str(tmp_path / 'birds.pth'), 'best')


def test_an_unfinished_checkpoint_is_none(workdir):
    (workdir / 'checkpoints' / '60.orbax-checkpoint-tmp').mkdir()
    assert checkpoint_reader.find_step(str(workdir), 'latest') == 50


def test_unreadable_metadata(workdir):
    (workdir / 'checkpoints' / '50' / 'metadata' / 'metadata').write_text('{"numb')
    with pytest.raises(UserError, match='checkpoints/50 is not intact'):
        checkpoint_reader.load_json(str(workdir), 50, 'metadata')
