"""Class names: known heads by their number of outputs, and names given by the user.

>>> from flax_densenet.weights import heads
>>> heads.find_known(14, channels=3).class_names[:2]
('Atelectasis', 'Cardiomegaly')
>>> heads.find_known(5, channels=3) is None
True
>>> heads.natural_order(('0', '1', '10', '2'))
('0', '1', '2', '10')
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import re

from flax_densenet.errors import UserError
from flax_densenet.system import paths

SOFTMAX, SIGMOID, NONE = 'softmax', 'sigmoid', 'none'
OUTPUTS = (SOFTMAX, SIGMOID, NONE)
_LARGEST = 2**26  # bytes of a file of names
# For a network with one output, which is the probability of the second.
BINARY = ('negative', 'positive')
CHEXNET = (
    'Atelectasis',
    'Cardiomegaly',
    'Effusion',
    'Infiltration',
    'Mass',
    'Nodule',
    'Pneumonia',
    'Pneumothorax',
    'Consolidation',
    'Edema',
    'Emphysema',
    'Fibrosis',
    'Pleural_Thickening',
    'Hernia',
)
TORCHXRAYVISION = (
    'Atelectasis',
    'Consolidation',
    'Infiltration',
    'Pneumothorax',
    'Edema',
    'Emphysema',
    'Fibrosis',
    'Effusion',
    'Pneumonia',
    'Pleural_Thickening',
    'Cardiomegaly',
    'Nodule',
    'Mass',
    'Hernia',
    'Lung Lesion',
    'Fracture',
    'Lung Opacity',
    'Enlarged Cardiomediastinum',
)


@dataclasses.dataclass(frozen=True)
class KnownHead:
    """Assumptions about a network from the number of its outputs.

    Attributes:
      what: describes the outputs in messages, such as "CheXNet's findings".
      class_names: in the order of the outputs.
      outputs: one of OUTPUTS.
      others: other names of the same classes in data sets.
    """

    what: str
    class_names: tuple[str, ...]
    outputs: str
    others: tuple[tuple[str, ...], ...] = ()

    @property
    def all_names(self) -> tuple[tuple[str, ...], ...]:
        """All sets of names for the classes, the usual ones first."""
        return self.class_names, *self.others

    def spelled_as(self, names) -> tuple[str, ...] | None:
        """The class names with the data's spelling; None if the data has others.

        Case, spaces, underscores and synonyms after a comma do not matter.

        >>> find_known(1000, channels=3).spelled_as(['great_white_shark'])[2]
        'great_white_shark'
        """
        for known in self.all_names:
            if set(names) <= set(known):
                return known
        # ImageNet has both a Cardigan and a cardigan.
        for plain in (_plain, lambda name: _plain(name).casefold()):
            given = {plain(name): name for name in names}
            for known in self.all_names:
                keys = [plain(name) for name in known]
                count = collections.Counter(keys)
                if len(given) == len(names) and all(count[key] == 1 for key in given):
                    pairs = zip(keys, known, strict=True)
                    return tuple(given.get(key, name) for key, name in pairs)
        return None


def _plain(name):
    return re.sub(r'[\W_]+', '', name.partition(',')[0])


@functools.cache
def _read_imagenet():
    place = pathlib.Path(__file__).with_name('imagenet_classes.txt')
    lines = place.read_text(encoding='utf-8').splitlines()
    numbers, names = zip(*(line.split(' ', 1) for line in lines), strict=True)
    return KnownHead("ImageNet's classes", names, SOFTMAX, (numbers,))


def find_known(num_outputs: int, *, channels: int) -> KnownHead | None:
    """The most common published network with this number of outputs, or None."""
    if num_outputs == 1000:
        return _read_imagenet()
    if num_outputs == len(CHEXNET):
        spaced = tuple(name.replace('_', ' ') for name in CHEXNET)
        return KnownHead("CheXNet's findings", CHEXNET, SIGMOID, (spaced,))
    if num_outputs == len(TORCHXRAYVISION) and channels == 1:
        what = "torchxrayvision's findings"
        spaced = tuple(name.replace('_', ' ') for name in TORCHXRAYVISION)
        return KnownHead(what, TORCHXRAYVISION, SIGMOID, (spaced,))
    return None


def natural_order(names) -> tuple[str, ...]:
    """Names in timm's order of classes: 2 before 10, ignoring case."""

    def key(name):
        parts = re.split(r'(\d+)', name.lower())
        return [int(part) if part.isdecimal() else part for part in parts]

    return tuple(sorted(names, key=key))


