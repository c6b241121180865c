"""Small whole files of every kind, to be damaged: written without torch and Keras.

What this project writes itself comes from its own writers.
"""

import collections
import io
import json
import os
import pathlib
import pickle
import sys
import tempfile
import types
import zipfile
from unittest import mock

import numpy as np
from flax import traverse_util
from PIL import Image, features

from flax_densenet import create_model, init_variables
from flax_densenet.data import images as images_lib
from flax_densenet.export import formats
from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import weight_file
from helpers import deep_images, torch_trees

ROOT = pathlib.Path(__file__).resolve().parents[2]
_SHARED = pathlib.Path(os.environ.get('FLAX_DENSENET_SHARED', ROOT.parent / 'shared'))
_TINY = {
    'small images': ('BC-L10k4', {}),
    'photographs': (
        'densenet121',
        dict(growth_rate=4, block_sizes=(2, 1), stem_features=8, bottleneck=2),
    ),
}


def trained(name='photographs', classes=3) -> trained_lib.Trained:
    """A tiny model of one of two kinds with first parameters."""
    variant, fields = _TINY[name]
    module = create_model(variant, num_classes=classes, **fields)
    metadata = {
        'model': {'variant': variant, **fields},
        'class_names': [f'class {n}' for n in range(classes)],
        'image_size': 8 if 'small' in name else 48,
        'mean': [0.5] * 3,
        'std': [0.25] * 3,
        'data': {'mean': [0.5] * 3, 'std': [0.25] * 3, 'resize': 'crop'},
        'epoch': 1,
    }
    variables = init_variables(module, 0)
    return trained_lib.Trained(module, variables, metadata, {}, 1, None)


