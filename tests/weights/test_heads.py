"""Heads of several layers: their logits are those of the network they are from."""

import re

import jax
import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.export import formats
from flax_densenet.weights import (
    head_layers,
    torch_head,
    torch_layers,
    transfer,
    weight_file,
)
from flax_densenet.weights import trained as trained_lib
from helpers.marks import slow_after
from helpers.weight_files import state_dict, tiny, write_safetensors

ARRAYS = state_dict()
WIDTH = ARRAYS['classifier.weight'].shape[1]
BODY = {k: v for k, v in ARRAYS.items() if 'classifier' not in k}
IMAGES = np.random.default_rng(1).normal(0, 1, (3, 32, 32, 3)).astype(np.float32)


def linear(place, inputs, outputs, bias=True):
    rng = np.random.default_rng(inputs + outputs)
    made = {f'{place}.weight': rng.normal(0, 0.3, (outputs, inputs))}
    made |= {f'{place}.bias': rng.normal(0, 1, outputs)} if bias else {}
    return {name: array.astype(np.float32) for name, array in made.items()}


def norm(place, width):
    rng = np.random.default_rng(width)
    made = {leaf: rng.uniform(0.5, 1.5, width) for leaf in ('weight', 'running_var')}
    made |= {leaf: rng.normal(0, 0.5, width) for leaf in ('bias', 'running_mean')}
    return {f'{place}.{leaf}': a.astype(np.float32) for leaf, a in made.items()} | {
        f'{place}.num_batches_tracked': np.array(3)
    }


def dense(x, arrays, place):
    return x @ arrays[f'{place}.weight'].T + arrays.get(f'{place}.bias', 0)


def normalized(x, arrays, place):
    weight, bias, mean, var = (
        arrays[f'{place}.{leaf}']
        for leaf in ('weight', 'bias', 'running_mean', 'running_var')
    )
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def relu(x):
    return np.maximum(x, 0)


@pytest.fixture(scope='module')
def maps():
    """The last feature maps, before the last ReLU."""
    module, variables = tiny()
    apply = jax.jit(lambda v, x: module.apply(v, x, method='features'))
    return np.asarray(apply(variables, IMAGES))


def logits_of(found):
    """Of a loaded file, and of the same written by us and loaded again."""
    apply = jax.jit(found.module.apply)
    return np.asarray(apply(found.variables, IMAGES))


def dropout_head(x, arrays):
    x = relu(x).mean((1, 2))
    return dense(relu(dense(x, arrays, 'classifier.0')), arrays, 'classifier.3')


def fastai_head(x, arrays):
    x = np.concatenate([x.max((1, 2)), x.mean((1, 2))], -1)
    x = relu(dense(normalized(x, arrays, '1.2'), arrays, '1.4'))
    return dense(normalized(x, arrays, '1.6'), arrays, '1.8')


def named_head(x, arrays):
    x = relu(x).mean((1, 2))
    x = relu(dense(x, arrays, 'classifier.fc1'))
    return dense(relu(dense(x, arrays, 'classifier.a')), arrays, 'classifier.out')


def norm_head(x, arrays):
    x = normalized(relu(x).mean((1, 2)), arrays, 'head.0')
    x = dense(dense(x, arrays, 'head.1'), arrays, 'head.2')
    return dense(relu(normalized(x, arrays, 'head.3')), arrays, 'head.6')


def cut_head(x, arrays):
    return dense(x.mean((1, 2)), arrays, '3')


def whole_head(x, arrays):
    return dense(relu(x).mean((1, 2)), arrays, '5')


def last_norm_head(x, arrays):
    x = dense(relu(x).mean((1, 2)), arrays, 'net.fc.1')
    return normalized(x, arrays, 'net.fc.2')


def square_head(x, arrays):
    x = relu(x).mean((1, 2))
    return dense(relu(dense(x, arrays, 'fc.0')), arrays, 'fc.3')


def head_without_bias(x, arrays):
    return dense(relu(x).mean((1, 2)), arrays, 'classifier')


