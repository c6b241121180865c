"""Published weights by name: `torchvision:densenet121`, `hf:OWNER/NAME`, an address.

    find('keras:densenet121')       # an entry of TABLE
    fetch('keras:densenet121').path  # downloads the file if necessary

Accuracy, license and size in the table come from the sources that it names, and are
`None` if the sources do not state them. docs/pretrained.md shows the table.
"""

import dataclasses
import difflib
import fnmatch
import logging
import os
import re
import urllib.parse
from typing import Any

from flax_densenet.errors import UserError
from flax_densenet.weights import download, heads

_LOGGER = logging.getLogger(__name__)
KINDS = ('torchvision', 'keras', 'xrv', 'hf')
_ADDRESS = re.compile('https?:/', re.IGNORECASE)
UNVERIFIED = 'not verified against the published file'
_MIB = 2**20
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class PublishedWeights:
    """Published weights with a name.

    Attributes:
      name: the name for `load` and `init_from`.
      variant: the network, for `create_model`.
      parameters: number of parameters.
      address: address of the file, or of the repository on the Hugging Face Hub.
      preparation: fields of `config.data` that prepare images for these weights.
      classes: `ImageNet` (1000 classes), `findings` (18 in chest X-rays) or `none`.
      accuracy: the published accuracy as text; None if it is not published.
      accuracy_source: where the accuracy is published.
      license: the license as its source states it.
      size: published size of the file in bytes; None if it is not published.
      checksum: published checksum of the file; None if it is not published.
      untrained: outputs that exist but were never trained.
      fingerprint: fingerprint of the logits for a photo, see `fingerprint`; None if the
        published file could not be tested.
    """

    name: str
    variant: str
    parameters: int
    address: str
    preparation: dict[str, Any]
    classes: str = 'ImageNet'
    accuracy: str | None = None
    accuracy_source: str | None = None
    license: str = 'not stated'
    size: int | None = None
    checksum: download.Checksum | None = None
    untrained: tuple[int, ...] = ()
    fingerprint: tuple[float, ...] | None = None

    @property
    def image_size(self) -> int:
        """Side length of the images in pixels."""
        return self.preparation['image_size']

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Class names in the order of the outputs; None without a classifier."""
        if self.classes == 'none':
            return None
        if self.classes == 'ImageNet':
            known = heads.find_known(1000, channels=3)
            return known.class_names if known else None
        return tuple(
            f'{name} (not trained)' if number in self.untrained else name
            for number, name in enumerate(heads.TORCHXRAYVISION)
        )

    @property
    def outputs(self) -> str:
        """The kind of the outputs, one of `heads.OUTPUTS`."""
        return heads.SIGMOID if self.classes == 'findings' else heads.SOFTMAX


class WeightsTable(list[PublishedWeights]):
    """A list of `PublishedWeights` that prints as a table."""

    def __repr__(self):
        from flax_densenet.weights import published_table

        return published_table.format_text(self)


def _prepare(size=224, *, crop=0.875, resize='crop', interpolation='bicubic'):
    return dict(
        image_size=size,
        resize=resize,
        crop_fraction=crop,
        interpolation=interpolation,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        channels=3,
    )


def _torchvision(variant, parameters, digits, top1, top5, size):
    return PublishedWeights(
        f'torchvision:{variant}',
        variant,
        parameters,
        f'https://download.pytorch.org/models/{variant}-{digits}.pth',
        _prepare(interpolation='bilinear'),
        accuracy=f'{top1:.2f}% top-1, {top5:.2f}% top-5',
        accuracy_source='torchvision 0.28, models/densenet.py',
        license='not stated; torchvision is BSD-3-Clause',
        size=round(size * _MIB),
        checksum=download.Checksum('sha256', digits),
    )


_KERAS = 'https://storage.googleapis.com/tensorflow/keras-applications/densenet/'


def _keras(variant, parameters, md5, top1=None, top5=None, size=None):
    """An entry with a classifier if there is an accuracy, else without."""
    top = top1 is not None
    ending = '' if top else '_notop'
    return PublishedWeights(
        f'keras:{variant}' + ('' if top else '-notop'),
        variant,
        parameters,
        f'{_KERAS}{variant}_weights_tf_dim_ordering_tf_kernels{ending}.h5',
        _prepare(resize='stretch', crop=1.0, interpolation='bilinear'),
        classes='ImageNet' if top else 'none',
        accuracy=f'{top1}% top-1, {top5}% top-5' if top else None,
        accuracy_source='keras.io/api/applications' if top else None,
        license='not stated; Keras is Apache-2.0',
        size=size and size * 10**6,
        checksum=download.Checksum('md5', md5),
    )


_XRV = 'https://github.com/mlmed/torchxrayvision/releases/download/v1/'


def _xrv(name, file, untrained=(), accuracy=None):
    return PublishedWeights(
        f'xrv:densenet121-res224-{name}',
        'densenet121',
        6966034,
        f'{_XRV}{file}-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt',
        dict(
            image_size=224,
            resize='crop',
            crop_fraction=1.0,
            interpolation='bilinear',
            mean=(0.5,),
            std=(1 / 2048,),
            channels=1,
        ),
        classes='findings',
        accuracy=accuracy,
        accuracy_source=accuracy and 'torchxrayvision, BENCHMARKS.md of 2023-07-23',
        license='not stated; torchxrayvision is Apache-2.0',
        untrained=untrained,
    )


def _timm(repo, variant, parameters, accuracy, license='apache-2.0', **preparation):
    return PublishedWeights(
        f'hf:{repo}',
        variant,
        parameters,
        repo,
        _prepare(**preparation),
        accuracy=accuracy,
        accuracy_source='timm 1.0, results/results-imagenet.csv',
        license=f'{license}, as timm states',
    )


# Outputs for which a data set has no labels.
_CHEX = (2, 5, 6, 9, 11, 12, 13)
TABLE = WeightsTable(
    [
        _torchvision('densenet121', 7978856, 'a639ec97', 74.434, 91.972, 30.845),
        _torchvision('densenet161', 28681000, '8d451a50', 77.138, 93.560, 110.369),
        _torchvision('densenet169', 14149480, 'b2777c0a', 75.600, 92.806, 54.708),
        _torchvision('densenet201', 20013928, 'c1103571', 76.896, 93.370, 77.373),
        _keras(
            *('densenet121', 7978856, '9d60b8095a5708f2dcce2bca79d332c7'),
            *(75.0, 92.3, 33),
        ),
        _keras(
            *('densenet169', 14149480, 'd699b8f76981ab1b30698df4c175e90b'),
            *(76.2, 93.2, 57),
        ),
        _keras(
            *('densenet201', 20013928, '1ceb130c1ea1b78c3bf6114dbdfd8807'),
            *(77.3, 93.6, 80),
        ),
        _keras('densenet121', 6953856, '30ee3e1110167f948a6b9946edeeb738'),
        _keras('densenet169', 12484480, 'b8c4d4c20dd625c148057b9ff1c1176b'),
        _keras('densenet201', 18092928, 'c13680b51ded0fb44dff2d8f86ac8bb1'),
        _xrv(
            'all',
            'nih-pc-chex-mimic_ch-google-openi-kaggle',
            accuracy='AUROC 0.68 to 0.91 over 14 findings of NIH ChestX-ray14',
        ),
        _xrv('nih', 'nih', (14, 15, 16, 17)),
        _xrv('pc', 'pc', (14, 16, 17)),
        _xrv('chex', 'chex', _CHEX),
        _xrv('rsna', 'kaggle', tuple(n for n in range(18) if n not in (8, 16))),
        _xrv('mimic_nb', 'mimic_nb', _CHEX),
        _xrv('mimic_ch', 'mimic_ch', _CHEX),
        _timm(
            *('timm/densenet121.ra_in1k', 'densenet121', 7978856),
            '75.57% top-1, 92.65% top-5 (76.49% at 288 pixels)',
        ),
        _timm(
            *('timm/densenetblur121d.ra_in1k', 'densenetblur121d', 7998088),
            '76.57% top-1, 93.19% top-5 (77.32% at 288 pixels)',
        ),
        _timm(
            *('naver-ai/rdnet_tiny.nv_in1k', 'rdnet_tiny', 23863008),
            *('82.81% top-1, 96.28% top-5',),
            crop=0.9,
        ),
        _timm(
            *('naver-ai/rdnet_small.nv_in1k', 'rdnet_small', 50436448),
            *('83.66% top-1, 96.70% top-5',),
            crop=0.9,
        ),
        _timm(
            *('naver-ai/rdnet_base.nv_in1k', 'rdnet_base', 87451096),
            *('84.37% top-1, 96.88% top-5',),
            crop=0.9,
        ),
        _timm(
            *('naver-ai/rdnet_large.nv_in1k', 'rdnet_large', 186269632),
            *('84.79% top-1, 97.16% top-5',),
            crop=0.9,
        ),
        _timm(
            *('naver-ai/rdnet_large.nv_in1k_ft_in1k_384', 'rdnet_large', 186269632),
            *('85.84% top-1, 97.68% top-5',),
            size=384,
            crop=1.0,
        ),
    ]
)
# The weights that the bare name of a network means. For DenseNets they are those of
# torchvision, which `pretrained=True` has always loaded there. All four sizes have the
# same training and preparation, and the file names contain checksums.
DEFAULTS = {
    **{f'densenet{n}': f'torchvision:densenet{n}' for n in (121, 161, 169, 201)},
    'densenetblur121d': 'hf:timm/densenetblur121d.ra_in1k',
    **{f'rdnet_{n}': f'hf:naver-ai/rdnet_{n}.nv_in1k' for n in ('tiny', 'small')},
    **{f'rdnet_{n}': f'hf:naver-ai/rdnet_{n}.nv_in1k' for n in ('base', 'large')},
}
_REPO = re.compile(r'[\w.-]+/[\w.-]+(@[\w./-]+)?')


@dataclasses.dataclass(frozen=True)
class Fetched:
    """Files of published weights on this machine.

    Attributes:
      name: the name that was requested.
      path: the file, or the folder of the Hub.
      entry: the entry in the table; None if the weights are not in it.
    """

    name: str
    path: str
    entry: PublishedWeights | None

    def describe(self, weights: Any) -> Any:
        """Adds what the table knows to the `weight_file.Weights` of the file.

        Raises:
          UserError: the file holds another network than the table says.
        """
        entry = self.entry
        if entry is None:
            return dataclasses.replace(weights, path=self.name)
        if weights.fields['variant'] != entry.variant:
            raise UserError(
                f'{self.path} holds a {weights.fields["variant"]}, but {self.name} is '
                f'a {entry.variant}; remove it, and the next call downloads it again'
            )
        names = entry.class_names
        if names and len(names) != weights.num_classes:
            raise UserError(
                f'{self.path} has {weights.num_classes} outputs, but {self.name} has '
                f'{len(names)}; remove it, and the next call downloads it again'
            )
        prepared = entry.preparation
        if entry.name.startswith('hf:'):  # the folder describes its preparation
            prepared = weights.preprocessing
        return dataclasses.replace(
            weights,
            path=self.name,
            preprocessing=weights.preprocessing | prepared,
            prepared=frozenset(prepared),
            class_names=weights.class_names or names,
            outputs=weights.outputs or entry.outputs,
        )


def list_weights(pattern: str = '*') -> WeightsTable:
    """Published weights by name, for `load`, `create_model` and `init_from`.

    >>> print(list_weights('torchvision:densenet121')[0].accuracy)
    74.43% top-1, 91.97% top-5

    Args:
      pattern: a pattern for names, with `*` and `?`, or a part of a name.

    Returns:
      A list of records with `name`, `variant`, `parameters`, `image_size`,
      `preparation`, `accuracy`, `accuracy_source`, `license` and `size`; `print` shows
      it as a table. Nothing is downloaded.
    """
    if not isinstance(pattern, str):
        raise UserError(f'pattern={pattern!r} must be text')
    if not any(character in pattern for character in '*?['):
        pattern = f'*{pattern}*'
    return WeightsTable(e for e in TABLE if fnmatch.fnmatchcase(e.name, pattern))


def is_name(text: Any) -> bool:
    """Whether a text names published weights rather than something on disk.

    >>> is_name('torchvision:densenet121'), is_name('hf:timm/densenet121.ra_in1k')
    (True, True)
    >>> is_name('densenet121.pth'), is_name('ckpt/photos')
    (False, False)
    """
    if not isinstance(text, str) or os.path.lexists(text):
        return False
    kind, colon, _ = text.partition(':')
    return (
        text in DEFAULTS
        or (bool(colon) and kind in KINDS)
        or _ADDRESS.match(text) is not None
    )


def find(name: str) -> PublishedWeights | None:
    """The entry for a name; None for a repository or an address not in TABLE.

    Raises:
      UserError: there are no weights with this name.
    """
    name = DEFAULTS.get(name, name)
    for entry in TABLE:
        if entry.name == name:
            return entry
    kind = name.partition(':')[0]
    if kind == 'hf' or _ADDRESS.match(name):
        return None
    known = [entry.name for entry in TABLE]
    close = difflib.get_close_matches(name, known, 1, 0.5)
    of_kind = [n for n in known if n.startswith(f'{kind}:')]
    raise UserError(
        f'{name}: there are no such weights; '
        + (f'did you mean {close[0]}? There' if close else 'there')
        + f' are {", ".join(of_kind or [*DEFAULTS])}; `weights` lists all'
    )


def suggest(text: str) -> str:
    """The end of the message that a text is neither a file nor a name; may be ''.

    >>> suggest('densenet12'), suggest('timm/densenet121.ra_in1k')
    ('; did you mean densenet121?', '; did you mean hf:timm/densenet121.ra_in1k?')
    """
    known = [*DEFAULTS, *(entry.name for entry in TABLE)]
    close = difflib.get_close_matches(text.lower(), known, 1, 0.85)
    if f'hf:{text}' in known:
        close = [f'hf:{text}']
    if close:
        return f'; did you mean {close[0]}?'
    if re.fullmatch(r'(dense|rd)net\w*', text, re.IGNORECASE):
        return f'; by name there are {", ".join(DEFAULTS)}'
    return ''


def fetch(name: str) -> Fetched:
    """The files of published weights; downloads them if necessary.

    Args:
      name: see `is_name`.

    Raises:
      UserError: there are no such weights, or they cannot be downloaded.
    """
    entry = find(name)
    full = entry.name if entry else name
    if full != name:
        _LOGGER.info(f'{name} means {full}; the command weights lists others')
    if full.startswith('hf:'):
        repo, _, revision = full.removeprefix('hf:').partition('@')
        if not _REPO.fullmatch(full.removeprefix('hf:')):
            raise UserError(f'{name}: give hf:OWNER/NAME or hf:OWNER/NAME@REVISION')
        from flax_densenet.weights import hub  # which imports JAX

        return Fetched(full, hub.fetch(repo, revision or None), entry)
    if entry:
        path = download.fetch(entry.address, checksum=entry.checksum, size=entry.size)
        return Fetched(full, path, entry)
    url, checksum = _split_checksum(name)
    return Fetched(url, download.fetch(url, checksum=checksum), None)


def _split_checksum(text):
    """An address and the checksum after its #."""
    url, _, fragment = text.partition('#')
    host = urllib.parse.urlsplit(url).hostname or ''
    if host in ('huggingface.co', 'hf.co') and '/resolve/' not in url:
        repo = '/'.join(urllib.parse.urlsplit(url).path.split('/')[1:3])
        raise UserError(f'{text} is a page; for its weights give hf:{repo}')
    digits = fragment.lower().removeprefix('sha256=')
    if not fragment.lower().startswith('sha256=') or not re.fullmatch(
        '[0-9a-f]{64}', digits
    ):
        raise UserError(
            f'{text}: end it with #sha256=DIGEST, the 64 digits that `sha256sum FILE` '
            'prints for a copy that you trust'
        )
    return url, download.Checksum('sha256', digits)
