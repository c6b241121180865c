"""Writes model cards: Markdown files about what a model is, can do and cannot do.

An exported file gets `MODEL_CARD.md` next to it, or `FILE.MODEL_CARD.md` if that is the
card of another file; a folder for the Hugging Face Hub gets `README.md` with the header
that the Hub reads. All are made from `templates/card.md.jinja`. The card states which
facts are unknown.
"""

import functools
import html
import json
import os
import re
import shlex
from typing import Any

from flax_densenet import errors
from flax_densenet._version import __version__
from flax_densenet.errors import UserError, printable
from flax_densenet.export import model_card_facts
from flax_densenet.report import render as render_lib
from flax_densenet.system import atomic, environment
from flax_densenet.weights import trained as trained_lib

FILE, HUB_FILE = 'MODEL_CARD.md', 'README.md'
# Users who edit a card remove this line to keep it.
MARKER = '<!-- flax_densenet wrote this card; an export replaces it while this line '
MARKER += 'is here. -->'
NAMES = 200  # the most class names in a card
_ODD = re.compile(r'[`|\\]|^\s|\s$|\s\s')
_FILE_ROW = re.compile(r'^\| File \| (?:`([^`]+)`|<code>(.+)</code>)[ ,]', re.M)
_TITLES = {
    'accuracy': 'Accuracy',
    'top5': 'Top-5 accuracy',
    'precision': 'Precision, mean of classes',
    'recall': 'Recall, mean of classes',
    'f1': 'F1, mean of classes',
    'auroc': 'AUROC, mean of classes',
    'loss': 'Cross-entropy, nats',
}
_SHARES = ('accuracy', 'top5', 'precision', 'recall')
FORMATS = {
    'torch': 'PyTorch state dict',
    'safetensors': 'safetensors',
    'keras': 'Keras',
    'onnx': 'ONNX',
    'stablehlo': 'StableHLO of jax.export',
    'huggingface': 'folder for the Hugging Face Hub',
}
# The Hub's names of licenses; all others are `other`.
_LICENSES = (
    *('apache-2.0', 'mit', 'bsd', 'bsd-2-clause', 'bsd-3-clause', 'isc', 'mpl-2.0'),
    *('gpl-2.0', 'gpl-3.0', 'agpl-3.0', 'lgpl-2.1', 'lgpl-3.0', 'epl-2.0', 'eupl-1.2'),
    *('unlicense', 'wtfpl', 'zlib', 'openrail', 'odbl', 'pddl', 'cc0-1.0'),
    *('cc-by-2.0', 'cc-by-3.0', 'cc-by-4.0', 'cc-by-sa-3.0', 'cc-by-sa-4.0'),
    *('cc-by-nc-3.0', 'cc-by-nc-4.0', 'cc-by-nd-4.0', 'cc-by-nc-nd-4.0'),
    *('cc-by-nc-sa-3.0', 'cc-by-nc-sa-4.0', 'unknown', 'other'),
)


def render(
    trained: trained_lib.Trained,
    *,
    workdir: str | None = None,
    facts=(),
    file: str | None = None,
    file_format: str | None = None,
    license: str | None = None,
    data_license: str | None = None,
    hub: bool = False,
) -> str:
    """The card of a model, as Markdown.

    Args:
      trained: the model.
      workdir: folder of the run, for metrics and the recipe; None if there is none.
      facts: `(name, value)` of the export: precision, differences, accuracy. With
        `('inputs', 'normalized')`, ONNX and StableHLO take normalized images, otherwise
        uint8 images.
      file: the exported file, or the folder for the Hub.
      file_format: a key of `FORMATS`.
      license: of the weights; None if unknown.
      data_license: of the data; None if unknown.
      hub: add the header that the Hub reads; `file_format` is then `huggingface`.

    Raises:
      UserError: files in the workdir are not those of a run.
    """
    model = model_card_facts.describe_model(trained)
    run = model_card_facts.describe_run(trained, workdir)
    metrics = model_card_facts.describe_metrics(trained, workdir)
    title = _title(model)
    name = os.path.basename(os.path.abspath(file)) if file else None
    key = 'huggingface' if hub else file_format
    facts = [(str(one), str(other)) for one, other in facts]
    values = {
        'header': _header(title, model, metrics, license) if hub else '',
        'title': title,
        'model': model,
        'size': model['preparation'].shape_text.replace('x', ' x '),
        'height': model['preparation'].shape[0],
        'width': model['preparation'].shape[1],
        'run': run,
        'metrics': metrics,
        'license': license,
        'data_license': data_license,
        'file': printable(name) if name else None,
        'format_key': key,
        'format': FORMATS.get(key, key) if key else None,
        'facts': facts,
        'versions': _versions(run),
    } | _code_of(model, name, key, ('inputs', 'normalized') in facts)
    return re.sub(
        r'\n{3,}', '\n\n', _environment().get_template('card.md.jinja').render(values)
    )


