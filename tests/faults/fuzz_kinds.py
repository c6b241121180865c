"""What is fuzzed: for each kind of input how it is made and what reads it.

A kind is a class with `seeds` (whole inputs, each must be read), `make(rng)` (a damaged
one, as bytes) and `run(raw, path)` (reads it; a UserError is a refusal).
"""

import functools
import json
import os
import pathlib
import pickle
import re
import shutil
import sys
import tempfile

from faults import (
    fuzz_arrays,
    fuzz_bytes,
    fuzz_decisions,
    fuzz_seeds,
    fuzz_tables,
)
from flax_densenet.data import images, label_table
from flax_densenet.errors import UserError
from flax_densenet.weights import torch_pickle, trained, weight_file

_PICKLE_TOKENS = (
    *(b'ctorch\nFloatStorage\n', b'ctorch._utils\n_rebuild_tensor_v2\n'),
    *(b'ccollections\nOrderedDict\n', b'cbuiltins\neval\n', b'cos\nsystem\n'),
    *(b'cbuiltins\nbytearray\n', b'ctorch\nSize\n', b'ccollections\ndefaultdict\n'),
    *(b'c_codecs\nencode\n', b'cnumpy\nndarray\n', b'ctorch.nn\nModule\n'),
    *(b'ctorch._utils\n_rebuild_parameter\n', b'cflax_densenet.model\nDenseNet\n'),
    *(b'_modules', b'_parameters', b'state_dict', b'features.conv0.weight'),
    *(b'denselayer', b'(' * 5000, b']' * 3000, b'(]' * 3000, b'\x85' * 5000),
    *(b'q\0', b'h\0', b'r\xff\xff\xff\x7f', b'\x8a\xff' + b'\x7f' * 255),
    *(b'\x8b\xff\xff\xff\x7f', b'B\xff\xff\xff\x7f', b'X\xff\xff\xff\x7f'),
    *(b'\x8e' + b'\xff' * 7 + b'\x7f', b'J\xff\xff\xff\x7f', b'K\x01\x85', b'N\x85'),
    *(b'}X\x0c\0\0\0__defaults__K\x07\x85sb', b'b', b'\x86b', b'\x92', b'\x8c\0'),
    *(b'cbuiltins\ngetattr\n', b'csubprocess\nPopen\n', b'ccode\ninteract\n'),
    *(b'I99999999999999999999\n', b'F1e999\n', b'L1\n', b'\x80\x05', b'\x80\xff'),
    *(bytes([code]) for code in b'RbQPsue\x81\x93\x94.02\x86\x87}\x97\x98io'),
)


def _words(text):
    return text.split()


class Kind:
    """One kind of input; see the module."""

    seeds: list[bytes]
    tokens: tuple[bytes, ...] = ()
    name = 'input'

    def make(self, rng) -> bytes:
        return fuzz_bytes.damage(rng, self.seeds, self.tokens)

    def run(self, raw, path):
        pathlib.Path(path).write_bytes(raw)
        return self.read(path)

    def read(self, path):
        return weight_file.load(path)


class Images(Kind):
    """JPEG, PNG, GIF, WebP, BMP, TIFF: read for training, and checked before it."""

    tokens = (
        *b'IDAT IEND acTL iCCP eXIf tRNS zTXt fcTL fdAT VP8X VP8L ALPH ANIM'.split(),
        *b'ANMF EXIF II*\0 MM\0* BM ICC_PROFILE\0 MPF\0 Exif\0\0'.split(),
        *(b'VP8 ', b'\xff\xd8', b'\xff\xd9', b'\xff\xda', b'!\xff\x0b'),
        b'\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03',
        *(b'IHDR\0\0\xff\xff\0\0\xff\xff', b'GIF89a\xff\xff\xff\xff'),
        *(b'\0\1\3\0', b'\x1a\1\5\0', b'\x11\1\4\0', b'\x03\1\3\0'),
        b'\x01\1\4\0\1\0\0\0\xff\xff\xff\0',
    )

    def __init__(self):
        self.seeds = [raw for found in fuzz_seeds.images().values() for raw in found]
        self._preparations = [
            images.Preparation(16),
            images.Preparation(0),
            images.Preparation(24, 'crop', 0.875, 'bicubic', 1),
        ]
        self._deep = images.Preparation(16, window=(0, 999), bit_depth=12)

    def make(self, rng):
        raw = super().make(rng)
        return fuzz_bytes.seal_png(raw) if rng.random() < 0.6 else raw

    def run(self, raw, path):
        pathlib.Path(path).write_bytes(raw)
        reason = images.check_image(path, decode=len(raw) % 2 == 0)
        assert reason is None or '\n' not in reason, reason
        for preparation in self._preparations[: 1 + len(raw) % 3]:
            found = images.load_image(raw, preparation)
        assert found.dtype == 'u1' and found.ndim == 3
        if len(raw) % 3:
            found = images.load_image(raw, self._deep)
            assert found.dtype == 'u2' and found.shape == (16, 16, 3)