HEADS = {
    dropout_head: (
        linear('classifier.0', WIDTH, 16) | linear('classifier.3', 16, 5),
        'features.',
        r'Linear\(\d+, 16\), ReLU, Linear\(16, 5\): a ReLU between 0 and 3$',
    ),
    fastai_head: (
        norm('1.2', 2 * WIDTH)
        | linear('1.4', 2 * WIDTH, 16, bias=False)
        | norm('1.6', 16)
        | linear('1.8', 16, 5, bias=False),
        '0.0.',
        r'BatchNorm\(16\), Linear\(16, 5\): .* as in fastai, maximum and mean',
    ),
    named_head: (
        linear('classifier.a', 16, 8)
        | linear('classifier.fc1', WIDTH, 16)
        | linear('classifier.out', 8, 5),
        'features.',
        'a ReLU between fc1 and a, a and out$',
    ),
    norm_head: (
        norm('head.0', WIDTH)
        | linear('head.1', WIDTH, 16)
        | linear('head.2', 16, 12, bias=False)
        | norm('head.3', 12)
        | linear('head.6', 12, 5),
        'body.',
        'a ReLU between 2 and 6; no bias in head.2; epsilon is 1e-05$',
    ),
    square_head: (
        linear('fc.0', WIDTH, WIDTH) | linear('fc.3', WIDTH, 5),
        'features.',
        'a ReLU between 0 and 3$',
    ),
    head_without_bias: (
        linear('classifier', WIDTH, 5, bias=False),
        'features.',
        r'Linear\(\d+, 5\): no bias in classifier$',
    ),
    cut_head: (linear('3', WIDTH, 5), '0.', 'no ReLU between the last norm and'),
    whole_head: (linear('5', WIDTH, 5), '0.', ': a ReLU between the last norm and'),
    last_norm_head: (
        linear('net.fc.1', WIDTH, 4) | norm('net.fc.2', 4),
        'net.body.',
        'epsilon is 1e-05$',
    ),
}


def arrays_of(head):
    arrays, body, _ = HEADS[head]
    return {re.sub('^features.', body, k): v for k, v in BODY.items()} | arrays


@pytest.mark.parametrize('head', slow_after(1, HEADS), ids=lambda head: head.__name__)
def test_logits(head, maps, tmp_path):
    found = weight_file.load(write_safetensors(tmp_path / 'x', arrays_of(head)))
    assert len(found.notes) == 1 and re.search(HEADS[head][2], found.notes[0])
    expected = head(maps, HEADS[head][0])
    assert found.num_classes == expected.shape[1]
    made = logits_of(found)
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize('head', [fastai_head, dropout_head])
def test_there_and_back(head, tmp_path):
    """Our own file of it tells everything, so that it says no line."""
    path = write_safetensors(tmp_path / 'x', arrays_of(head))
    trained = trained_lib.load_trained(path)
    assert re.search(HEADS[head][2], trained.notes['head'])
    again = str(tmp_path / 'again.safetensors')
    formats.save(again, trained, 'safetensors')
    own = trained_lib.load_trained(again)
    assert not own.notes and own.module == trained.module
    jax.tree.map(np.testing.assert_array_equal, own.variables, trained.variables)
    for file_format, name in (('torch', 'x.pth'), ('keras', 'x.keras')):
        with pytest.raises(UserError, match='a head of several layers'):
            formats.save(str(tmp_path / name), trained, file_format)
    # Training takes the rest.
    weights = weight_file.load(path)
    fresh = tiny(num_classes=5)[1]
    started = transfer.first_variables(weights, fresh, tuple('abcde'))
    for name, kernel in (('conv0', tiny()[1]), ('classifier', fresh)):
        expected = kernel['params'][name]['kernel']
        np.testing.assert_array_equal(started['params'][name]['kernel'], expected)