def _title(model):
    """The network and, if there are only a few, the classes."""
    network = model['family']['name'] if model['changes'] else model['variant']
    names, count = model['class_names'] or (), model['num_classes']
    if 1 < len(names) <= 4 and sum(map(len, names)) <= 60:
        return f'{network} for {", ".join(names[:-1])} and {names[-1]}'
    what = 'labels' if model['multi_label'] else 'classes'
    return f'{network} for {count} {what}'


def _code_of(model, name, key, normalized):
    """Values for the code examples."""
    library, torch_model = 'torchvision', f'torchvision.models.{model["torchvision"]}'
    if model['torchvision'] is None and model['timm']:
        architecture, arguments = model['timm']
        more = {'num_classes': model['num_classes']} | arguments
        more = ', '.join(f'{key}={value!r}' for key, value in more.items())
        library, torch_model = 'timm', f'timm.create_model({architecture!r}, {more})'
    start = shlex.quote(printable(name or 'FOLDER'))
    return {
        'command': f'flax-densenet predict {start} photos',
        'torch_library': library,
        'torch_model': torch_model,
        'file_literal': ascii(name or 'FOLDER'),
        'weights_alone': bool(name and name.endswith('.weights.h5')),
        'keras_model': _keras_model(model),
        'normalized': normalized,
        'takes_pixels': key in ('onnx', 'stablehlo') and not normalized,
        'gives_logits': normalized or key not in ('onnx', 'stablehlo', 'keras'),
    }


def _keras_model(model):
    (height, width), channels = model['preparation'].shape, model['channels']
    options = (
        f'weights=None, classes={model["num_classes"]}, '
        f'input_tensor=keras.Input(({height}, {width}, {channels})))'
    )
    public = ('densenet121', 'densenet169', 'densenet201')
    if model['variant'] in public and not model['changes']:
        return f'keras.applications.DenseNet{model["variant"][-3:]}({options}'
    # The public functions have fixed lists of blocks; this one takes any.
    return (
        'keras.src.applications.densenet.DenseNet('
        f'{list(model["block_sizes"])}, {options}'
    )


def _versions(run):
    """`(name, version at export, version in training)`; None if unknown."""
    now = {'flax_densenet': __version__} | environment.versions()
    before = run['environment']
    names = (*now, *(name for name in ('device', 'commit') if before.get(name)))
    return [(name, now.get(name), before.get(name)) for name in names]


def _header(title, model, metrics, license):
    """The YAML header; its values are JSON, which is a subset of YAML."""
    made = {'license': _license_id(license)}
    if made['license'] == 'other' and license.lower() != 'other':
        made['license_name'] = printable(license)
    family = model['family']['name'].lower()
    made |= {
        'library_name': 'timm' if model['timm'] else 'flax_densenet',
        'pipeline_tag': 'image-classification',
        'tags': ['image-classification', family, 'flax', 'jax', 'flax_densenet']
        + ['timm'] * bool(model['timm']),
    }
    if metrics:
        source = printable(metrics['source'] or 'unknown')
        accuracy = {'type': 'accuracy', 'value': metrics['accuracy']}
        result = {
            'task': {'type': 'image-classification'},
            'dataset': {'name': source, 'type': _dataset_id(source)},
            'metrics': [accuracy],
        }
        made['model-index'] = [{'name': title, 'results': [result]}]
    lines = [
        f'{key}: {json.dumps(value, ensure_ascii=False)}' for key, value in made.items()
    ]
    return '\n'.join(['---', *lines, '---', '', ''])


