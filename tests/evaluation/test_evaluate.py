"""Figures against a calculation by hand; classes matched by name."""

import jax
import numpy as np
import pytest

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.data import dataset
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.evaluation import evaluate
from flax_densenet.weights import trained
from helpers.marks import slow_after
from helpers.networks import compiled
from helpers.runs import tiny_trained, write_images

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def test_normalize():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    expected = (images / 255 - np.array(MEAN)) / np.array(STD)
    found = trained.normalize(images, mean=MEAN, std=STD)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('devices', 'batch_size'),
    slow_after(2, [(1, 4), (4, 24), (1, 16), (1, 24), (4, 4), (4, 16)]),
)
def test_figures(batch_size, devices, tmp_path):
    """The last batch is short for 16: its padding must not count."""
    photos = write_images(tmp_path, {'a': 60, 'b': 50})
    source = dataset.load_source(f'folder:{photos}', image_size=8)
    examples = source.test
    module = create_model('BC-L10k4', num_classes=2)
    variables = init_variables(module, 1)
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    found = evaluate.evaluate(
        module,
        mesh_lib.replicate(variables, mesh),
        examples,
        batch_size=batch_size,
        mesh=mesh,
        mean=MEAN,
        std=STD,
    )
    images = np.stack([examples[i]['image'] for i in range(22)])
    normal = ((images / 255 - MEAN) / STD).astype(np.float32)
    logits = np.asarray(compiled(module)(variables, normal), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(22), examples.labels]
    assert found['count'] == 22
    assert found['accuracy'] == (logits.argmax(-1) == examples.labels).mean()
    assert found['loss'] == pytest.approx(losses.mean(), rel=1e-5)


def test_classes_are_matched_by_name(tmp_path):
    photos = write_images(tmp_path, {'bees': 5, 'wasps': 5})
    source = dataset.load_source(f'folder:{photos}', image_size=8)
    names = ('ants', 'bees', 'flies', 'wasps')
    examples = evaluate.match_classes(source.train, source.class_names, names)
    assert set(examples.labels) == {1, 3}
    assert examples.labels.tolist() == (2 * source.train.labels + 1).tolist()
    same = evaluate.match_classes(source.train, ('bees', 'wasps'), ('bees', 'wasps'))
    assert same is source.train
    with pytest.raises(UserError, match='class wasps is not one of the classes'):
        evaluate.match_classes(source.train, source.class_names, names[:3])
    with pytest.raises(UserError, match='class bees is not .* rename it to Bees'):
        evaluate.match_classes(source.train, ('bees',), ('Ants', 'Bees'))


def test_numbers_of_an_earlier_version_are_matched(tmp_path, capsys):
    """It named the class 001 of a table 1."""
    photos = write_images(tmp_path, {'001': 5, '002': 5})
    source = dataset.load_source(f'folder:{photos}', image_size=8)
    capsys.readouterr()
    examples = evaluate.match_classes(source.train, ('001', '002'), ('0', '1', '2'))
    assert examples.labels.tolist() == (source.train.labels + 1).tolist()
    out = capsys.readouterr().out
    assert 'the classes 001, 002 are measured as those of the model without' in out
    for names in (('1', '3'), ('001', '1')):
        with pytest.raises(UserError, match='is not one of the classes'):
            evaluate.match_classes(source.train, ('001', '002'), names)


def test_classes_without_names_are_told(tmp_path, capsys):
    photos = write_images(tmp_path, {'bees': 5, 'wasps': 5})
    source = dataset.load_source(f'folder:{photos}', image_size=8)
    assert evaluate.match_classes(source.train, ('b', 'w'), None, count=2) is (
        source.train
    )
    assert 'are assumed to be the classes of the data in this order: b, w' in (
        capsys.readouterr().out
    )


def test_format():
    line = evaluate.format_metrics('Test', {'accuracy': 0.93333, 'loss': 0.27})
    assert line == 'Test_acc: 93.3%, Test_loss: 0.270'


@pytest.mark.slow
def test_soft_targets_are_unknown_to_metrics(tmp_path):
    photos = write_images(tmp_path / 'photos', {'x': 24})
    cells = ['1', '0', '-1', '0', '1']
    rows = [f'{n:03}.jpg,{cells[n % 5]},{cells[n % 3]}' for n in range(24)]
    (tmp_path / 't.csv').write_text('\n'.join(['image,ill,old', *rows]))
    found = []
    for meaning in ('soft', 'ignore'):
        source = dataset.load_source(
            f'folder:{photos}',
            labels=str(tmp_path / 't.csv'),
            uncertain_labels=meaning,
            image_size=8,
            test_fraction=0.5,
        )
        model = tiny_trained(source)
        outputs = evaluate.compute_outputs(model, source.test, batch_size=8)
        metrics = evaluate.evaluate(
            *(model.module, model.variables, source.test),
            batch_size=8,
            mesh=model.mesh,
            mean=tuple(model.metadata['mean']),
            std=tuple(model.metadata['std']),
        )
        found.append((source.test.labels, outputs.labels, metrics))
    (soft, *seen), (unknown, *expected) = found
    assert ((soft > 0.5) & (soft < 1)).any() and np.isnan(unknown).any()
    np.testing.assert_array_equal(seen[0], expected[0])
    assert seen[1] == expected[1]
