"""What a Keras configuration states is computed, or refused by name.

Needs h5py but not Keras: files are written here, with configurations like its own.
"""

import json
import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from flax_densenet.errors import UserError
from flax_densenet.weights import choices, keras_body, keras_layers, weight_file
from flax_densenet.weights import trained as trained_lib
from helpers.keras_networks import images, ours

BLOCKS = (1, 1, 1, 1)
FLAT = traverse_util.flatten_dict(ours(0, block_sizes=BLOCKS)[1], sep='/')
WIDTH = len(FLAT['params/norm5/scale'])


def layer(kind, name='', **settings):
    return {'class_name': kind, 'config': {'name': name or kind.lower(), **settings}}


def conv(name, size, **settings):
    settings = {'strides': [1, 1], 'padding': 'same', 'use_bias': False} | settings
    return layer(
        'Conv2D', name, kernel_size=[size] * 2, activation='linear', **settings
    )


def norm(name, epsilon=1.001e-5):
    return layer('BatchNormalization', name, epsilon=epsilon, momentum=0.99)


def relu(name):
    return layer('Activation', name, activation='relu')


def window(kind, name, size, strides, padding='valid'):
    return layer(
        kind, name, pool_size=[size] * 2, strides=[strides] * 2, padding=padding
    )


def pad(name, pixels):
    return layer('ZeroPadding2D', name, padding=[[pixels, pixels], [pixels, pixels]])


def network():
    """The layers of keras.applications, without the head."""
    layers = [pad('zero_padding2d', 3), conv('conv1_conv', 7, strides=[2, 2])]
    layers[-1]['config']['padding'] = 'valid'
    layers += [norm('conv1_bn'), relu('conv1_relu'), pad('zero_padding2d_1', 1)]
    layers += [window('MaxPooling2D', 'pool1', 3, 2)]
    for number in range(2, 6):
        name = f'conv{number}_block1'
        layers += [norm(f'{name}_0_bn'), relu(f'{name}_0_relu')]
        layers += [conv(f'{name}_1_conv', 1), norm(f'{name}_1_bn')]
        layers += [relu(f'{name}_1_relu'), conv(f'{name}_2_conv', 3)]
        layers += [layer('Concatenate', f'{name}_concat', axis=3)]
        if number < 5:
            name = f'pool{number}'
            layers += [
                norm(f'{name}_bn'),
                relu(f'{name}_relu'),
                conv(f'{name}_conv', 1),
            ]
            layers += [window('AveragePooling2D', f'{name}_pool', 2, 2)]
    return [*layers, norm('bn'), relu('relu')]


def connected(layers, *, is_old=False):
    """The layers with the names of their inputs, as Keras 3 or 2 writes them."""
    trunk = before = None
    layers = [dict(one) for one in layers]
    for one in layers:
        name, kind = one['config']['name'], one['class_name']
        if before and 'inbound_nodes' not in one:
            inputs = [trunk, before] if kind == 'Concatenate' else [before]
            one['inbound_nodes'] = nodes_of(inputs, is_old=is_old)
        if kind == 'Concatenate' or re.fullmatch('pool._pool|pool1', name):
            trunk = name
        before = name
    return layers


def nodes_of(inputs, *, is_old=False):
    if is_old:
        return [[[name, 0, 0, {}] for name in inputs]]
    tensors = [
        {'class_name': '__keras_tensor__', 'config': {'keras_history': [name, 0, 0]}}
        for name in inputs
    ]
    return [{'args': [tensors if len(tensors) > 1 else tensors[0]], 'kwargs': {}}]


def given(size):
    return layer('InputLayer', 'input', batch_shape=[None, size, size, 3])


def dense(name, units, activation='linear'):
    return layer('Dense', name, units=units, activation=activation, use_bias=True)


def average(size=2, **settings):
    return layer('AveragePooling2D', 'average', pool_size=[size] * 2, **settings)


def save(h5py, path, layers, widths=()):
    """Writes a file; `widths` are those of the Dense layers in the head."""
    names = [name for name in map(_name, _flat(layers)) if keras_layers.module_of(name)]
    rng, arrays, width = np.random.default_rng(3), {}, WIDTH
    for name in names:
        module = keras_layers.module_of(name)
        for role in (*keras_layers.NORM, 'kernel'):
            if (found := keras_layers.path_of(module, role)) in FLAT:
                arrays[f'{name}/{name}/{role}:0'] = FLAT[found]
    for number, units in enumerate(widths, start=1):
        name = f'dense_{number}'
        arrays[f'{name}/{name}/kernel:0'] = rng.normal(0, 0.3, (width, units))
        arrays[f'{name}/{name}/bias:0'] = rng.normal(0, 0.3, units)
        width = units
    with h5py.File(path, 'w') as file:
        for name, array in arrays.items():
            file[name] = np.float32(array)
        config = {'class_name': 'Functional', 'config': {'layers': layers}}
        file.attrs['model_config'] = json.dumps(config)
    return str(path)