def images() -> dict[str, list[bytes]]:
    """{format: files} in many modes, with EXIF, animation and compressions."""
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (24, 31, 3), np.uint8))
    alpha = color.convert('RGBA')
    alpha.putalpha(color.convert('L'))
    deep = Image.fromarray(rng.integers(0, 65536, (13, 17), np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, 'x' * 40
    frames = dict(save_all=True, append_images=[color.rotate(90), color], duration=9)
    wanted = {
        'JPEG': [
            (color, dict(quality=70, exif=exif)),
            (color.convert('L'), {}),
            (color, dict(progressive=True, icc_profile=b'\0' * 200)),
            (color.convert('CMYK'), {}),
        ],
        'PNG': [
            *((color, {}), (alpha, dict(exif=exif)), (deep, {})),
            (color.quantize(8), dict(transparency=1)),
            (color.convert('1'), {}),
            (color, frames),
        ],
        'GIF': [(color.quantize(16), {}), (color, frames)],
        'WEBP': [(color, dict(quality=50)), (alpha, dict(lossless=True))]
        + [(color, frames | dict(exif=exif))],
        'BMP': [(color, {}), (color.quantize(16), {}), (color.convert('1'), {})],
        'TIFF': [
            (color, dict(compression='tiff_lzw')),
            (color, dict(compression='tiff_adobe_deflate')),
            (color, dict(compression='jpeg')),
            (color.convert('1'), dict(compression='group4')),
            *((deep, {}), (color.convert('F'), {}), (color.convert('CMYK'), {})),
        ],
        'PPM': [(color, {}), (color.convert('L'), {}), (deep, {})],
        'TGA': [(color, {}), (color, dict(compression='tga_rle'))],
        'ICO': [(color.resize((16, 16)), dict(sizes=[(16, 16)]))],
        'QOI': [(color, {})],
        'SGI': [(color, {})],
    }
    for kind, feature in (('AVIF', 'avif'), ('JPEG2000', 'jpg_2000')):
        if features.check(feature):
            wanted[kind] = [(color, {}), (alpha, {})]
    if 'HEIF' in images_lib.FORMATS:
        wanted['HEIF'] = [(color, dict(quality=50)), (alpha, dict(exif=exif))]
    found = {}
    for kind, pictures in wanted.items():
        for picture, fields in pictures:
            out = io.BytesIO()
            picture.save(out, kind, **fields)
            found.setdefault(kind, []).append(out.getvalue())
    return found | {'of 16 bits': _deep_images(rng)}


def _deep_images(rng) -> list[bytes]:
    """What Pillow cannot write."""
    values = rng.integers(0, 65536, (11, 13, 4)).astype(np.uint16)
    return [
        *(deep_images.png(values[..., :n]) for n in (2, 3, 4)),
        deep_images.tiff(values[..., :3]),
        deep_images.tiff(values, order='>', packed=True),
        deep_images.tiff(values[..., :1].astype(np.int16), packed=True),
        deep_images.tiff(values[..., :1].astype(np.float32), order='>'),
        b'P6\n13 11\n65535\n' + values[..., :3].astype('>u2').tobytes(),
    ]


def dicom_files() -> list[bytes]:
    """Gray and color, in the transfer syntaxes that are read; needs pydicom."""
    from pydicom import uid

    from helpers import dicoms

    rng = np.random.default_rng(0)
    gray = rng.integers(0, 4096, (11, 14)).astype(np.int16)
    byte = rng.integers(0, 256, (11, 14), np.uint8)
    color = rng.integers(0, 256, (10, 12, 3), np.uint8)
    window = dict(WindowCenter=900, WindowWidth=[800, 90], RescaleSlope=2)
    tables = dict(
        ModalityLUTSequence=dicoms.sequence(40, 3, 12, range(40)),
        VOILUTSequence=dicoms.sequence(40, 3, 12, range(40)),
    )
    frames = {
        uid.JPEGBaseline8Bit: ('JPEG', {}),
        uid.JPEG2000Lossless: ('JPEG2000', {}),
    }
    made = [
        dicoms.make(gray, RescaleIntercept=-1024, **window),
        dicoms.make(byte, PhotometricInterpretation='MONOCHROME1', **tables),
        dicoms.make(gray, syntax=uid.ImplicitVRLittleEndian, **tables),
        dicoms.make(color),
        dicoms.make(color, PhotometricInterpretation='YBR_FULL'),
        dicoms.make(
            gray, VOILUTFunction='SIGMOID', BitsStored=12, HighBit=11, **window
        ),
    ]
    for pixels in (gray.view(np.uint16), color):
        frame = dicoms.run_lengths(pixels)
        made.append(dicoms.make(pixels, syntax=uid.RLELossless, frame=frame))
    for syntax, (kind, options) in frames.items():
        for pixels in (byte, color):
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, kind, **options)
            made.append(dicoms.make(pixels, syntax=syntax, frame=out.getvalue()))
    import jpeg_ls

    frame = jpeg_ls.encode_array(gray.view(np.uint16))
    made.append(dicoms.make(gray, syntax=uid.JPEGLSLossless, frame=bytes(frame)))
    return [*made, dicoms.deflate(made[0])]


class _Storage:
    def __init__(self, array):
        self.array = np.ascontiguousarray(array)


def _torch_modules():
    """Stand-ins that pickle as torch's names; real ones are hidden for the moment."""
    modules = {
        name: types.ModuleType(name)
        for name in ('torch', 'torch._utils', *torch_trees.MODULES)
    }
    for name in ('FloatStorage', 'HalfStorage', 'LongStorage'):
        setattr(modules['torch'], name, type(name, (), {'__module__': 'torch'}))

    def _rebuild_tensor_v2(*_):
        raise AssertionError('is only written')

    _rebuild_tensor_v2.__module__ = 'torch._utils'
    _rebuild_tensor_v2.__qualname__ = '_rebuild_tensor_v2'
    modules['torch._utils']._rebuild_tensor_v2 = _rebuild_tensor_v2
    for module, names in torch_trees.MODULES.items():
        for name in names:
            setattr(modules[module], name, type(name, (), {'__module__': module}))
    for name in ('torch.nn', 'torch.nn.modules', 'torchvision', 'torchvision.models'):
        modules[name] = types.ModuleType(name)
    return modules


def _pickle_torch(saved, *, legacy, whole):
    """(pickle, [storage, ...]) as torch.save writes tensors; arrays are tensors here.

    Args:
      whole: a network of the arrays is saved, not the dictionary of them.
    """
    modules, storages = _torch_modules(), []
    if whole:
        classes = {
            name: kind for one in modules.values() for name, kind in vars(one).items()
        }
        saved = torch_trees.build(
            saved, lambda kind: classes[kind](), outer=classes['DenseNet']()
        )
    kinds = {'f4': 'FloatStorage', 'f2': 'HalfStorage', 'i8': 'LongStorage'}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, _Storage):
                return None
            storages.append(value.array)
            kind = getattr(modules['torch'], kinds[value.array.dtype.str[1:]])
            key, count = str(len(storages) - 1), value.array.size
            view = (None,) if legacy else ()
            return ('storage', kind, key, 'cpu', count, *view)

        def reducer_override(self, value):
            if not isinstance(value, np.ndarray):
                return NotImplemented
            strides = tuple(s // value.itemsize for s in value.strides)
            made = (_Storage(value), 0, value.shape, strides, False)
            rebuild = modules['torch._utils']._rebuild_tensor_v2
            return rebuild, (*made, collections.OrderedDict())

    out = io.BytesIO()
    with mock.patch.dict(sys.modules, modules):
        Pickler(out, 2).dump(saved)
    return out.getvalue(), storages


def torch_zip(saved, *, whole=False) -> bytes:
    """What `torch.save` writes of a dictionary of arrays, or of a whole network."""
    data, storages = _pickle_torch(saved, legacy=False, whole=whole)
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        archive.writestr(zipfile.ZipInfo('archive/data.pkl'), data)
        archive.writestr(zipfile.ZipInfo('archive/byteorder'), b'little')
        for number, array in enumerate(storages):
            name = zipfile.ZipInfo(f'archive/data/{number}')
            archive.writestr(name, array.tobytes())
        archive.writestr(zipfile.ZipInfo('archive/version'), b'3\n')
    return out.getvalue()


def _torch_legacy(saved, *, whole=False):
    data, storages = _pickle_torch(saved, legacy=True, whole=whole)
    machine = dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2))
    parts = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, machine)]
    parts += [data, pickle.dumps([str(n) for n in range(len(storages))], 2)]
    for array in storages:
        parts += [array.size.to_bytes(8, 'little'), array.tobytes()]
    return b''.join(parts)


