"""Reads PyTorch weight files without PyTorch, and without running code from the file.

A `.pth` file is a pickle, which could call any function when it is loaded. Here, each
name in it is either in a short allowlist (tensors, storages, plain containers) or
becomes an inert record that holds data and computes nothing. The records are enough to
read pickled modules of torch, torchvision, MONAI and torchxrayvision, and to tolerate
settings of unknown classes next to the weights. A file is refused if it names functions
that start programs or change files.
"""

import collections
import dataclasses
import functools
import io
import lzma
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from typing import Any

import ml_dtypes
import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.weights import pickle_guard

# torch stores arrays uncompressed. A file that expands by more than this factor is not
# a weight file. The same holds if arrays that share storages add up to that much.
_EXPANSION = 20
_SMALL = 2**24
_MOST_OBJECTS = 200_000
_DTYPES = {
    'DoubleStorage': np.float64,
    'FloatStorage': np.float32,
    'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16,
    'LongStorage': np.int64,
    'IntStorage': np.int32,
    'ShortStorage': np.int16,
    'CharStorage': np.int8,
    'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Packages with networks that compute what their arrays say.
_NETWORKS = re.compile(
    r'(torch\.nn|torchvision\.models|torchxrayvision|timm|monai\.networks)\..*'
)
# Weights never need these; a file that names one is an attack.
_HARMFUL = {
    'os': None,
    'posix': None,
    'nt': None,
    'subprocess': None,
    'sys': None,
    'shutil': None,
    'runpy': None,
    'pty': None,
    'socket': None,
    'ctypes': None,
    'importlib': None,
    'webbrowser': None,
    'builtins': {'eval', 'exec', 'compile', '__import__', 'open', 'breakpoint'},
}
_MOST_CLASSES = 2000
# Attributes of layers that change what they compute.
_SETTINGS = (
    *('kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode', 'eps'),
    *('ceil_mode', 'return_indices', 'divisor_override', 'filt_size', 'pad_mode'),
    'dim',
)


@dataclasses.dataclass(eq=False)
class _Storage:
    dtype: Any
    key: str
    count: int
    data: np.ndarray | None = None  # of legacy files, which have it after the pickle


@dataclasses.dataclass
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Record:
    """An object in the file as plain data.

    Attributes:
      name: name of its class or of the function that made it, with the module.
      fields: `{name: value}`.
    """

    name = ''

    def __new__(cls, *args, **kwargs):
        record = super().__new__(cls)
        record.fields = {}
        return record

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) == 2:
            state = {**(state[0] or {}), **(state[1] or {})}
        if isinstance(state, dict):
            self.fields.update(state)

    # The operations that pickles apply to containers.
    def __setitem__(self, key, value):
        self.fields[key] = value

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def add(self, value):
        pass

    def update(self, *args):
        pass


def _rebuild_tensor(storage, offset, shape, strides, *_):
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError('a tensor without a storage')
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    last = int(offset) + sum(
        (n - 1) * s for n, s in zip(shape, strides, strict=True) if n
    )
    # More elements than are stored: a tensor that repeats its storage.
    fits = math.prod(shape) <= storage.count and last < max(storage.count, 1)
    if int(offset) < 0 or min((*shape, *strides, 0)) < 0 or not fits:
        raise pickle.UnpicklingError('a tensor that goes beyond its storage')
    return _Tensor(storage, int(offset), shape, strides)


def _rebuild_from_type(function, kind, arguments, state):
    """A subclass of `Tensor`, such as fastai's."""
    if function not in (_TENSOR, _PARAMETER):
        raise pickle.UnpicklingError('a tensor of an unknown kind')
    return function(*arguments)


class _Callable:
    """A function that a pickle can call but not change.

    Pickles can set attributes of the objects that they name. With a plain function,
    changed defaults would stay for all later files.
    """

    __slots__ = ('_function',)

    def __init__(self, function):
        object.__setattr__(self, '_function', function)

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError('it changes what it should only call')

    def __setstate__(self, state):
        raise pickle.UnpicklingError('it changes what it should only call')


