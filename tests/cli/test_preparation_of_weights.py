"""Fields that prepare images, for weights of other programs: each command uses them."""

import csv
import json

import numpy as np
import pytest

from flax_densenet.serving import server
from flax_densenet.weights import trained as trained_lib
from helpers.commands import make_main
from helpers.runs import write_images
from helpers.weight_files import state_dict, write_safetensors

NAMES = '--class_names=a,b,c,d,e'
FIELDS = {
    'mean': '(0.1,)',
    'std': '(0.6,)',
    'resize': 'stretch',
    'image_size': '(40,56)',
    'interpolation': 'bicubic',
    'channels': '1',
}
SET = [f'--config.data.{name}={value}' for name, value in FIELDS.items()]


@pytest.fixture
def main(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'photos', dict.fromkeys('abcde', 2), size=(70, 50))
    write_safetensors('x.safetensors', state_dict())
    return make_main(monkeypatch, capfd)


def predict(main, *arguments):
    """Probabilities by file, and what was said."""
    status, _, err = main(
        'predict', *arguments, 'photos', '--out=rows.jsonl', '--top=5'
    )
    assert status == 0, err
    with open('rows.jsonl') as file:
        rows = [json.loads(line) for line in file]
    return {
        row['path']: {one['class']: one['probability'] for one in row['classes']}
        for row in rows
    }, err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_all_commands_prepare_images_alike(main, monkeypatch):
    usual, said = predict(main, 'x.safetensors', NAMES)
    assert 'does not say how images are prepared' in said
    chosen, said = predict(main, 'x.safetensors', NAMES, *SET)
    assert 'for data.channels=1 its first convolution is summed' in said
    assert 'crop_fraction=0.875 are assumed' in said or 'assumed' not in said
    assert all(chosen[path] != usual[path] for path in usual)
    status, _, err = main(
        *('eval', 'x.safetensors', '--config.data.source=folder:photos', NAMES, *SET),
        '--config.data.batch_size=4',
    )
    assert status == 0, err
    with open('ckpt/x-eval/predictions.csv') as file:
        for row in csv.DictReader(file):
            found = {name: float(row[f'probability_{name}']) for name in 'abcde'}
            assert found == pytest.approx(chosen[row['path']], abs=1e-5)
    status, _, err = main('export', 'x.safetensors', 'y.safetensors', NAMES, *SET)
    assert status == 0, err
    again, _ = predict(main, 'y.safetensors')
    for path, shares in again.items():
        assert shares == pytest.approx(chosen[path], abs=1e-5)
    served = []

    def run(model, listener, **_):
        listener.close()
        served.append(model)

    monkeypatch.setattr(server, 'run', run)
    assert main('serve', 'x.safetensors', '--port=0', NAMES, *SET)[0] == 0
    found = trained_lib.preparation_of(served[0].metadata)
    assert (found.shape, found.channels, found.resize) == ((40, 56), 1, 'stretch')
    assert found.interpolation == 'bicubic'
    assert served[0].metadata['mean'] == pytest.approx([0.1])


@pytest.mark.slow
def test_a_recipe_prepares_where_the_file_does_not(main, tmp_path):
    text = (
        'from configs import base\n\n\ndef get_config():\n'
        '    config = base.get_config()\n'
        '    config.data.image_size = [40, 56]\n    config.data.std = (0.5,) * 3\n'
        '    return config\n'
    )
    (tmp_path / 'mine.py').write_text(text)
    by_flags, _ = predict(
        *(main, 'x.safetensors', NAMES, '--config.data.image_size=40,56'),
        '--config.data.std=(0.5,0.5,0.5)',
    )
    by_recipe, said = predict(main, 'x.safetensors', NAMES, '--config=mine.py')
    assert 'data.image_size=(40,56), data.std=(0.5,0.5,0.5) of the recipe' in said
    assert by_recipe == by_flags
    arrays = state_dict() | {'mean': np.full(3, 0.5), 'std': np.full(3, 0.2)}
    arrays = {f'net.{k}' if '.' in k else k: v for k, v in arrays.items()}
    write_safetensors(
        'z.safetensors', {k: np.asarray(v, 'f4') for k, v in arrays.items()}
    )
    said = predict(main, 'z.safetensors', NAMES, '--config=mine.py')[1]
    assert 'data.image_size=(40,56) of the recipe' in said  # the file says its std


@pytest.mark.parametrize(
    ('field', 'message'),
    [
        ('image_size=(4,64)', 'images of 4x64 are too small'),
        ('image_size=(8,64,3)', 'must be pixels'),
        ('image_size=70000', 'must be from 1 to 65536'),
        ('mean=(0.5,0.5)', 'data.mean=(0.5,0.5): give a number for each of 3 channels'),
        ('mean=0.5', 'give a number for each of 3 channels'),
        ('std=(0.5,0.5,0)', 'data.std=(0.5,0.5,0) must be above 0'),
        ('resize=fold', 'data.resize=fold is not known; use stretch, crop'),
        ('interpolation=nearest', 'data.interpolation=nearest is not known'),
        ('crop_fraction=1.5', 'data.crop_fraction=1.5 must be above 0 and at most 1'),
        ('channels=300', 'data.channels=300 must be from 1 to 256'),
        ('augment=flip', '--config.data.augment: '),
    ],
)
def test_values_that_cannot_be_used(main, field, message):
    field = f'--config.data.{field}'
    status, _, err = main('predict', 'x.safetensors', 'photos', NAMES, field)
    assert status == 2 and message in err and err.count('\n') == 1


def test_a_share_of_no_crop_is_refused(main):
    fields = ['--config.data.resize=stretch', '--config.data.crop_fraction=0.5']
    status, _, err = main('predict', 'x.safetensors', 'photos', NAMES, *fields)
    assert status == 2
    assert 'data.crop_fraction=0.5 has no effect with data.resize=stretch' in err
