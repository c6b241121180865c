"""Weights as other programs leave them: names, activations, preparation, containers."""

import json
import logging
import re

import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.weights import (
    choices,
    heads,
    keras_head,
    torch_matcher,
    transfer,
    weight_file,
)
from flax_densenet.weights import trained as trained_lib
from helpers.networks import compiled
from helpers.weight_files import assert_same, state_dict, tiny, write_safetensors

# A DenseNet of torch: its children are features and classifier.
ARRAYS = state_dict()


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, 'flax_densenet')
    return lambda: [record.getMessage() for record in caplog.records]


def renamed(pattern, new, arrays=ARRAYS):
    return {re.sub(pattern, new, name): array for name, array in arrays.items()}


def written(tmp_path, arrays, name='x.safetensors'):
    return write_safetensors(tmp_path / name, arrays)


@pytest.mark.parametrize(
    ('pattern', 'new'),
    [
        *((r'^features\.', new) for new in ('base.', '0.', 'backbone.', '')),
        *(('^', new) for new in ('net.', 'model._orig_mod.module.', '_orig_mod.')),
        (r'^features\.(.*denselayer\d+)\.', r'features.\1._orig_mod.'),
        (r'(denselayer\d+)\.', r'\1.layers.'),
        (r'(denselayer\d+\.(norm|conv))(\d)', r'\1.\3'),
        (r'^classifier', 'class_layers.out'),
        (r'^classifier', 'my_own_output'),
        (r'^features', 'model.encoder'),
    ],
)
def test_names_of_arrays(pattern, new, tmp_path, lines):
    found = weight_file.load(written(tmp_path, renamed(pattern, new)))
    assert_same(found.variables, tiny()[1])
    assert not lines()


def test_children_of_a_sequential(tmp_path):
    names = ['conv0', 'norm0', 'relu0', 'pool0', 'denseblock1', 'transition1']
    arrays = dict(ARRAYS)
    for number, name in enumerate([*names, 'denseblock2', 'norm5']):
        arrays = renamed(rf'^features\.{name}\.', f'0.{number}.', arrays)
    arrays = renamed('^classifier', '1', arrays)
    assert_same(weight_file.load(written(tmp_path, arrays)).variables, tiny()[1])


@pytest.mark.parametrize('prefix', ['', 'model.'])
@pytest.mark.parametrize(
    'name',
    [
        *('criterion.pos_weight', 'loss_fn.weight', 'train_auroc.thresholds'),
        *('val_metrics.auroc.confmat', 'n_averaged', 'focal_loss.alpha'),
    ],
)
def test_arrays_beside_the_network(prefix, name, tmp_path, lines):
    arrays = renamed('^', prefix) | {name: np.ones(5, np.float32)}
    found = weight_file.load(written(tmp_path, arrays))
    assert_same(found.variables, tiny()[1])
    (line,) = lines()
    assert 'not part of the network' in line and name in line


def test_arrays_inside_the_network_are_all_accounted_for(tmp_path):
    for name in ('features.extra.weight', 'attention.weight'):
        arrays = renamed('^', 'model.', ARRAYS | {name: np.ones(5, np.float32)})
        with pytest.raises(UserError, match=f'1 unexpected: .*{name}'):
            weight_file.load(written(tmp_path, arrays))
    missing = {k: v for k, v in ARRAYS.items() if 'denseblock2.denselayer3' not in k}
    with pytest.raises(UserError, match='does not fit'):
        weight_file.load(written(tmp_path, renamed('^', 'net.', missing)))


@pytest.mark.parametrize(
    ('one', 'other'),
    [('model.', 'ema_model.'), ('', 'ema.module.'), ('a.student.', 'a.ema.net.')],
)
def test_the_moving_average_is_preferred(one, other, tmp_path, lines):
    zeros = {name: np.zeros_like(array) for name, array in ARRAYS.items()}
    arrays = renamed('^', one, zeros) | renamed('^', other)
    found = weight_file.load(written(tmp_path, arrays))
    assert_same(found.variables, tiny()[1])
    assert 'holds the network twice' in lines()[0] and other in lines()[0]
    assert sum('moving average' in line for line in lines()) == 1


def test_two_networks(tmp_path, lines):
    zeros = {name: np.zeros_like(array) for name, array in ARRAYS.items()}
    path = written(tmp_path, renamed('^', 'a.', zeros) | renamed('^', 'b.'))
    with pytest.raises(UserError, match=r'holds 2 networks, as a.features. and b.feat'):
        weight_file.load(path)
    path = written(tmp_path, renamed('^', 'a.') | renamed('^', 'b.'))
    assert_same(weight_file.load(path).variables, tiny()[1])
    assert 'holds the same network' in lines()[0]