def _flat(layers):
    for one in layers:
        inner = one['config'].get('layers')
        yield from _flat(inner) if inner else [one]


def _name(one):
    return one['config']['name']


@pytest.fixture
def load(h5py, tmp_path):
    """Loads a network with this head, for images of this size."""

    def load(head, size=64, widths=(5,), body=None, **options):
        layers = connected([given(size), *(body or network()), *head], **options)
        return weight_file.load(save(h5py, tmp_path / 'a.h5', layers, widths))

    return load


FLATTEN = layer('Flatten')
POOLINGS = {
    'covers': (64, [average(), FLATTEN]),
    'covers, Keras 2': (64, [average(strides=[2, 2], padding='same'), FLATTEN]),
    'covers 3x3': (96, [average(3, strides=[1, 1]), FLATTEN]),
    'in two steps': (128, [average(), layer('GlobalAveragePooling2D')]),
    'maximum': (64, [layer('MaxPooling2D', 'm', pool_size=[2, 2]), FLATTEN]),
    'resized': (50, [average(), FLATTEN]),
}


@pytest.mark.parametrize('case', POOLINGS)
def test_windows_of_the_whole_map_are_the_global_pooling(case, load):
    size, pooling = POOLINGS[case]
    head = [*pooling, dense('dense_1', 6, 'relu'), dense('dense_2', 5, 'softmax')]
    front = [layer('Resizing', height=64, width=64)] if case == 'resized' else []
    is_old = case == 'covers, Keras 2'
    found = load(head, size, (6, 5), [*front, *network()], is_old=is_old)
    assert (found.head_reason, found.notes, found.num_classes) == ('', (), 5)
    assert found.outputs == 'softmax' and found.module.hidden == (6,)
    assert found.module.pooling == ('max' if case == 'maximum' else 'mean')
    assert 'only at the image size of the file' in found.size_note


def test_logits_of_windows(load):
    found = load([average(3), FLATTEN, dense('dense_1', 5)], 96)
    apply, variables, x = found.module.apply, found.variables, images(96, 96)
    maps, logits = jax.jit(
        lambda x: (apply(variables, x, method='features'), apply(variables, x))
    )(x)
    assert maps.shape[1:3] == (3, 3)
    last = variables['params']['classifier']
    expected = np.maximum(maps, 0).mean((1, 2)) @ last['kernel'] + last['bias']
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_another_size_has_a_line(load):
    found = load([average(), FLATTEN, dense('dense_1', 5)])
    notes = choices.Notes()
    choices.prepare(found, {'image_size': 64}, notes)
    assert 'size' not in notes
    choices.prepare(found, {'image_size': 96}, notes)
    assert (
        'data.image_size=96: the mean over all positions is computed' in notes['size']
    )
    assert 'average (AveragePooling2D)' in notes['size']


REFUSED = {
    'windows of 2x2, which do not tile its feature map of 3x3': (
        96,
        [average(), FLATTEN],
    ),
    'windows of 2x2 of a feature map of unknown size': (None, [average(), FLATTEN]),
    'pools windows of 2x2 with strides': (128, [average(strides=[1, 1]), FLATTEN]),
    'flatten is a Flatten': (128, [average(), FLATTEN]),
    'takes the maximum of a mean': (128, [average(), layer('GlobalMaxPooling2D')]),
    'dense_1 is an unusual tanh': (
        64,
        [average(), FLATTEN, dense('dense_1', 6, 'tanh')],
    ),
    'reshape is a Reshape': (64, [average(), layer('Reshape', target_shape=[-1])]),
    'permute is a Permute': (64, [layer('Permute'), layer('GlobalAveragePooling2D')]),
    'an unusual relu': (
        64,
        [average(), FLATTEN, layer('ReLU', 'six', max_value=6.0)],
    ),
}


@pytest.mark.parametrize('reason', REFUSED)
def test_heads_that_are_refused_by_name(reason, load):
    size, head = REFUSED[reason]
    widths = [one['config']['units'] for one in head if one['class_name'] == 'Dense']
    last = dense(f'dense_{len(widths) + 1}', 5, 'softmax')
    found = load([*head, last], size, [*widths, 5])
    assert reason in found.head_reason and not found.num_classes
    with pytest.raises(UserError, match=f'cannot be computed .*{reason}'):
        trained_lib.load_trained(found.path)


def test_other_connections_of_the_head_are_refused(load):
    last = dense('dense_1', 5, 'softmax')
    pools = [
        layer('GlobalAveragePooling2D', 'mean'),
        layer('GlobalMaxPooling2D', 'max'),
    ]
    pools[1]['inbound_nodes'] = nodes_of(['relu'])
    both = layer('Concatenate', 'both') | {'inbound_nodes': nodes_of(['mean', 'max'])}
    assert 'max takes relu, not mean' in load([*pools, both, last]).head_reason
    early = layer('GlobalAveragePooling2D') | {
        'inbound_nodes': nodes_of(['pool4_relu'])
    }
    assert 'takes pool4_relu, not relu' in load([early, last]).head_reason
    inner = layer('Functional', 'inner', layers=connected([given(64), *network()]))
    inner['config']['output_layers'] = [['pool4_relu', 0, 0], ['relu', 0, 0]]
    found = load([layer('GlobalAveragePooling2D'), last], body=[inner])
    assert 'inner is a model with several outputs' in found.head_reason