def describe_order(path: str, names: tuple[str, ...]) -> str:
    """The line about the class order assumed for weights without class names."""
    natural = natural_order(names)
    order = ', sorted as text as in torchvision and Keras,'
    line = (
        f'{path} does not name its classes; its outputs are assumed to be in the order '
        f'of the data{order if list(names) == sorted(names) else ""} ({_pairs(names)})'
    )
    if natural != tuple(names):
        line += f'; timm sorts numbers in names by their value ({_pairs(natural)})'
    return f'{line}; if it is another order, give it: --class_names=FILE or A,B,...'


def _pairs(names):
    pairs = ', '.join(f'{n} is {name}' for n, name in enumerate(names[:5]))
    return pairs + (', ...' if len(names) > 5 else '')


def read_names(text: str) -> tuple[str, ...]:
    """Reads `--class_names`: a file, or names separated by commas.

    Args:
      text: `a,b,c`, or the path of a file: one name per line, a JSON list of names, or
        a JSON object, either `{name: number}` or `{number: name}`.

    Raises:
      UserError: the file cannot be read, or a name is empty or appears twice.
    """
    path = paths.expand(text)
    if os.path.isfile(path):
        names = _read_file(path)
    elif ',' in text or not re.search(r'[/\\]|\.(txt|json|csv)$', text):
        names = tuple(name.strip() for name in text.split(','))
    else:
        paths.resolve(text, '--class_names=')  # says what is wrong with an address
        raise UserError(f'--class_names={text}: there is no such file')
    check_names(f'--class_names={text}', names)
    return names


def _read_file(path):
    try:
        if os.path.getsize(path) > _LARGEST:
            raise ValueError('it is too large')
        with open(path, encoding='utf-8-sig') as file:
            text = file.read()
        if text.lstrip()[:1] in ('[', '{'):
            names = order_names(json.loads(text))
            if names is None:
                raise ValueError('it does not hold a list of names')
            return names
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'--class_names={path} cannot be read ({reason})') from error
    return tuple(line.strip() for line in text.strip().splitlines())


def check_names(what: str, names: tuple[str, ...]):
    """Raises `UserError` if a name is empty or appears twice.

    Args:
      what: where the names come from, for the message.
    """
    if not names or not all(names):
        raise UserError(f'{what}: a name is empty; give a name for each output')
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(f'{what} names {twice[0]} twice; give each output its own name')


def order_names(found) -> tuple[str, ...] | None:
    """Names in the order of the outputs, from a list, `{name: number}` or
    `{number: name}`; None if it is something else.

    >>> order_names({'cat': 1, 'ant': 0})
    ('ant', 'cat')
    """
    if isinstance(found, dict):
        if all(type(number) is int for number in found.values()):
            found = {number: name for name, number in found.items()}
        if all(type(name) is int for name in found.values()):
            found = {number: str(name) for number, name in found.items()}
        try:
            found = {int(number): name for number, name in found.items()}
        except (TypeError, ValueError):
            return None
        if sorted(found) != list(range(len(found))):
            return None
        found = [found[number] for number in range(len(found))]
    if not isinstance(found, list | tuple) or not found:
        return None
    if not all(isinstance(name, str) and name for name in found):
        return None
    return tuple(found) if len(set(found)) == len(found) else None