_TENSOR = _Callable(_rebuild_tensor)
_PARAMETER = _Callable(lambda data, *_: data)
_KNOWN = {
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('torch._utils', '_rebuild_tensor_v2'): _TENSOR,
    ('torch._utils', '_rebuild_tensor'): _TENSOR,
    ('torch._utils', '_rebuild_parameter'): _PARAMETER,
    ('torch._utils', '_rebuild_parameter_with_state'): _PARAMETER,
    ('torch._tensor', '_rebuild_from_type_v2'): _Callable(_rebuild_from_type),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, what):
        super().__init__(file, encoding='latin1')
        self._file = file
        self._what = what
        self._classes = {}
        self.storages = {}

    def load(self):
        pickle_guard.check(self._file)
        return super().load()

    def find_class(self, module, name):
        module = {'__builtin__': 'builtins'}.get(module, module)  # of protocol 2
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == 'torch' and name in _DTYPES:
            return self._record(name, name)
        harmful = _HARMFUL.get(module.partition('.')[0], ())
        if harmful is None or name in harmful:
            raise refusal(self._what, f'{module}.{name}')
        return self._record(name, f'{module}.{name}')

    def _record(self, name, whole_name):
        # A class takes 1 KB, and a file can name one a million times.
        if whole_name not in self._classes:
            if len(self._classes) >= _MOST_CLASSES:
                raise pickle.UnpicklingError('it names too many classes')
            made = type(name, (Record,), {'name': whole_name})
            self._classes[whole_name] = made
        return self._classes[whole_name]

    def persistent_load(self, saved):
        if saved[0] == 'module':  # a class with its source, before torch 1.6
            return saved[1]
        kind, storage_type, key, _, count, *view = saved
        name = getattr(storage_type, 'name', '')
        if kind != 'storage' or name not in _DTYPES or (view and view[0] is not None):
            raise pickle.UnpicklingError(f'a storage of an unknown kind ({name})')
        storage = _Storage(_DTYPES[name], str(key), int(count))
        return self.storages.setdefault(storage.key, storage)


def refusal(path: str, name: str) -> UserError:
    """The error for weights that need code from another project."""
    return UserError(
        f'{path} needs {name}, but weights need no code; none of it was run. '
        'If you trust the file, load it in torch and save only the weights: '
        'torch.save(model.state_dict(), FILE)'
    )


