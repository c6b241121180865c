"""The recipes: the paper's cells as configs, and two steps of training by each."""

import importlib
import re

import jax
import numpy as np
import pytest

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.kernels import xla_block
from flax_densenet.train import fit
from helpers.marks import exhaustive_after
from helpers.networks import compiled
from helpers.paths import ROOT
from helpers.runs import plain, write_images

RECIPES = sorted(
    path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem != 'base'
)
# Table 2: parameters with 10 classes.
SMALL = {
    '40_12': 1_019_722,
    '100_12': 6_979_642,
    '100_24': 27_249_082,
    'bc_100_12': 769_162,
    'bc_250_24': 15_324_406,
    'bc_190_40': 25_624_430,
}
IMAGENET = {
    '121': 7_978_856,
    '161': 28_681_000,
    '169': 14_149_480,
    '201': 20_013_928,
    '264': 33_337_704,
}
QUICK_PARAMETERS = 281_866


def recipe(name, *argument):
    return importlib.import_module(f'configs.{name}').get_config(*argument)


@pytest.mark.parametrize('name', SMALL)
def test_the_small_models_of_the_paper(name):
    for column, argument in (
        *(('cifar', name), ('cifar', f'{name}+')),
        *(('cifar100', name), ('cifar100', f'{name}+'), ('svhn', name)),
    ):
        config = plain(recipe(column, argument))
        network = create_model(num_classes=10, **config['model'])
        assert network.count_parameters() == SMALL[name]
        augmented = argument.endswith('+')
        assert network.dropout_rate == (0.0 if augmented else 0.2)
        assert config['data']['augment'] == ('shift_flip' if augmented else 'none')
        assert config['data']['batch_size'] == 64
        assert config['train']['epochs'] == (40 if column == 'svhn' else 300)
        optimizer = config['optimizer']
        assert (optimizer['name'], optimizer['learning_rate']) == ('sgd', 0.1)
        assert (optimizer['momentum'], optimizer['weight_decay']) == (0.9, 1e-4)
        assert (optimizer['schedule'], optimizer['drop_at']) == ('steps', (0.5, 0.75))


@pytest.mark.parametrize('name', IMAGENET)
def test_the_large_models_of_the_paper(name):
    config = plain(recipe('imagenet', name))
    network = create_model(num_classes=1000, **config['model'])
    assert network.count_parameters() == IMAGENET[name]
    assert [round(90 * share) for share in config['optimizer']['drop_at']] == [30, 60]
    data = config['data']
    assert data['image_size'] / data['crop_fraction'] == 256


def test_the_authors_code():
    config = plain(recipe('cifar', '40_12,code'))['model']
    assert config['initializer'] == 'he_fan_out'
    assert config['dropout_after'] == 'every_conv'
    assert config['stem_features'] == 24
    assert recipe('cifar', 'bc_100_12+,code').model.stem_features == 24
    assert recipe('cifar', 'BC-L100k12+') == recipe('cifar')
    assert recipe('imagenet', '121,code').model.initializer == 'he_fan_out'


def dropped(network, seed=0):
    """Shares of zeros in what each convolution of a training pass is followed by."""
    images = np.random.default_rng(0).standard_normal((4, 16, 16, 3))
    variables = init_variables(network, 0)
    drawn = []

    def look(x, key, rate):
        y = drop_out(x, key, rate)
        drawn.append((x.shape[-1], np.asarray(y == 0)))
        return y

    drop_out = xla_block.drop_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla_block, 'drop_out', look)
        network.apply(
            variables,
            images.astype(np.float32),
            train=True,
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(seed)},
        )
    return drawn