def chained():
    """A Linear behind a whole DenseNet, which has a classifier."""
    more = {'1.weight': np.ones((2, 5), np.float32), '1.bias': np.ones(2, np.float32)}
    return renamed('^', '0.') | more


def test_a_head_that_cannot_be_computed(tmp_path, lines):
    """The rest can be trained; whoever predicts is told."""
    path = written(tmp_path, chained())
    found = weight_file.load(path)
    assert found.num_classes == 0 and len(found.head) > 1
    with pytest.raises(UserError, match='its head .*cannot be computed.*different mod'):
        trained_lib.load_trained(path)
    fresh = tiny(num_classes=2)[1]
    made = transfer.first_variables(found, fresh, ('a', 'b'))
    for name, kernel in (('conv0', tiny()[1]), ('classifier', fresh)):
        expected = kernel['params'][name]['kernel']
        np.testing.assert_array_equal(made['params'][name]['kernel'], expected)


def test_means_in_front_of_the_network(tmp_path, lines):
    more = {
        '0.mean': np.array([10, 20, 30], np.float32).reshape(3, 1, 1),
        '0.std': np.array([51, 102, 255], np.float32).reshape(3, 1, 1),
    }
    found = weight_file.load(written(tmp_path, renamed('^', '1.') | more))
    assert found.preprocessing['std'] == (0.2, 0.4, 1.0)
    assert found.preprocessing['mean'] == pytest.approx((10 / 255, 20 / 255, 30 / 255))
    assert '0.mean and 0.std are used' in lines()[0]


def settled(tmp_path, arrays=ARRAYS, **chosen):
    weights = weight_file.load(written(tmp_path, arrays))
    return choices.settle(weights, choices.make(**chosen))


def test_everything_assumed_is_told(tmp_path):
    found = settled(tmp_path)
    assert found.outputs is None and found.class_names is None
    notes = found.notes
    assert 'numbered from 0' in notes['names'] and '--class_names' in notes['names']
    assert 'a softmax' in notes['outputs'] and '--outputs=' in notes['outputs']
    assert 'mean=(0.485,0.456,0.406)' in notes['preparation']
    chosen = settled(
        tmp_path, class_names='a,b,c,d,e', outputs='sigmoid', data={'mean': (0, 0, 0)}
    )
    assert chosen.class_names == tuple('abcde') and chosen.outputs == 'sigmoid'
    assert list(chosen.notes) == ['preparation']
    assert 'mean' not in chosen.notes['preparation']
    assert chosen.weights.preprocessing['mean'] == (0, 0, 0)


