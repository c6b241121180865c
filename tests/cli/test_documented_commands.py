"""The commands of the documentation run, page by page, on small images and networks.

A block of commands that is not run here says so on the line before it:
`<!-- not run: REASON -->`.
"""

import re
import shlex
import shutil

import pytest
from PIL import Image

from faults import fuzz_seeds
from flax_densenet.serving import server
from helpers import commands as command_helpers
from helpers import runs, weight_files
from helpers.marks import exhaustive_after
from helpers.paths import ROOT

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
_BLOCK = re.compile(
    r'(?:^ *<!-- not run: ([^\n]+?) -->\n)?^ *```bash\n(.*?)^ *```', re.M | re.S
)
_PROGRAM = re.compile(r'(?:python launch\.py|flax-densenet) (.+)')
XRAYS = 'nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121.pt'
_TRAINING = ('train', 'sweep', 'lr_find', 'crossval')
# What makes training quick, and the network small where the command names none.
_QUICK = {
    'train.epochs': '1',
    'data.image_size': '32',
    'data.batch_size': '4',
    'train.head_warmup_epochs': '0',
    'optimizer.schedule': 'constant',
    'optimizer.warmup_epochs': '0',
    'optimizer.learning_rate': '1e-3',
}
_SMALL = {
    'model.variant': 'BC-L10k4',
    'model.growth_rate': '4',
    'model.block_sizes': '(1,1)',
}


def find_blocks(path):
    """`(reason not to run it, commands)` of each block of a page."""
    for reason, block in _BLOCK.findall(path.read_text(encoding='utf-8')):
        lines = re.sub(r'\\\n\s*', ' ', block).splitlines()
        yield reason, [shlex.split(line, comments=True) for line in lines]


def list_run(path):
    """The arguments of the program's commands that are run."""
    for reason, lines in find_blocks(path):
        for words in lines:
            found = _PROGRAM.fullmatch(shlex.join(words))
            if found and not reason:
                yield shlex.split(found[1])


def make_quick(words):
    """A command that trains does so for one epoch, by a network of a second."""
    if words[0] == 'serve':
        return [*words, '--port=0']
    if not words[0].startswith('--') and words[0] not in _TRAINING:
        return words
    text = ' '.join(words)
    fields = dict(_QUICK)
    if not re.search(r'finetune|linear_probe|init_from', text):
        fields |= _SMALL
    more = [f'--config.{n}={v}' for n, v in fields.items() if n not in text]
    if words[0] == 'sweep' and '--trials' in text:
        more.append('--trials=2')
    return [*words, *more]


PAGES_THAT_RUN = {path.stem: list(list_run(path)) for path in PAGES}
CORE = ('README',)
PAGES_IN_ORDER = [
    *CORE,
    *(p for p, run in PAGES_THAT_RUN.items() if run and p not in CORE),
]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with what the pages speak of."""
    folder = tmp_path_factory.mktemp('documented')
    names = ('photos', 'others', 'hymenoptera', 'imagenet', 'x-rays', 'cats')
    for seed, name in enumerate(names):
        runs.write_images(folder / name, {'ants': 8, 'bees': 8}, seed=seed)
    runs.write_images(folder, {'new_photos': 2})
    files = sorted((folder / 'x-rays').glob('*/*.jpg'))
    rows = [
        f'{file.relative_to(folder / "x-rays")},{n % 2},{n // 2 % 2}'
        for n, file in enumerate(files)
    ]
    table = '\n'.join(['Image Index,Effusion,Mass', *rows, ''])
    (folder / 'labels.csv').write_text(table)
    for name in ('photo.jpg', 'new.jpg'):
        Image.new('RGB', (40, 30), 'olive').save(folder / name)
    weights = fuzz_seeds.torch_zip(weight_files.state_dict(num_classes=2))
    for name in ('densenet121.pth', 'mine.pth', 'WEIGHTS'):
        (folder / name).write_bytes(weights)
    weights = weight_files.state_dict(num_classes=18, channels=1)
    (folder / XRAYS).write_bytes(fuzz_seeds.torch_zip(weights))
    return folder


def test_all_blocks_are_found():
    """As many as there are fences of commands, whatever stands before them."""
    for path in PAGES:
        text = path.read_text(encoding='utf-8')
        assert len(list(find_blocks(path))) == text.count('```bash\n'), path.name
    assert sum(map(len, PAGES_THAT_RUN.values())) > 30


@pytest.mark.slow
@pytest.mark.parametrize('page', exhaustive_after(len(CORE), PAGES_IN_ORDER))
def test_commands_of_a_page(page, place, monkeypatch, capfd):
    """Each one in its order, after the run that most pages begin with."""
    monkeypatch.chdir(place)
    # It would answer until it is stopped.
    monkeypatch.setattr(server, 'run', lambda trained, listener, **_: listener.close())
    run = command_helpers.make_main(monkeypatch, capfd)
    shutil.rmtree(place / 'ckpt', ignore_errors=True)
    text = ' '.join(word for words in PAGES_THAT_RUN[page] for word in words)
    runs_of_others = [name for name in ('photos', 'birds', 'moles') if name in text]
    first = place / 'first_run'  # trained for the first page that needs it
    if runs_of_others and not first.exists():
        assert run(*make_quick(['train', 'photos', f'--workdir={first}']))[0] == 0
    for name in runs_of_others:
        shutil.copytree(first, place / 'ckpt' / name)
    for words in PAGES_THAT_RUN[page]:
        status, out, err = run(*make_quick(words))
        assert status == 0, f'{shlex.join(words)}\n{out}\n{err}'