def torch_files() -> dict[str, list[bytes]]:
    """{'zip', 'legacy'}: state dictionaries, alone, nested and half, whole networks."""
    found = {'zip': [], 'legacy': []}
    for name in _TINY:
        model = trained(name)
        state = formats.torch_arrays(model.module, model.variables)
        state = collections.OrderedDict(state)
        half = {
            k: v.astype(np.float16) if v.dtype == np.float32 else v
            for k, v in state.items()
        }
        nested = {'epoch': 3, 'state_dict': {f'module.{k}': half[k] for k in half}}
        for saved in (state, nested):
            found['zip'].append(torch_zip(saved))
            found['legacy'].append(_torch_legacy(saved))
        found['zip'].append(torch_zip(state, whole=True))
        found['legacy'].append(_torch_legacy(state, whole=True))
    for name in ('tiny_torchvision.pth', 'tiny_chexnet_style.pth.tar'):
        path = _SHARED / 'reference' / name
        if path.exists():
            raw = path.read_bytes()
            found['zip' if raw[:2] == b'PK' else 'legacy'].append(raw)
    return found


def safetensors_files() -> list[bytes]:
    """Ours with metadata, and a plain one."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'x.safetensors')
        for name in _TINY:
            formats.save(path, trained(name), 'safetensors')
            found.append(pathlib.Path(path).read_bytes())
    from safetensors import numpy as safetensors

    model = trained()
    found.append(safetensors.save(formats.torch_arrays(model.module, model.variables)))
    return found


def _keras_layers():
    """{layer's name in keras.applications: arrays in Keras' order}."""
    model, found = trained(), {}
    flat = traverse_util.flatten_dict(model.variables, sep='/')
    for path in flat:
        _, *parts, _ = path.split('/')
        module = '/'.join(parts)
        roles = ('params/scale', 'params/bias', 'batch_stats/mean', 'batch_stats/var')
        if f'params/{module}/kernel' in flat:
            roles = ('params/kernel', 'params/bias')
        paths = [r.replace('/', f'/{module}/') for r in roles]
        found[_keras_name(parts)] = [flat[p] for p in paths if p in flat]
    return found


def _keras_name(parts):
    others = dict(conv0='conv1_conv', norm0='conv1_bn', norm5='bn')
    others['classifier'] = 'predictions'
    if parts[0] in others:
        return others[parts[0]]
    number = int(parts[0][-1]) + 1
    if parts[0].startswith('transition'):
        return f'pool{number}_{dict(norm="bn", conv="conv")[parts[1]]}'
    names = dict(norm1='0_bn', conv1='1_conv', norm2='1_bn', conv2='2_conv')
    return f'conv{number}_block{parts[1][-1]}_{names[parts[2]]}'


_KERAS_CONFIG = json.dumps(
    {
        'class_name': 'Functional',
        'config': {
            'layers': [
                {
                    'class_name': 'Conv2D',
                    'config': {'kernel_size': [7, 7], 'padding': 'valid'},
                },
                {
                    'class_name': 'BatchNormalization',
                    'config': {'epsilon': 1.001e-5, 'momentum': 0.99},
                },
            ]
        },
    }
)


def keras_files() -> dict[str, list[bytes]]:
    """{'h5', 'keras'} in the layouts of Keras 2 and 3; needs h5py."""
    import h5py

    layers = _keras_layers()
    old, new = io.BytesIO(), io.BytesIO()
    with h5py.File(old, 'w') as file:
        file.attrs['layer_names'] = [name.encode() for name in layers]
        file.attrs['model_config'] = _KERAS_CONFIG
        for name, arrays in layers.items():
            roles = ('gamma', 'beta', 'moving_mean', 'moving_variance')
            roles = ('kernel', 'bias') if len(arrays) < 3 else roles
            for role, array in zip(roles, arrays, strict=False):
                file[f'{name}/{name}/{role}:0'] = array
    with h5py.File(new, 'w') as file:
        for name, arrays in layers.items():
            for number, array in enumerate(arrays):
                file[f'layers/{name}/vars/{number}'] = array
            file[f'layers/{name}/vars'].attrs['name'] = name
        file.create_dataset(
            'optimizer/vars/0', data=np.zeros(9, np.float32), compression='gzip'
        )
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        archive.writestr(zipfile.ZipInfo('config.json'), _KERAS_CONFIG)
        archive.writestr(zipfile.ZipInfo('metadata.json'), '{"keras_version": "3.0"}')
        archive.writestr(zipfile.ZipInfo('model.weights.h5'), new.getvalue())
    return {'h5': [old.getvalue(), new.getvalue()], 'keras': [out.getvalue()]}


LABELS = [
    b'image,patient,effusion,mass\n'
    + b''.join(b'%d.png,p%d,%d,\n' % (n, n // 2, n % 2) for n in range(9)),
    'Image Index,Finding Labels,Patient ID\r\n1.png,Mass|Näh,1\r\n'
    '2.png,No Finding,2\r\n3.png,Mass,2\r\n'.encode('utf-8-sig'),
    b'path,split,a\n"a, b.jpg",train,1\n"c\n.jpg",test,-1\nd.jpg,val,nan\n'
    b'e.jpg,train,0\n',
]


def _table(heading, cells, *, separator=',', count=12, name='{:03}.png'):
    """A table of the images of `fuzz_tables`; `cells(i)` are those of a row."""
    rows = [[name.format(i), *map(str, cells(i))] for i in range(count)]
    rows = [heading.split(), *rows] if heading else rows
    return '\n'.join(separator.join(row) for row in rows)


TABLES = [
    _table('image sick mass', lambda i: (i % 2, i % 3 % 2)).encode(),
    _table('image label', lambda i: (('cat', 'dog')[i % 2],)).encode('utf-16'),
    _table('id grade', lambda i: (i % 3,), separator=';', name='{:03}').encode(),
    _table('', lambda i: (i % 2, ('1', '')[i % 3 > 1]), separator='\t').encode(),
    _table(
        'path patient_id a split',
        lambda i: (f'p{i // 3}', (1, 0, -1)[i % 3], ('train', 'val')[i > 8]),
        name='x/{:03}.png',
    ).encode('utf-8-sig'),
    _table('file labels Fold', lambda i: (('a|b', 'a', '')[i % 3], i % 3)).encode(),
    _table('image a train test', lambda i: (i % 2, int(i < 9), int(i > 8))).encode(),
]


def make_run(folder: str) -> str:
    """The workdir of a run with one checkpoint, without its checksums.

    A stranger would write fitting ones; with these each damage would be found at once.
    """
    from flax_densenet.checkpoints import reader as checkpoint_reader
    from flax_densenet.checkpoints import writer as checkpoint_writer

    model, one = trained('small images'), checkpoint_reader.Checkpoint(1)
    with checkpoint_writer.open_saver(folder) as saver:
        saver.save(
            one,
            model=model.variables,
            train={'step': np.zeros((), np.int32)},
            metadata=model.metadata,
            records=[],
            metrics={'test_accuracy': 0.5, 'test_loss': 1.0},
        )
    place = checkpoint_reader.folder_of(folder, one)
    os.unlink(os.path.join(place, checkpoint_reader.CHECKSUMS_FILE))
    assert weight_file.load(folder).num_classes == 3
    return folder