class Dicom(Images):
    """DICOM files: headers, tables, and pixels in the syntaxes that are read."""

    tokens = (
        *(b'\x28\0\x10\0US\x02\0\xff\xff', b'\x28\0\x11\0US\x02\0\xff\xff'),
        *(b'\x28\0\0\1US\x02\0 \0', b'\x28\0\x02\0US\x02\0\x03\0', b'DICM'),
        *(b'\x28\0\x10\0', b'\x28\0\x30\x50', b'\xe0\x7f\x10\0', b'\xfe\xff\0\xe0'),
        *(b'\xfe\xff\xdd\xe0\0\0\0\0', b'\xff\xff\xff\xff', b'SQ\0\0', b'OW\0\0'),
        *(b'MONOCHROME1 ', b'PALETTE COLOR ', b'YBR_FULL_422', b'1e308', b'nan', b'-0'),
        *(b'1.2.840.10008.1.2.1.99', b'1.2.840.10008.1.2.5\0', b'1.2.840.10008.1.2.2'),
        *(b'\xff\xd8\xff\xf7', b'\xff\x4f\xff\x51', b'\x28\0\x08\0IS\x02\0' + b'99'),
    )

    def __init__(self):
        super().__init__()
        self.seeds = fuzz_seeds.dicom_files()

    def make(self, rng):
        return fuzz_bytes.damage(rng, self.seeds, self.tokens)


_FORBIDDEN = re.compile(
    r'os\.(system|exec|posix_spawn|fork|remove|rename|rmdir|mkdir|chmod|chown|link|'
    r'symlink|truncate|putenv|startfile).*|subprocess\..*|socket\..*|shutil\..*|'
    r'ctypes\..*|pty\..*|webbrowser\..*|code\..*|exec|compile|import'
)


class _Torch(Kind):
    """Pickles: nothing of them may run, nor stay for the next file."""

    tokens = _PICKLE_TOKENS

    def __init__(self):
        self._reading = False
        sys.addaudithook(self._forbid)  # for the life of the child process

    def _forbid(self, event, arguments):
        if self._reading and _FORBIDDEN.fullmatch(event):
            raise AssertionError(f'{event} ran: {arguments!r}'[:200])

    def read(self, path):
        before = self._state()
        self._reading = True
        try:
            torch_pickle.read(path)
        except UserError:
            pass
        finally:
            self._reading = False
        assert self._state() == before, 'a file changed what reads it'
        return super().read(path)

    def _state(self):
        functions = (torch_pickle._rebuild_tensor, torch_pickle._rebuild_from_type)
        return [
            (one.__defaults__, one.__kwdefaults__, dict(vars(one))) for one in functions
        ] + [sorted(vars(torch_pickle.Record)), sorted(map(str, torch_pickle._KNOWN))]


class TorchZip(_Torch):
    """The zip archives of torch.save."""

    def __init__(self):
        super().__init__()
        self.seeds = fuzz_seeds.torch_files()['zip']

    def make(self, rng):
        if rng.random() < 0.75:
            return fuzz_bytes.damage_zip(rng, self.seeds, self.tokens)
        return super().make(rng)


class TorchLegacy(_Torch):
    """The row of pickles of torch before 1.6."""

    def __init__(self):
        super().__init__()
        self.seeds = fuzz_seeds.torch_files()['legacy']


class Safetensors(Kind):
    """Ours and plain ones."""

    tokens = (
        *(b'{', b'}', b'[', b']', b'"', b',', b'"dtype":"F16"', b'"BF16"', b'"F64"'),
        *(b'"F8_E5M2"', b'"BOOL"', b'"shape":[18446744073709551615,2]', b'"shape":[0]'),
        *(b'"data_offsets":[0,0]', b'__metadata__', b'"__metadata__":{"format":"pt"},'),
        *(b'features.denseblock1.denselayer99999999.', b'features.denseblock9.'),
        *(b'weight', b'bias', b'running_mean', b'classifier', b'num_batches_tracked'),
    )

    def __init__(self):
        self.seeds = fuzz_seeds.safetensors_files()

    def make(self, rng):
        if rng.random() < 0.6:
            return fuzz_bytes.damage_safetensors(rng, self.seeds)
        return super().make(rng)


