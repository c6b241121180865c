"""Pickles of whole networks and of other projects' settings, written without torch."""

import collections
import io
import logging
import pickle
import re
import sys
import types
import zipfile

import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.weights import choices, torch_pickle, weight_file
from helpers import torch_trees
from helpers.weight_files import assert_same, state_dict, tiny

ARRAYS = state_dict()


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, 'flax_densenet')
    return lambda: [record.getMessage() for record in caplog.records]


def renamed(pattern, new, arrays=ARRAYS):
    return {re.sub(pattern, new, name): array for name, array in arrays.items()}


class _Tensor:
    def __init__(self, array):
        self.array = np.ascontiguousarray(array)

    def __reduce_ex__(self, protocol):
        strides = tuple(n // self.array.itemsize for n in self.array.strides)
        rebuild = sys.modules['torch._utils']._rebuild_tensor_v2
        return rebuild, (
            _Storage(self.array),
            0,
            self.array.shape,
            strides,
            False,
            None,
        )


class _Storage:
    def __init__(self, array):
        self.array = array


def save_torch(path, content, *, sources=False):
    """`torch.save` of before 1.6 (with `sources`) or of today, without torch."""
    kinds = {'f': 'FloatStorage', 'i': 'LongStorage'}
    storages = []
    modules = [sys.modules[name] for name in FAKES if '.modules.' in name]
    classes = [
        kind
        for one in modules
        if sources
        for kind in vars(one).values()
        if isinstance(kind, type)
    ]

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if (
                isinstance(value, type) and value in classes
            ):  # with its source, the first time
                classes.remove(value)
                return 'module', value, 'file.py', 'source'
            if not isinstance(value, _Storage):
                return None
            storages.append(value.array)
            kind = getattr(sys.modules['torch'], kinds[value.array.dtype.kind])
            view = [None] if sources else []
            return (
                'storage',
                kind,
                str(len(storages) - 1),
                'cpu',
                value.array.size,
                *view,
            )

    def dump(value):
        file = io.BytesIO()
        Pickler(file, 2).dump(value)
        return file.getvalue()

    pickled = dump(content)
    if not sources:
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('x/data.pkl', pickled)
            for number, array in enumerate(storages):
                archive.writestr(f'x/data/{number}', array.tobytes())
        return str(path)
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    keys = pickle.dumps([str(number) for number in range(len(storages))], 2)
    rest = [np.int64(array.size).tobytes() + array.tobytes() for array in storages]
    head = magic + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    path.write_bytes(head + pickled + keys + b''.join(rest))
    return str(path)


FAKES = {
    'torch': ['FloatStorage', 'LongStorage'],
    'torch._utils': [],
    **torch_trees.MODULES,
    'proj': ['Settings', 'Net'],
}


@pytest.fixture
def fakes(monkeypatch):
    """Modules that a pickle can name; reading it must not need them."""
    made = {}
    for module in ('torch.nn', 'torch.nn.modules', 'torchvision', 'torchvision.models'):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    for module, names in FAKES.items():
        fake = types.ModuleType(module)
        for name in names:
            setattr(fake, name, type(name, (), {'__module__': module}))
            made[name] = getattr(fake, name)
        monkeypatch.setitem(sys.modules, module, fake)

    def _rebuild_tensor_v2():
        raise AssertionError('ran')

    _rebuild_tensor_v2.__module__ = 'torch._utils'
    _rebuild_tensor_v2.__qualname__ = '_rebuild_tensor_v2'
    sys.modules['torch._utils']._rebuild_tensor_v2 = _rebuild_tensor_v2
    return types.SimpleNamespace(**made)


def tensors(arrays=ARRAYS):
    return collections.OrderedDict((k, _Tensor(v)) for k, v in arrays.items())


def module_of(kind):
    made = kind()
    made.__dict__.update(_parameters={}, _buffers={}, _modules={}, training=False)
    return made


def pickled_module(kinds, arrays, *, outer, last=()):
    """A tree of modules with these arrays; `last` come behind the classifier."""
    root = torch_trees.build(
        {name: _Tensor(array) for name, array in arrays.items()},
        lambda kind: getattr(kinds, kind)(),
        outer=outer(),
    )
    for number, kind in enumerate(last, start=1):
        root._modules['classifier']._modules[str(number)] = module_of(kind)
    return root


@pytest.mark.parametrize('sources', [False, True])
@pytest.mark.parametrize('nested', [False, True])
def test_whole_modules(sources, nested, fakes, tmp_path):
    arrays = renamed('^classifier', 'classifier.0')
    last = (fakes.Sigmoid,)
    module = pickled_module(fakes, arrays, outer=fakes.DenseNet, last=last)
    content = {'model': module, 'epoch': 3} if nested else module
    path = save_torch(tmp_path / 'x.pth', content, sources=sources)
    found = weight_file.load(path)
    assert_same(found.variables, tiny()[1])
    assert found.outputs == 'sigmoid'
    settled = choices.settle(found, choices.NO_CHOICES)
    assert settled.outputs == 'sigmoid' and 'outputs' not in settled.notes
    module = pickled_module(fakes, arrays, outer=fakes.DenseNet, last=(fakes.Tanh,))
    found = weight_file.load(save_torch(tmp_path / 'y.pth', module, sources=sources))
    assert found.head == ('classifier.1 (Tanh)',)
    module = pickled_module(fakes, arrays, outer=fakes.Net)
    with pytest.raises(UserError, match=r'needs proj.Net, .* none of it was run'):
        weight_file.load(save_torch(tmp_path / 'z.pth', module, sources=sources))


def test_settings_of_unknown_classes(fakes, tmp_path):
    settings = fakes.Settings()
    settings.__dict__.update(lr=0.1)
    content = {
        'state_dict': tensors(renamed('^', 'model.')),
        'hyper_parameters': {'all': settings, 'kind': fakes.Settings},
        'class_to_idx': {name: 4 - n for n, name in enumerate('abcde')},
    }
    found = weight_file.load(save_torch(tmp_path / 'x.ckpt', content))
    assert_same(found.variables, tiny()[1])
    assert found.class_names == tuple('edcba')
    content['state_dict']['model.features.norm0.bias'] = settings
    path = save_torch(tmp_path / 'x.ckpt', content)
    with pytest.raises(
        UserError, match=r'model.features.norm0.bias, which is not an array'
    ):
        weight_file.load(path)
    content['state_dict'] = settings
    with pytest.raises(UserError, match=r'needs proj.Settings'):
        weight_file.load(save_torch(tmp_path / 'x.ckpt', content))


@pytest.mark.parametrize('sources', [False, True])
def test_layers_of_other_kinds_in_the_body(sources, fakes, tmp_path):
    for place, kind, usual in (
        ('relu0', 'Tanh', 'ReLU'),
        ('pool0', 'AvgPool2d', 'Max'),
    ):
        module = pickled_module(fakes, ARRAYS, outer=fakes.DenseNet)
        module._modules['features']._modules[place] = module_of(getattr(fakes, kind))
        path = save_torch(tmp_path / 'x.pth', module, sources=sources)
        message = f'its features.{place} is {kind} where a DenseNet has {usual}'
        with pytest.raises(UserError, match=message):
            weight_file.load(path)


@pytest.mark.parametrize(
    'values',
    [
        {'stride': [[2, 2], [2, 2]]},
        {'stride': 'x\ny'},
        {'kernel_size': None},
        {'padding': 3.5},
        {'dilation': (1,) * 9, 'groups': 2},
    ],
)
def test_odd_settings_are_one_line_or_left_out(values, fakes, tmp_path):
    module = pickled_module(fakes, ARRAYS, outer=fakes.DenseNet)
    vars(module._modules['features']._modules['conv0']).update(values)
    path = save_torch(tmp_path / 'x.pth', module)
    if 'stride' in values and isinstance(values['stride'], list):
        weight_file.load(path)
        return
    with pytest.raises(UserError, match='its features.conv0 has') as error:
        weight_file.load(path)
    assert '\n' not in str(error.value)


def test_getattr_in_settings_is_inert(fakes, tmp_path):
    """Bound methods and members of enumerations are pickled with it."""
    content = {
        'state_dict': tensors(),
        'hyper_parameters': {'method': 'abc'.upper, 'names': list('edcba')},
        'class_names': list('edcba'),
    }
    found = weight_file.load(save_torch(tmp_path / 'x.ckpt', content))
    assert found.class_names == tuple('edcba')


@pytest.mark.parametrize(
    'change',
    [
        b'}X\x0c\0\0\0__defaults__K\x07\x85sb',
        b'N}X\x0c\0\0\0__defaults__K\x07\x85s\x86b',
        b'}X\x09\0\0\0_functionNsb',
        b'N}X\x09\0\0\0_functionNs\x86b',
    ],
)
def test_a_pickle_cannot_change_what_it_calls(change, tmp_path):
    """Or all later files would be read with it."""
    path = tmp_path / 'x.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        known = b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n'
        archive.writestr('x/data.pkl', known + change + b'.')
    before = torch_pickle._rebuild_tensor.__defaults__, torch_pickle._TENSOR._function
    with pytest.raises(UserError, match='it changes what it should only call'):
        weight_file.load(str(path))
    after = torch_pickle._rebuild_tensor.__defaults__, torch_pickle._TENSOR._function
    assert before == after


def test_an_average_beside_the_weights(fakes, tmp_path, lines):
    zeros = {name: np.zeros_like(array) for name, array in ARRAYS.items()}
    content = {'state_dict': tensors(zeros), 'state_dict_ema': tensors()}
    found = weight_file.load(save_torch(tmp_path / 'x.ckpt', content))
    assert_same(found.variables, tiny()[1])
    assert 'the moving average state_dict_ema is used' in lines()[0]