@pytest.mark.parametrize('is_nested', [True, False])
@pytest.mark.parametrize(
    'strange',
    [pad('strange', 16), pad('strange', 3), window('MaxPooling2D', 'strange', 2, 2)],
)
def test_layers_in_front_are_not_those_of_the_network(strange, is_nested, load, caplog):
    head = [layer('GlobalAveragePooling2D'), dense('dense_1', 5, 'softmax')]
    front = [layer('Rescaling', scale=1 / 255, offset=0.0), dict(strange)]
    body = network()
    if is_nested:
        body = [layer('Functional', 'b', layers=connected([given(64), *body]))]
    found = load(head, body=[front[0], *body])
    assert not found.unread and found.preprocessing['mean'] == (0.0, 0.0, 0.0)
    found = load(head, body=[*front, *(body if is_nested else network())])
    named = f'its layer strange ({strange["class_name"]})'
    assert found.unread == named and found.num_classes == 5
    with pytest.raises(UserError, match=re.escape(named)):
        choices.check_read(found, {})
    caplog.set_level('WARNING', 'flax_densenet')
    choices.check_read(found, {'mean': (0.5,) * 3, 'std': (0.5,) * 3})
    assert named in caplog.text and 'only data.mean and data.std' in caplog.text


CHANGES = {
    r'pool1 \(AveragePooling2D\) stands where a DenseNet has: MaxPooling2D': (
        'pool1',
        window('AveragePooling2D', 'pool1', 3, 2),
    ),
    r'pool1 \(MaxPooling2D\) has strides=1x1, not 2x2': (
        'pool1',
        window('MaxPooling2D', 'pool1', 3, 1),
    ),
    r'pool3_pool \(MaxPooling2D\) stands where .*: AveragePooling2D or Batch': (
        'pool3_pool',
        window('MaxPooling2D', 'pool3_pool', 2, 2),
    ),
    r'conv4_block1_0_relu \(swish\) stands where a DenseNet has: ReLU': (
        'conv4_block1_0_relu',
        layer('Activation', 'conv4_block1_0_relu', activation='swish'),
    ),
    r'relu_6 \(ReLU\) stands': (
        'conv1_relu',
        layer('ReLU', 'relu_6', max_value=6.0),
    ),
    r'conv1_conv \(Conv2D\) has strides=1x1, not 2x2': (
        'conv1_conv',
        conv('conv1_conv', 7, padding='valid'),
    ),
    r'conv5_block1_2_conv \(Conv2D\) has dilation_rate=2x2, not 1x1': (
        'conv5_block1_2_conv',
        conv('conv5_block1_2_conv', 3, dilation_rate=[2, 2]),
    ),
    r'conv2_block1_concat takes conv2_block1_2_conv, pool1, not pool1, conv2': (
        'conv2_block1_concat',
        layer('Concatenate', 'conv2_block1_concat')
        | {'inbound_nodes': nodes_of(['conv2_block1_2_conv', 'pool1'])},
    ),
    r'several values of epsilon \(1.001e-05, 0.001\)': (
        'conv3_block1_1_bn',
        norm('conv3_block1_1_bn', epsilon=1e-3),
    ),
    r'conv1_conv \(Conv2D\) has padding=valid, not same': ('zero_padding2d', None),
}


@pytest.mark.parametrize('reason', CHANGES)
def test_other_networks_are_refused_by_name(reason, load):
    name, other = CHANGES[reason]
    body = [other if _name(one) == name else one for one in network()]
    head = [layer('GlobalAveragePooling2D'), dense('dense_1', 5, 'softmax')]
    assert load(head).num_classes == 5
    with pytest.raises(UserError, match=reason):
        load(head, body=[one for one in body if one])


def test_map_sizes():
    parts = keras_body.split({'layers': [*network(), layer('Flatten')]})
    sizes = [parts.map_size(size) for size in (32, 64, 95, 224, (300, 193), None)]
    assert sizes == [(1, 1), (2, 2), (3, 3), (7, 7), (9, 6), None]


@pytest.mark.parametrize('name', ['global_max_pooling2d', 'average_pooling2d_3'])
def test_files_without_a_configuration_name_their_pooling(name, h5py, tmp_path):
    path = save(h5py, tmp_path / 'a.h5', network(), (5,))
    with h5py.File(path, 'r+') as file:
        del file.attrs['model_config']
    assert weight_file.load(path).num_classes == 5
    with h5py.File(path, 'r+') as file:
        file.create_group(f'layers/{name}')
    with pytest.raises(UserError, match='its classifier .*; save the whole model'):
        weight_file.load(path)
