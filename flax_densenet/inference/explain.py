"""The methods that explain a prediction, by their names in flags and in the API.

>>> make('Layer-CAM').title
'Layer-CAM'
>>> make('occlusion', patches=5).describe()
'Occlusion with patches of 1/5 of the shorter side'
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable

from flax_densenet.errors import UserError


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to explain.

    Attributes:
      title: the name in papers.
      what: the layer or the pixels that it uses, and the paper.
      option: the field of `Options` that applies to it: `steps`, `patches`, or none.
    """

    title: str
    what: str
    option: str = ''


GRADCAM = 'gradcam'
METHODS = {
    GRADCAM: Method(
        'Grad-CAM', 'the last feature map, weighted by mean gradients (1610.02391)'
    ),
    'gradcam++': Method(
        'Grad-CAM++',
        'the last feature map after its ReLU, weighted by positive gradients '
        '(1710.11063)',
    ),
    'hirescam': Method(
        'HiResCAM', 'the last feature map times its gradients (2011.08891)'
    ),
    'layercam': Method(
        'Layer-CAM',
        'the feature map before the last halving, of twice the resolution, times its '
        'positive gradients (10.1109/TIP.2021.3089943)',
    ),
    'occlusion': Method(
        'Occlusion',
        'what the logit loses with a patch of the image in the mean color (1311.2901)',
        'patches',
    ),
    'integrated_gradients': Method(
        'Integrated gradients',
        'the gradients of the pixels, from the mean color to the image (1703.01365)',
        'steps',
    ),
}
SLOW = tuple(name for name, method in METHODS.items() if method.option)
STEPS, PATCHES = 32, 7
_BOUNDS = {'steps': (2, 1000), 'patches': (2, 64)}
_OTHER_NAMES = {'gradcampp': 'gradcam++', 'ig': 'integrated_gradients'}


@dataclasses.dataclass(frozen=True)
class Options:
    """A method with its options; `make` creates it.

    Attributes:
      method: a key of `METHODS`.
      steps: for integrated gradients, the number of points where the gradient is
        computed.
      patches: for occlusion, how many patches fit along the shorter side. They overlap
        by half, so a square image has (2 * patches - 1)**2 of them.
    """

    method: str = GRADCAM
    steps: int = STEPS
    patches: int = PATCHES

    @property
    def title(self) -> str:
        """The name of the method."""
        return METHODS[self.method].title

    @property
    def is_slow(self) -> bool:
        """Whether the method runs the network many times for each image."""
        return self.method in SLOW

    def describe(self) -> str:
        """The name of the method with its steps or patches."""
        return (
            self.title
            + {
                'steps': f' with {self.steps} steps',
                'patches': f' with patches of 1/{self.patches} of the shorter side',
                '': '',
            }[METHODS[self.method].option]
        )


DEFAULT = Options()


def make(
    method: str | None = None,
    *,
    steps: int | None = None,
    patches: int | None = None,
    names: tuple[str, str, str] = ('method', 'steps', 'patches'),
) -> Options:
    """Checks a method and its options.

    Args:
      method: a key of `METHODS`, in any case, with or without hyphens; None is
        Grad-CAM.
      steps, patches: see `Options`; None for the defaults.
      names: the names of the three arguments in messages.

    Raises:
      UserError: the method is unknown, or an option is out of range or does not apply
        to it.
    """
    method = _find(method or GRADCAM, names[0])
    given = {'steps': steps, 'patches': patches}
    chosen = {}
    for (option, value), name in zip(given.items(), names[1:], strict=True):
        if value is None:
            continue
        if METHODS[method].option != option:
            owner = next(n for n, m in METHODS.items() if m.option == option)
            raise UserError(f'{name}={value} needs {names[0]}={owner}, not {method}')
        low, high = _BOUNDS[option]
        if not low <= value <= high:
            raise UserError(f'{name}={value} must be from {low} to {high}')
        chosen[option] = value
    return Options(method, **chosen)


def make_several(
    texts: Iterable[str],
    *,
    steps: int | None = None,
    patches: int | None = None,
    names: tuple[str, str, str] = ('method', 'steps', 'patches'),
) -> tuple[Options, ...]:
    """Calls `make` for each of several methods, separated by commas.

    Without a method, it is Grad-CAM.

    Raises:
      UserError: see `make`.
    """
    methods = [part.strip() for text in texts for part in text.split(',')]
    found = [_find(method, names[0]) for method in methods if method] or [GRADCAM]
    made, left = [], {'steps': steps, 'patches': patches}
    for method in dict.fromkeys(found):
        own = METHODS[method].option
        value = left.pop(own, None)
        if own == 'steps':
            made.append(make(method, steps=value, names=names))
        else:
            made.append(make(method, patches=value, names=names))
    make(found[0], steps=left.get('steps'), patches=left.get('patches'), names=names)
    return tuple(made)


def _find(text, name):
    plain = {_plain(known): known for known in METHODS} | _OTHER_NAMES
    if (found := plain.get(_plain(text))) is not None:
        return found
    close = difflib.get_close_matches(_plain(text), plain, 1)
    hint = f'did you mean {plain[close[0]]}? ' if close else ''
    raise UserError(f'{name}={text[:40]} is not known; {hint}use {", ".join(METHODS)}')


def _plain(text):
    return re.sub(r'[^a-z0-9+]', '', text.lower())