class Arrays(Kind):
    """Intact files whose arrays were shuffled, renamed, duplicated or dropped."""

    def __init__(self):
        self.seeds = [_to_safetensors(one) for one in fuzz_arrays.networks().values()]

    def make(self, rng):
        arrays = rng.choice(list(fuzz_arrays.networks().values()))
        return _to_safetensors(fuzz_arrays.change(rng, arrays))

    def read(self, path):
        return fuzz_arrays.check(path)


def _to_safetensors(arrays):
    from safetensors import numpy as safetensors

    return safetensors.save(arrays)


class Hdf5(Kind):
    """`.h5` files of Keras."""

    tokens = (
        *b'SNOD TREE HEAP OHDR OCHK GCOL FRHP vars layers kernel:0 gamma:0'.split(),
        *b'conv1_conv conv2_block1_1_conv layer_names model_config name'.split(),
        *(b'\x89HDF\r\n\x1a\n', b'\xff' * 8, b'\0' * 8),
    )

    def __init__(self):
        self.seeds = fuzz_seeds.keras_files()['h5']


class Keras(Kind):
    """`.keras` archives."""

    tokens = Hdf5.tokens + (b'"class_name"', b'"config"', b'"epsilon": 1e999')

    def __init__(self):
        self.seeds = fuzz_seeds.keras_files()['keras']

    def make(self, rng):
        if rng.random() < 0.8:
            return fuzz_bytes.damage_zip(rng, self.seeds, self.tokens)
        return super().make(rng)


class Labels(Kind):
    """Tables of several labels an image."""

    tokens = (
        *b'image IMAGE path split train validation patient | -1 nan 1.0'.split(),
        *(b'Finding Labels', b'No Finding', b'9' * 5000, b',' * 3000),
        *(b',', b'"', b'""', b'\n', b'\r', b'\r\n', b'\0', b'\xef\xbb\xbf'),
        *(b'"' + b'a' * 140_000 + b'"', b'\xff\xfe', b'\xe2\x80\xa8', b'\x0b', b'\x85'),
    )
    seeds = fuzz_seeds.LABELS

    def read(self, path):
        return label_table.read(path)


class Metadata(Kind):
    """The JSON files of a checkpoint, and orbax' own beside them."""

    def __init__(self):
        self._root = None
        made = fuzz_seeds.trained('small images').metadata
        self._seed = {'metadata/metadata': made}
        self._seed['metrics/metrics'] = {'test_accuracy': 0.5, 'test_loss': 1.0}
        self.seeds = [pickle.dumps(item) for item in self._seed.items()]

    def make(self, rng):
        name = rng.choice(('metadata/metadata',) * 4 + ('metrics/metrics',))
        value = self._seed[name]
        raw = fuzz_bytes.to_json(fuzz_bytes.damage_json(rng, value))
        if rng.random() < 0.1:
            raw = fuzz_bytes.damage(rng, [json.dumps(value).encode()])
        return name.encode() + b'\n' + raw

    def run(self, raw, path):
        if self._root is None:
            self._root = fuzz_seeds.make_run(
                tempfile.mkdtemp(dir=os.path.dirname(path))
            )
        if raw[:1] == b'\x80':  # a seed
            name, value = pickle.loads(raw)
            raw = name.encode() + b'\n' + json.dumps(value).encode()
        name, _, content = raw.partition(b'\n')
        file = pathlib.Path(self._root, 'checkpoints', '1', name.decode())
        shutil.copy(file, f'{path}-before')
        try:
            file.write_bytes(content)
            weight_file.load(self._root)
            return trained.load_trained(self._root)
        finally:
            shutil.copy(f'{path}-before', file)