@pytest.mark.parametrize(
    ('arrays', 'reason'),
    [
        # One after the other, but the ReLU can be on either side of the norm.
        (
            linear('classifier.0', WIDTH, 16)
            | norm('classifier.2', 16)
            | linear('classifier.4', 16, 5),
            'it is unclear where the ReLU between 0 and 4 is',
        ),
        (
            linear('classifier.a', WIDTH, WIDTH)
            | linear('classifier.b', WIDTH, WIDTH)
            | linear('classifier.c', WIDTH, 5),
            r'a, classifier.b, classifier.c\).*order of its layers is unclear',
        ),
        (
            linear('classifier.fc1', WIDTH, 16)
            | norm('classifier.bn', 16)
            | linear('classifier.fc2', 16, 5),
            'the order of its layers is unclear',
        ),
        (linear('classifier.a', WIDTH, 16) | linear('out', 16, 5), 'different modules'),
        (
            linear('classifier', WIDTH, 5) | linear('se.fc', WIDTH, 4),
            'different modules',
        ),
        (
            linear('classifier_a', WIDTH, 5) | linear('classifier_b', WIDTH, 3),
            'unclear',
        ),
        (linear('arc', WIDTH, 5, bias=False), 'arc has no bias'),
        (
            {'classifier.0.weight': np.ones(WIDTH, np.float32)}
            | {'classifier.0.bias': np.ones(WIDTH, np.float32)}
            | linear('classifier.1', WIDTH, 5),
            'classifier.0 is neither',
        ),
        (
            {'classifier.weight_g': np.ones((5, 1), np.float32)}
            | {'classifier.weight_v': np.ones((5, WIDTH), np.float32)},
            'classifier is neither',
        ),
        (
            {'classifier.weight': np.ones((5, WIDTH, 1, 1), np.float32)},
            'classifier is neither',
        ),
        (
            linear('classifier.0', 2 * WIDTH, 16) | linear('classifier.3', 16, 5),
            f'takes {2 * WIDTH} inputs, the network has {WIDTH}',
        ),
        (
            linear('classifier.0', WIDTH, 16) | linear('classifier.3', 8, 5),
            r'Linear\(8, 5\) behind 16 outputs',
        ),
        (
            linear('classifier.0', WIDTH, 16)
            | {'classifier.1.weight': np.ones(1, np.float32)}
            | linear('classifier.2', 16, 5),
            'classifier.1 is neither',
        ),
    ],
)
def test_heads_that_nobody_can_tell(arrays, reason, tmp_path):
    path = write_safetensors(tmp_path / 'x', BODY | arrays)
    with pytest.raises(UserError, match=reason):
        trained_lib.load_trained(path)


def layers_of(*kinds):
    names = {f'classifier.{n}': f'torch.nn.modules.x.{k}' for n, k in enumerate(kinds)}
    classifier = {'classifier': 'torch.nn.modules.container.Sequential'}
    outer = {'': 'torchvision.models.densenet.DenseNet'}
    return torch_layers.Layers.of(outer | classifier | names)


def test_pickled_modules_tell_all_layers():
    arrays = linear('classifier.0', WIDTH, 16) | norm('classifier.2', 16)
    arrays |= linear('classifier.4', 16, 5)
    x = np.random.default_rng(0).normal(0, 1, (4, WIDTH))
    first = dense(x, arrays, 'classifier.0')
    truths = {
        ('ReLU', 'Dropout'): normalized(relu(first), arrays, 'classifier.2'),
        ('Dropout', 'ReLU'): relu(normalized(first, arrays, 'classifier.2')),
        ('Dropout', 'Identity'): normalized(first, arrays, 'classifier.2'),
    }
    for (one, two), truth in truths.items():
        kinds = ('Linear', one, 'BatchNorm1d', two, 'Linear', 'Sigmoid')
        head = torch_head.read(
            arrays, width=WIDTH, body='features.', layers=layers_of(*kinds)
        )
        assert not head.guess
        made = x
        count = len(head.arrays) // 2
        for n in range(1, count + 1):
            place = f'params/classifier/layer{n}' if count > 1 else 'params/classifier'
            made = relu(made) if n > 1 else made
            made = made @ head.arrays[f'{place}/kernel'] + head.arrays[f'{place}/bias']
        truth = dense(truth, arrays, 'classifier.4')
        np.testing.assert_allclose(made, truth, rtol=1e-4, atol=1e-4)
    kinds = ('Linear', 'Tanh', 'BatchNorm1d', 'ReLU', 'Linear')
    with pytest.raises(head_layers.Unreadable, match=r'classifier.1 is a Tanh'):
        torch_head.read(arrays, width=WIDTH, body='features.', layers=layers_of(*kinds))


def test_the_order_of_layers_is_bounded():
    """A file with many layers of one width would have factorially many orders."""
    layers = {
        f'dense_{n}': head_layers.Linear(np.ones((4, 4)), None) for n in range(20)
    }
    with pytest.raises(head_layers.Unreadable, match='it has 20 layers'):
        head_layers.find_order(layers, 4)
    few = {
        'out': head_layers.Linear(np.ones((3, 2)), None),
        'hidden': head_layers.Linear(np.ones((4, 3)), None),
    }
    assert head_layers.find_order(few, 4) == ('hidden', 'out')