@pytest.mark.parametrize(
    ('chosen', 'message'),
    [
        ({'class_names': 'a,b'}, '2 names, but .* has 5 outputs'),
        ({'class_names': 'a,b,c,d,a'}, 'names a twice'),
        ({'class_names': 'a,,c,d,e'}, 'a name is empty'),
        ({'class_names': 'names.txt'}, 'there is no such file'),
        ({'outputs': 'relu'}, '--outputs=relu is not known; use softmax, sigmoid'),
        ({'data': {'mean': (0.5,)}}, 'data.mean=.*a number for each of 3 channels'),
        ({'data': {'std': (0, 1, 1)}}, 'data.std=.* must be above 0'),
        ({'data': {'mean': (123.0, 117.0, 104.0)}}, r'mean=\(0.4824,0.4588,0.4078\)'),
        ({'data': {'std': (58, 57, 57)}}, r'divide it by 255: data.std=\(0.2275,'),
        ({'data': {'resize': 'fold'}}, 'data.resize=fold is not known'),
        ({'data': {'crop_fraction': 2.0}}, 'data.crop_fraction=2.0 must be'),
        ({'data': {'image_size': -1}}, 'data.image_size=-1 must be'),
        ({'data': {'source': 'x'}}, 'source is not one of'),
    ],
)
def test_choices_that_cannot_be(chosen, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        settled(tmp_path, **chosen)


@pytest.mark.slow
def test_one_output(tmp_path):
    """Two classes, whose softmax is the sigmoid of the output."""
    arrays = state_dict(num_classes=1)
    found = settled(tmp_path, arrays, class_names='normal,pneumonia')
    assert found.class_names == ('normal', 'pneumonia') and found.outputs == 'softmax'
    images = np.random.default_rng(0).normal(size=(3, 40, 40, 3)).astype(np.float32)
    one = tiny(num_classes=1)
    logit = np.asarray(compiled(one[0])(one[1], images))[:, 0]
    two = np.asarray(compiled(found.weights.module)(found.weights.variables, images))
    np.testing.assert_allclose(two[:, 1] - two[:, 0], logit, rtol=1e-4)
    assert len(set(logit.tolist())) == 3
    plain = settled(tmp_path, arrays)
    assert plain.class_names == ('negative', 'positive')
    assert '--class_names=A,B' in plain.notes['names'] and 'outputs' not in plain.notes
    single = settled(tmp_path, arrays, binary=False)
    assert (single.class_names, single.outputs) == (('positive',), 'sigmoid')
    named = settled(tmp_path, arrays, class_names='pneumonia')
    assert (named.class_names, named.outputs) == (('pneumonia',), 'sigmoid')
    with pytest.raises(UserError, match='of one output is always 1'):
        settled(tmp_path, arrays, outputs='softmax')


@pytest.mark.parametrize(
    ('count', 'channels', 'first', 'outputs'),
    [
        (14, 3, 'Atelectasis', 'sigmoid'),
        (18, 1, 'Atelectasis', 'sigmoid'),
        (1000, 3, 'tench', None),
    ],
)
def test_known_numbers_of_outputs(count, channels, first, outputs, tmp_path):
    arrays = state_dict(num_classes=count, channels=channels)
    found = settled(tmp_path, arrays)
    assert found.class_names[0] == first and len(set(found.class_names)) == count
    assert found.outputs == (outputs or 'softmax')
    assert 'assumed' in found.notes['names'] and 'outputs' not in found.notes
    other = settled(tmp_path, arrays, class_names=[f'my {n}' for n in range(count)])
    assert other.known is None and 'names' not in other.notes


def test_known_names_in_the_spelling_of_data(tmp_path, lines):
    """A folder for each class of ImageNet, in the words of other lists."""
    known = heads.find_known(1000, channels=3)
    theirs = [f'{name.replace(" ", "_")}, synonym' for name in known.class_names]
    assert known.spelled_as(theirs[::-1]) == tuple(theirs)
    assert known.spelled_as(['n01484850']) == known.others[0]
    assert known.spelled_as(['great_white_shark', 'TENCH'])[:2] == ('TENCH', 'goldfish')
    assert known.spelled_as(['tench', 'house']) is None
    assert known.spelled_as(['tench', 'Tench']) is None
    found = weight_file.load(written(tmp_path, state_dict(num_classes=1000)))
    names = tuple(sorted(theirs))
    made = transfer.first_variables(found, tiny(num_classes=1000)[1], names)
    order = [theirs.index(name) for name in names]
    kernel = found.variables['params']['classifier']['kernel'][:, order]
    np.testing.assert_array_equal(made['params']['classifier']['kernel'], kernel)


def test_files_of_names(tmp_path):
    path = tmp_path / 'names.txt'
    path.write_text('b c\na, of a kind\n')
    assert heads.read_names(str(path)) == ('b c', 'a, of a kind')
    for found in (['b', 'a'], {'a': 1, 'b': 0}, {'1': 'a', '0': 'b'}):
        path.write_text(json.dumps(found))
        assert heads.read_names(str(path)) == ('b', 'a')
    path.write_text('{"a": 1, "b": 3}')
    with pytest.raises(UserError, match='it does not hold a list of names'):
        heads.read_names(str(path))


def test_the_order_that_is_assumed_in_training(tmp_path, lines):
    names = ('0', '1', '10', '11', '2')
    found = weight_file.load(written(tmp_path, ARRAYS))
    made = transfer.first_variables(found, tiny()[1], names)
    assert_same(made, tiny()[1])
    (line,) = lines()
    assert '0 is 0, 1 is 1, 2 is 10' in line and '2 is 2, 3 is 10' in line
    assert 'timm' in line and '--class_names' in line


def test_training_pairs_outputs_by_name(tmp_path, lines):
    found = weight_file.load(written(tmp_path, ARRAYS))
    fields = dict.fromkeys(choices.PREPARATION)
    found = transfer.settle(found, fields, tuple('edcba'))
    assert 'data.' in lines()[0] and len(lines()) == 1
    made = transfer.first_variables(found, tiny()[1], tuple('abcde'))
    expected = tiny()[1]['params']['classifier']['kernel'][:, ::-1]
    np.testing.assert_array_equal(made['params']['classifier']['kernel'], expected)
    with pytest.raises(UserError, match='3 names, but .* has 5 outputs'):
        transfer.settle(found, fields, tuple('abc'))


def test_channels_that_are_chosen(tmp_path):
    found = settled(tmp_path, data={'channels': 1}).weights
    assert found.variables['params']['conv0']['kernel'].shape[2] == 1
    assert found.preprocessing['mean'] == pytest.approx((0.449,), abs=1e-3)


def layer(kind, **settings):
    return {'class_name': kind, 'config': settings}


NETWORK = layer('Functional', layers=[layer('Conv2D'), layer('BatchNormalization')])


def operation(kind, value):
    tensor = {'class_name': '__keras_tensor__', 'config': {}}
    nodes = [{'args': [tensor, value], 'kwargs': {}}]
    return layer(kind) | {'inbound_nodes': nodes}


@pytest.mark.parametrize(
    ('front', 'mean', 'std'),
    [
        ([layer('Rescaling', scale=1 / 255, offset=0)], 0, 1),
        ([layer('Rescaling', scale=1 / 127.5, offset=-1)], 0.5, 0.5),
        ([operation('TrueDivide', 127.5), operation('Subtract', 1.0)], 0.5, 0.5),
        (
            [operation('Subtract', [51.0] * 3), operation('Multiply', 0.01)],
            0.2,
            1 / 2.55,
        ),
        ([layer('Normalization', mean=[127.5], variance=[2601.0])], 0.5, 0.2),
        (
            [
                layer('Sequential', layers=[layer('Rescaling', scale=0.01, offset=0)]),
                layer('RandomFlip'),
            ],
            0,
            1 / 2.55,
        ),
    ],
)
def test_layers_in_front_of_keras(front, mean, std):
    found = keras_head.read({'layers': [*front, NETWORK, layer('Dense')]}, {})
    assert not found.unread
    assert found.preparation['mean'] == pytest.approx((mean,) * 3)
    assert found.preparation['std'] == pytest.approx((std,) * 3)


def test_sizes_of_keras():
    size = {'height': 3, 'width': 4, 'crop_to_aspect_ratio': True}
    front = [layer('InputLayer', batch_shape=[None, 90, 60, 3])]
    made = [keras_head.read({'layers': [*front, NETWORK]}, {})]
    front.append(layer('Resizing', **size))
    made.append(keras_head.read({'layers': [*front, NETWORK]}, {}))
    assert [one.preparation['image_size'] for one in made] == [(90, 60), (3, 4)]
    assert made[1].preparation['resize'] == 'crop'


@pytest.mark.parametrize(
    'strange',
    [
        layer('Lambda', name='swap'),
        layer('GetItem'),
        layer('Rescaling', scale=-1.0, offset=0),
        layer('Normalization'),
        layer('Resizing', height=3, width=4, interpolation='nearest'),
        operation('Power', 2.0),
    ],
)
def test_layers_that_cannot_be_read(strange):
    front = [layer('Rescaling', scale=1.0, offset=0), strange]
    found = keras_head.read({'layers': [*front, NETWORK]}, {})
    assert found.unread and 'mean' not in found.preparation


@pytest.mark.parametrize(
    ('last', 'outputs'),
    [
        ([layer('Dense', activation='sigmoid')], 'sigmoid'),
        ([layer('Dense', activation='softmax')], 'softmax'),
        ([layer('Dense', activation='linear')], None),
        ([layer('Dense', activation='linear'), layer('Softmax')], 'softmax'),
        ([layer('Dense'), layer('Activation', activation='sigmoid')], 'sigmoid'),
        (
            [layer('Functional', layers=[layer('Dense', activation='sigmoid')])],
            'sigmoid',
        ),
    ],
)
def test_activations_of_keras(last, outputs):
    assert keras_head.read({'layers': [NETWORK, *last]}, {}).outputs == outputs


@pytest.mark.slow
def test_shuffled_renamed_duplicated_and_dropped_arrays(tmp_path):
    """What loads is the truth, whatever was done to names; all else is refused."""
    rng, loaded = np.random.default_rng(0), 0
    for _ in range(300):
        arrays = dict(ARRAYS)
        names = list(arrays)
        changed = False
        for _ in range(rng.integers(0, 3)):
            kind = rng.integers(4)
            name = str(rng.choice(names))
            if name not in arrays or name.endswith('num_batches_tracked'):
                continue
            if kind == 0:
                del arrays[name]
                changed = True
            elif kind == 1:
                arrays[f'{name}x'] = arrays.pop(name)
                changed = True
            elif kind == 2:
                arrays[f'copy.{name}'] = arrays[name] + 1
            else:
                prefix = str(rng.choice(['net.', 'a.b.', 'module.', '0.']))
                arrays = {f'{prefix}{k}': v for k, v in arrays.items()}
                names = list(arrays)
        order = list(arrays)
        rng.shuffle(order)
        shuffled = {name: arrays[name] for name in order}
        try:
            match = torch_matcher.match('x', shuffled)
            del match
            found = weight_file.load(written(tmp_path, shuffled))
        except UserError:
            continue
        loaded += 1
        assert not changed or found.num_classes == 0
        variables = found.variables
        if found.num_classes:
            assert_same(variables, tiny()[1])
    assert loaded > 50