def _dataset_id(source):
    """A name as the Hub takes one: letters, digits, `-`, `_` and `.`."""
    return re.sub(r'[^A-Za-z0-9._-]+', '-', source).strip('-.') or 'unknown'


def _license_id(license):
    if license is None:
        return 'unknown'
    return license.lower() if license.lower() in _LICENSES else 'other'


def check_installed():
    """Raises where the extra `export`, which renders the card, is missing."""
    with errors.extra('export', 'the model card'):
        import jinja2  # noqa: F401


@functools.cache  # with the template that it compiled
def _environment():
    import jinja2

    # Markdown, not HTML: untrusted text goes through `code` or `text`.
    made = jinja2.Environment(
        loader=jinja2.PackageLoader('flax_densenet.export'),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        'code': code,
        'text': text,
        'percent': render_lib.percent,
        'figure': render_lib.figure,
        'interval': _interval,
        'ends': lambda pair: f'{pair[0]:.3f} to {pair[1]:.3f}',
        'brackets': lambda pair: f' ({_interval(pair)})' if pair else '',
        'count': lambda number: f'{number:,}',
    }
    made.globals |= {
        'row_title': _row_title,
        'shares': _SHARES,
        'names_most': NAMES,
        'few': model_card_facts.FEW,
        'marker': MARKER,
    }
    return made


def _row_title(name, multi_label):
    if multi_label and name == 'accuracy':
        return 'Label accuracy'
    return _TITLES[name].replace('classes', 'labels' if multi_label else 'classes')


def _interval(pair):
    low, high = pair
    return f'{low * 100:.1f}% to {high * 100:.1f}%'


def code(value: Any) -> str:
    """Formats any text as inline code of Markdown, in a line or a table cell.

    >>> print(code('golden_retriever <b>'), code('a|b'))
    `golden_retriever <b>` <code>a&#124;b</code>
    """
    content = printable(str(value))
    if content and not _ODD.search(content):
        return f'`{content}`'
    # Escapes every character that could have a meaning in Markdown or a table.
    signs = (c if c.isalnum() else f'&#{ord(c)};' for c in content)
    return f'<code>{"".join(signs)}</code>'


def text(value: Any) -> str:
    """Escapes any text for Markdown.

    >>> print(text('1 < 2 *and* |'))
    1 \\< 2 \\*and\\* \\|
    """
    content = printable(str(value))
    content = re.sub(r'[\\`*{}\[\]<>#|~$&@^!]|\b_|_\b', r'\\\g<0>', content)
    # Prevents links and images.
    return re.sub(r':(?=//|\w+:)|(?<=www)\.', r'\\\g<0>', content)


def path_for(file: str) -> str:
    """Path of the card for an exported file.

    It is `MODEL_CARD.md` in the file's folder. If that is the card of another file that
    is there, too, it is `FILE.MODEL_CARD.md`, so that each file keeps its card.
    """
    folder, name = os.path.split(os.path.abspath(file))
    usual = os.path.join(folder, FILE)
    own = os.path.join(folder, f'{name}.{FILE}')
    if os.path.exists(own):
        return own
    other = _file_of(usual)
    if other in (None, printable(name)):
        return usual
    return own if os.path.exists(os.path.join(folder, other)) else usual


def _file_of(path):
    """The name of the file that a card is about; None if there is none."""
    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            found = _FILE_ROW.search(file.read())
    except OSError:
        return None
    return found and (found[1] or html.unescape(found[2]))


def check(path: str):
    """Checks that there is no file, or one that this program wrote.

    Raises:
      UserError: the file has another author, or cannot be read.
    """
    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            ours = MARKER in file.read()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    if not ours:
        raise UserError(
            f'{path} exists and was not written by this program, or was edited; move '
            'it or use another --out'
        )


def save(path: str, text: str):
    """Writes a card atomically, but does not overwrite files of others.

    Raises:
      UserError: see `check`; or the card cannot be written.
    """
    check(path)
    try:
        with atomic.replacing(path, encoding='utf-8') as file:
            file.write(text)
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror})') from error