def read(path: str) -> Any:
    """Reads a file written by `torch.save`, with each tensor as a numpy array.

    Args:
      path: a file in either format: a zip archive (since torch 1.6) or a sequence of
        pickles (before).

    Returns:
      The saved containers, with lists for tuples, float32 for float16 and bfloat16,
      `Module` for pickled modules and `Record` for other objects.

    Raises:
      UserError: the file is corrupt, of another kind, or needs code to be read.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_archive(path, archive)
        with open(path, 'rb') as file:
            return _read_legacy(path, file)
    except (
        *(pickle.UnpicklingError, EOFError, zipfile.BadZipFile, OSError, ValueError),
        *(AttributeError, ImportError, IndexError, KeyError, TypeError, MemoryError),
        *(ArithmeticError, RecursionError, NotImplementedError, RuntimeError),
        *(AssertionError, struct.error, zlib.error, lzma.LZMAError),
    ) as error:
        if isinstance(error, UserError):
            raise
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'{path} is not a valid torch file ({reason})') from error


@dataclasses.dataclass(frozen=True)
class Module:
    """A pickled module.

    Attributes:
      name: qualified name of its class.
      arrays: `{key in state_dict(): array}`.
      attributes: plain values of the outermost module.
      layers: `{name of a module: its class}` of all modules inside, in order.
      settings: `{name of a module: {name of an attribute: plain value}}` of these, only
        attributes that change what a layer computes.
    """

    name: str
    arrays: dict[str, np.ndarray]
    attributes: dict[str, Any]
    layers: dict[str, str]
    settings: dict[str, dict[str, Any]]

    @property
    def foreign(self) -> str | None:
        """The first unknown class, which may compute anything, or None."""
        names = [self.name, *self.layers.values()]
        return next((name for name in names if not _NETWORKS.fullmatch(name)), None)


def _read_archive(path, archive):
    names = archive.namelist()
    members = [name for name in names if name.rpartition('/')[2] == 'data.pkl']
    if len(members) != 1 or any('/code/' in name for name in names):
        raise UserError(
            f'{path} is a TorchScript archive or another zip file; save the weights '
            'with torch.save(model.state_dict(), FILE)'
        )
    root = members[0].removesuffix('data.pkl')
    order = f'{root}byteorder'
    if order in names and _read_member(archive, order) != b'little':
        raise UserError(f'{path} was saved on a big-endian machine; save it again')
    saved = _Unpickler(io.BytesIO(_read_member(archive, members[0])), path).load()

    def load_storage(storage):
        size = storage.count * np.dtype(storage.dtype).itemsize
        raw = _read_member(archive, f'{root}data/{storage.key}')
        if len(raw) < size:
            raise pickle.UnpicklingError(f'storage {storage.key} is cut short')
        return np.frombuffer(raw, storage.dtype, storage.count)

    return _Resolver(load_storage, os.path.getsize(path)).resolve(saved)


def _read_member(archive, name):
    """A member of the archive, unless it is a decompression bomb."""
    entry = archive.getinfo(name)
    if entry.file_size > max(_SMALL, _EXPANSION * entry.compress_size):
        raise pickle.UnpicklingError(f'{name} of {entry.file_size} bytes is too large')
    return archive.read(entry)


def _read_legacy(path, file):
    if _Unpickler(file, path).load() != _LEGACY_MAGIC:
        raise UserError(
            f'{path} is a pickle, but not one of torch.save; save the weights with '
            'torch.save(model.state_dict(), FILE)'
        )
    for _ in range(2):  # the format's version, the machine
        _Unpickler(file, path).load()
    unpickler = _Unpickler(file, path)
    saved = unpickler.load()
    total = os.fstat(file.fileno()).st_size
    for key in _Unpickler(file, path).load():
        storage = unpickler.storages[str(key)]
        count = int.from_bytes(file.read(8), 'little')
        if count != storage.count:
            raise pickle.UnpicklingError(f'storage {key} has another size')
        size = count * np.dtype(storage.dtype).itemsize
        if size > total - file.tell():
            raise pickle.UnpicklingError(f'storage {key} is cut short')
        raw = file.read(size)
        storage.data = np.frombuffer(raw, storage.dtype, count)

    def load_storage(storage):
        if storage.data is None:
            raise pickle.UnpicklingError(f'storage {storage.key} is not there')
        return storage.data

    return _Resolver(load_storage, total).resolve(saved)


class _Resolver:
    """Replaces tensors with arrays.

    Lists that contain the same list many times can be small in a file and huge in
    memory, and so can tensors that share a storage. Both are counted.
    """

    def __init__(self, load_storage, file_size):
        self._load = functools.cache(load_storage)
        self._objects = _MOST_OBJECTS
        self._bytes = max(_SMALL, _EXPANSION * file_size)

    def _count(self, size=0):
        self._objects -= 1
        self._bytes -= size
        if self._objects < 0 or self._bytes < 0:
            raise pickle.UnpicklingError('it holds far more than its size')

    def resolve(self, value):
        self._count()
        if isinstance(value, _Tensor):
            return self._array(value)
        if isinstance(value, dict):
            return {key: self.resolve(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.resolve(item) for item in value]
        if isinstance(value, Record) and '_modules' in value.fields:
            return Module(
                value.name,
                dict(self._module_arrays(value, '')),
                {
                    key: self.resolve(item)
                    for key, item in value.fields.items()
                    if isinstance(item, str | int | float | list | tuple)
                },
                *self._module_layers(value),
            )
        return value

    def _array(self, tensor):
        item = np.dtype(tensor.storage.dtype).itemsize
        self._count(max(item, 4) * math.prod(tensor.shape))
        flat = self._load(tensor.storage)[tensor.offset :]
        strides = [step * flat.itemsize for step in tensor.strides]
        array = np.lib.stride_tricks.as_strided(
            flat, tensor.shape, strides, writeable=False
        )
        if array.dtype in (np.float16, ml_dtypes.bfloat16):
            array = array.astype(np.float32)
        return array

    def _module_arrays(self, module, prefix):
        self._count()
        for part in ('_parameters', '_buffers'):
            for name, value in (module.fields.get(part) or {}).items():
                if isinstance(value, _Tensor):
                    yield prefix + name, self._array(value)
        for name, inner in (module.fields.get('_modules') or {}).items():
            if isinstance(inner, Record):
                yield from self._module_arrays(inner, f'{prefix}{name}.')

    def _module_layers(self, module):
        """The classes and the settings of all modules inside."""
        found = dict(self._inner_modules(module, ''))
        return (
            {name: inner.name for name, inner in found.items()},
            {name: _settings(inner.fields) for name, inner in found.items()},
        )

    def _inner_modules(self, module, prefix):
        self._count()
        for name, inner in (module.fields.get('_modules') or {}).items():
            if isinstance(inner, Record):
                yield f'{prefix}{name}', inner
                yield from self._inner_modules(inner, f'{prefix}{name}.')


def _settings(fields):
    """The attributes of a layer that are plain values, or short tuples of them."""
    found = {key: fields[key] for key in _SETTINGS if key in fields}
    return {key: value for key, value in found.items() if _is_plain(value)}


def _is_plain(value):
    if isinstance(value, tuple | list):
        return len(value) <= 4 and all(isinstance(n, int | float) for n in value)
    return value is None or isinstance(value, str | int | float)