class Flags(Kind):
    """The command line: its parser, and all that `train` checks before it compiles."""

    _NUMBERS = (
        *_words('0 1 -1 3 1e3 0.5 -0.0 1e-320 1e400 nan inf -inf 10**9 0x10 1_000 2 7'),
        *(str(10**30), '9' * 5000, '2147483648', '9223372036854775808', '١'),
    )
    _TUPLES = (
        *_words('(1,) (1,1) () (0,) (-1,2) (1.5,) (10**9,) (999999999,) [1,2] {}'),
        *_words('("a",) (0.5,0.5,0.5) (nan,1,1) (1e400,1,1) (0.75,0.5) (6,12,24,16)'),
        *('(' * 300, '(1,)*9', '(None,)', '(True,)'),
    )
    _TEXTS = (
        *_words('None none True False x .. /dev/null é densenet121 L40k12 BC-L100k12'),
        *_words('L99999999999k1 BC-L10k99999999 L4k1 folder: folder:/dev digits:x'),
        *_words('folder:/nowhere tfds: tfds:a/b:c tfds:../x bfloat16 float64 cosine'),
        *_words('steps sgd adamw crop bicubic backbone denseblock1 denseblock999'),
        *_words('memory same flip off he_fan_out cifar imagenet skip xla native'),
        *('', ' ', "'", '"', '\\', '\n', '\x1b[2J', '\udc80', 'a' * 70000),
        '__import__("os").system("x")',
    )
    _FOR = {int: _NUMBERS, float: _NUMBERS, tuple: _TUPLES, str: _TEXTS}
    _OTHERS = (
        *_words('-- - ---x x --mode --mode= --mode=nothing --config= --config. --='),
        *_words('--config.= --config.model --config.model=3 --nomode --config.x=1 ='),
        *_words('--config.model.variant --workdir --out=/x --format=x --help=x'),
        *_words('--config.model.variant.x=1 --distributed=maybe --flagfile=/nowhere'),
        *_words('--config.train=None --config.data.mean[0]=1 --undefok=x'),
        *_words('--config.init_from=/dev/null --config.init_from=\0 --workdir=\0'),
        *_words('--config=\0 --config=/dev/null --config.data.std[9]=1'),
    )

    def __init__(self):
        from configs import base

        config = base.get_config()
        self._fields = {'init_from': str} | {
            f'{section}.{name}': config[section].get_type(name)
            for section in ('model', 'data', 'optimizer', 'train', 'report')
            for name in config[section]
        }
        small = ['--config.model.variant=BC-L10k4', '--config.data.image_size=8']
        self._base = small
        self.seeds = ['\n\n'.join(small).encode()]

    def make(self, rng):
        found = [flag for flag in self._base if rng.random() < 0.9]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if rng.random() < 0.12:
                found.append(rng.choice(self._OTHERS))
                continue
            field, kind = rng.choice(list(self._fields.items()))
            values = self._FOR.get(kind, ('true', 'False', '1', 'no', 'x'))
            if rng.random() < 0.15:
                values = rng.choice((self._NUMBERS, self._TUPLES, self._TEXTS))
            value = rng.choice(values)
            if rng.random() < 0.15:
                raw = value.encode(errors='surrogateescape')[:200] or b'x'
                value = fuzz_bytes.damage(rng, [raw], most=2)
                value = value.decode(errors='surrogateescape')[:300]
            found.append(f'--config.{field}={value}')
        rng.shuffle(found)
        # Surrogates, as Python has them of arguments that are no UTF-8.
        return '\n\n'.join(found).encode(errors='surrogateescape')

    def run(self, raw, path):
        from flax_densenet.train import prepare

        parser, commands = _import_parser()
        arguments = raw.decode(errors='surrogateescape').split('\n\n')
        arguments = [argument for argument in arguments if argument not in _LEAVES]
        argv = ['launch.py', f'--workdir={path}-none', *arguments]
        prepare.prepare(parser.parse(argv, commands).fields, f'{path}-none')


# Print a help page and leave, as they should.
_LEAVES = {'--help', '-help', '-?', '--helpfull', '--helpshort', '--version'}


@functools.cache
def _import_parser():
    from sklearn import datasets

    # 40 ms a time, of which there are thousands.
    datasets.load_digits = functools.cache(datasets.load_digits)
    from flax_densenet.cli import command_line, commands

    return command_line, commands.COMMANDS


KINDS = {
    re.sub(r'(?<!^)(?=[A-Z])', '_', cls.__name__).lower(): cls
    for cls in (
        *(Images, Dicom, TorchZip, TorchLegacy, Safetensors, Arrays, Hdf5, Keras),
        *(Labels, Flags, Metadata, fuzz_decisions.Decisions, fuzz_tables.Tables),
    )
}