@pytest.mark.exhaustive
@pytest.mark.slow
def test_where_values_drop_out():
    """Ports: after each 3x3. The authors' code: after all but the first convolution."""
    fields = dict(num_classes=3, block_sizes=(2, 1), stem_features=8, dropout_rate=0.25)
    fields |= dict(fast=False)
    ports = create_model('BC-L10k4', **fields)
    code = ports.clone(dropout_after='every_conv')
    assert [width for width, _ in dropped(ports)] == [4, 4, 4]
    found = dropped(code)
    # Twice the 1x1 to 16 and the 3x3, the transition to 8, once more.
    assert [width for width, _ in found] == [16, 4, 16, 4, 8, 16, 4]
    for _, zeros in found:
        assert abs(zeros.mean() - 0.25) < 0.05
    for (_, one), (_, other) in zip(found, dropped(code, seed=1), strict=True):
        assert (one != other).any()
    # Nothing drops out twice alike, nor in evaluation.
    assert not np.array_equal(found[1][1], found[3][1])
    fast = code.clone(fast=True)
    assert [width for width, _ in dropped(fast)] == [16, 4, 16, 4, 8, 16, 4]
    variables = init_variables(code, 0)
    images = np.ones((2, 16, 16, 3), np.float32)
    np.testing.assert_allclose(
        compiled(code)(variables, images), compiled(ports)(variables, images), rtol=1e-6
    )


def test_the_quick_one_is_small():
    config = plain(recipe('cifar', 'quick'))
    network = create_model(num_classes=10, **config['model'])
    assert network.count_parameters() == QUICK_PARAMETERS
    assert config['data']['augment'] == 'flip'


def test_what_cannot_be():
    with pytest.raises(UserError, match='dropout_after=all is not known; use conv3x3'):
        create_model('BC-L10k4', num_classes=3, dropout_after='all')
    with pytest.raises(UserError, match='native does not support this dropout'):
        create_model(
            'BC-L10k4', num_classes=3, dropout_after='every_conv', kernel='native'
        )
    for name in ('cifar', 'imagenet'):
        with pytest.raises(ValueError, match='fast is not known; use 121 or 121,code'):
            recipe(name, '121,fast')
    with pytest.raises(
        ValueError, match='quik is not known; use .* rate, quick, or the name'
    ):
        recipe('cifar', 'quik')
    with pytest.raises(ValueError, match='quik is not known; use .* rate, or the name'):
        recipe('svhn', 'quik')


OFTEN = ('chexnet', 'densenet121', 'rdnet')
WITH_WEIGHTS = ('finetune', 'linear_probe')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'argument'),
    exhaustive_after(
        2,
        [('cifar', 'quick')]
        + [(name, None) for name in OFTEN]
        + [('cifar', '40_12,code')]
        + [(name, None) for name in RECIPES if name not in OFTEN + WITH_WEIGHTS],
    ),
)
def test_two_steps(name, argument, tmp_path):
    """Of each recipe, with a shallow network and small images of its own."""
    config = plain(recipe(name, *[argument] * (argument is not None)))
    labels = config['data']['labels']
    names = {'a': 12, 'b': 12}
    photos = write_images(tmp_path / 'photos', names, size=(40, 40))
    config['data'] |= {'source': f'folder:{photos}', 'tfds_train': ''}
    if labels:
        rows = [f'{c}/{n:03}.jpg,{n % 2},{n % 3 % 2}' for c in names for n in range(12)]
        (tmp_path / 'labels.csv').write_text('image,x,y\n' + '\n'.join(rows) + '\n')
        config['data']['labels'] = str(tmp_path / 'labels.csv')
    if name == 'rdnet':
        shallow = {'block_sizes': (1, 1), 'growth_rates': (8, 8), 'halvings': (1,)}
        shallow |= {'stem_features': 16, 'squeeze_blocks': (2,)}
    else:
        shallow = {'block_sizes': (1,), 'growth_rate': 4, 'stem_features': 8}
    config['model'] |= shallow
    config['data'] |= {'image_size': 32, 'batch_size': 8, 'test_fraction': 1 / 3}
    config['optimizer']['warmup_epochs'] = min(
        config['optimizer']['warmup_epochs'], 0.5
    )
    config['train'] |= {'epochs': 1, 'tensorboard': False, 'report': False}
    best = fit.fit(config, str(tmp_path / 'run')).best
    assert best['epoch'] == 1 and np.isfinite(best['train_loss'])
    assert best['train_count'] == 16


def test_each_recipe_is_told_of():
    """In the list of docs/options.md and, with its command, in docs/recipes.md."""
    places = {'options': r'^\| .*`{}[`:]', 'recipes': r'configs/{}\.py'}
    for place, pattern in places.items():
        text = (ROOT / 'docs' / f'{place}.md').read_text()
        for name in RECIPES:
            assert re.search(pattern.format(name), text, re.M), (place, name)
