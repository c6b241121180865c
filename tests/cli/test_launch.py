"""The command line as a user meets it."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from flax_densenet import load_trained
from flax_densenet.cli import commands
from flax_densenet.inference import feature_files
from flax_densenet.train import fit, lr_finder
from helpers import commands as helper
from helpers.paths import ROOT
from helpers.runs import make_weights, tiny_config, write_images

pytestmark = pytest.mark.drawn

TINY = [
    '--config.model.variant=BC-L10k4',
    '--config.data.image_size=8',
    '--config.data.batch_size=128',
    '--config.train.epochs=2',
    '--config.model.block_sizes=(1,1)',
    '--config.optimizer.learning_rate=3e-3',
]


def launch(*arguments):
    command = [sys.executable, str(ROOT / 'launch.py'), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def main(monkeypatch, capfd):
    return helper.make_main(monkeypatch, capfd)


def test_lr_find_writes_and_says_where(main, tmp_path, monkeypatch):
    result = {'data': 'digits', 'network': 'DenseNet-121', 'suggestion': 0.01}
    result |= {'stopped': None, 'mean': [2.0, 1.0]}
    result |= {'learning_rate': [0.01, 0.1], 'loss': [2.0, 1.0]}
    monkeypatch.setattr(lr_finder, 'find', lambda fields, workdir, steps: result)
    done = main('lr_find', f'--workdir={tmp_path}')
    assert done == (
        0,
        'suggested: --config.optimizer.learning_rate=0.01 (a tenth of the rate with '
        f'the lowest mean loss); lr_find.png and lr_find.json are in {tmp_path}\n',
        '',
    )
    assert (tmp_path / 'lr_find.png').read_bytes()[:4] == b'\x89PNG'


def test_a_former_name_of_a_field(main, tmp_path):
    done = main('summary', '--config.data.colour_jitter=(0.4,)', 'BC-L10k4')
    assert done[0] == 0, done
    assert done[1].startswith(
        'warning: data.colour_jitter is now called data.color_jitter; the old name '
        'still works\nBC-L10k4 with 1000 classes\n'
    )


def one_line_error(status, out, err):
    assert (status, out) == (2, '')
    (line,) = err.splitlines()
    assert line.startswith('error: ')
    return line


def test_train_and_evaluate(main, tmp_path):
    workdir = f'--workdir={tmp_path}/run'
    # Fields before the file, which ml_collections alone would refuse.
    status, out, err = main(*TINY, '--config=configs/densenet121.py', workdir)
    assert status == 0, err
    lines = out.splitlines()
    assert [line[:10] for line in lines if line[:6] == 'Epoch:'] == [
        'Epoch:  1.',
        'Epoch:  2.',
    ]
    best = max(
        (line for line in lines if line.startswith('Epoch')),
        key=lambda line: float(line.split('Test_acc: ')[1].split('%')[0]),
    )
    figures = best.split('Test_acc')[1].split(', Lr')[0]
    status, out, _ = main('--mode=eval', workdir, '--raw')  # as in training
    assert status == 0
    assert out.startswith(f'Test_acc{figures} (360 test images of digits')

    files = ('report.html', 'eval.json', 'predictions.csv', 'environment.json')
    assert all((tmp_path / 'run' / name).exists() for name in files)
    (tmp_path / 'run' / 'report.html').unlink()
    done = main('--mode=report', workdir)
    assert done == (0, f'{tmp_path}/run/report.html: open it in a browser\n', '')
    assert (tmp_path / 'run' / 'report.html').exists()
    shutil.copytree(tmp_path / 'run', tmp_path / 'runs' / 'a')
    shutil.copytree(tmp_path / 'run', tmp_path / 'runs' / 'b')
    done = main('--mode=report', f'--workdir={tmp_path}/runs/*')
    page = f'{tmp_path}/runs/compare.html'
    assert done == (0, f'{page}: 2 runs compared\n', '')


@pytest.mark.slow
def test_other_weights_and_data(main, tmp_path):
    """One file of a run evaluates to the same, and starts another run."""
    workdir = f'--workdir={tmp_path}/run'
    config = tiny_config(**{'model.block_sizes': (1, 1)})
    fit.fit(config, f'{tmp_path}/run')
    status, out, err = main('--mode=eval', workdir)
    figures = out.split('Test_acc')[1].split(' (')[0]
    file = f'{tmp_path}/birds.safetensors'
    status, out, err = main('--mode=export', workdir, f'--out={file}')
    assert out.startswith(f'{file}: the model of {tmp_path}/run\n  format: safetens')
    assert 'flax_densenet: largest difference' in out and 'images of digits' in out
    start = [f'--config.init_from={file}', f'--workdir={tmp_path}/other']
    status, out, err = main('--mode=eval', *start)
    assert (status, err) == (0, '')
    assert out.startswith(f'Test_acc{figures} (360 test images of digits')
    assert out.splitlines()[0].endswith(f'weights of {file})')
    status, out, err = main('--mode=summary', start[0])
    assert 'BC-L10k4 with 10 classes' in out

    # Other data, with some of the classes: all of it is used.
    photos = write_images(tmp_path / 'photos', {'3': 4, '8': 5})
    status, out, err = main(
        '--mode=eval', workdir, f'--config.data.source=folder:{photos}'
    )
    assert (status, err) == (0, '')
    assert f'(9 images of folder:{photos}, best' in out
    done = main('--mode=eval', workdir, '--config.model.growth_rate=3')
    assert 'only data.* fields can be set' in one_line_error(*done)


@pytest.mark.parametrize(
    ('arguments', 'size'),
    [
        (['--config=configs/cifar.py:L40k12'], '32x32x3'),
        ([], '32x32x3'),
        (['--config.data.source=folder:photos'], '224x224x3'),
    ],
)
def test_summary(main, arguments, size):
    small = '--config.model.block_sizes=(1,1,1)'
    status, out, err = main('--mode=summary', *arguments, small)
    assert (status, err) == (0, '')
    assert size in out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--config.optimizer.learning_rat=1'], 'did you mean optimizer.learning_r'),
        (['--config.train.epochs=many'], '=many: it must be a whole number'),
        (['--config.train.epochs=1.5'], '=1.5: it must be a whole number'),
        (['--config.optimizer.learning_rate=fast'], 'fast: it must be a number'),
        (['--config.train.report=maybe'], 'report=maybe: it must be true or false'),
        (
            ['--config=configs/cifar.py:40_12,x'],
            'configs/cifar.py:40_12,x: x is not known; use 40_12 or 40_12,code',
        ),
        (['--config=configs/none.py'], '--config=configs/none.py: there is no such'),
        (['--mode=dance'], '--mode=dance is not known; the commands are train, eval'),
        (['--color=red'], '--color is not a flag of train'),
        (['photos'], 'photos is not a command; the commands are'),
        (['--config.data.source=folder:/none'], 'there is no such folder'),
        (['--mode=eval', '--workdir=/none'], '--workdir=/none holds no checkpoint'),
        (['--mode=report', '--workdir=/none/*'], 'no folder of a run matches'),
        (['--mode=report', '--workdir=/a,/b'], '--workdir=/a holds no run with a'),
        (['--config.init_from=/none.pth'], 'init_from=/none.pth: there is no such'),
        (['--mode=export'], 'export needs the file to write: export MODEL FILE'),
        (['--mode=lr_find', '--steps=3'], '--steps=3 are too few; use 40 or more'),
        (
            ['--sweep=train.seed=0,1'],
            '--sweep is a flag of sweep; train does',
        ),
        (['--mode=sweep'], 'sweep needs --sweep=FIELD=VALUE,VALUE'),
        (
            ['--mode=sweep', '--sweep=optimizer.learning_rat=1,2'],
            '--sweep: optimizer.learning_rat is not a field; did you mean optimizer.l',
        ),
        (
            ['--mode=sweep', '--sweep=train.epochs=1,1.5'],
            '--sweep: train.epochs=1.5: it must be a whole number',
        ),
        (
            ['--mode=sweep', '--sweep=data.batch_size=64,5000'],
            '--sweep: with data.batch_size=5000: data.batch_size=5000 is larger than',
        ),
        (['--mode=sweep', '--sweep=train.seed=0,-1'], 'with train.seed=-1: train.seed'),
        (
            ['--mode=sweep', '--sweep=optimizer.learning_rate=1e-3..1'],
            '--sweep=optimizer.learning_rate=1e-3..1: a range needs --trials=N',
        ),
        (
            ['--mode=sweep', '--sweep=model.variant=1..2', '--trials=2'],
            'the field is not a number; list its values',
        ),
        (['--mode=sweep', '--sweep=train.seed=0', '--trials=2'], 'needs a field to'),
        (
            ['--mode=sweep', '--sweep=train.epochs=1,2', '--prune=median'],
            '--prune=median compares runs epoch by epoch',
        ),
        (
            ['--mode=sweep', '--sweep=train.seed=0', '--prune=best'],
            '--prune=best is not known; use none, median, halving',
        ),
        (
            ['--mode=sweep', '--sweep=train.seed=0', '--distributed'],
            'lr_find; sweep does not take it',
        ),
        (
            ['--mode=export', '--out=x.pth', '--format=safetensors'],
            '--out=x.pth: a file of --format=safetensors ends with .safetensors',
        ),
        (
            ['export', '--out=x.bin'],
            'x.bin: no format has this extension; use one of .safetensors, .pth',
        ),
    ],
)
def test_mistakes(main, arguments, message, tmp_path):
    if not any('workdir' in argument for argument in arguments):
        arguments = [*arguments, f'--workdir={tmp_path}/run']
    assert message in one_line_error(*main(*arguments))
    assert not (tmp_path / 'run').exists()


def test_a_config_with_a_defect(main, tmp_path):
    """Its kind and its line are told, where it is no argument that it refuses."""
    config = tmp_path / 'x.py'
    config.write_text('def get_config():\n    return 1 + "a"\n')
    line = one_line_error(*main(f'--config={config}'))
    assert f'--config={config}, line 2: TypeError: unsupported operand' in line


@pytest.mark.parametrize('argument', ['--color=red', '--config.train.epochs=many'])
def test_a_mistake_is_all_that_the_program_says(argument):
    done = launch(argument)
    assert argument.partition('=')[0].strip('-') in one_line_error(
        done.returncode, done.stdout, done.stderr
    )


@pytest.mark.exhaustive
@pytest.mark.slow
def test_sweep(main, tmp_path):
    """A setting that diverges is told of; the page comes from the folder alone."""
    workdir = f'--workdir={tmp_path}/s'
    done = main(
        *('--mode=sweep', *TINY, workdir, '--config.train.epochs=1'),
        '--sweep=optimizer.learning_rate=1e30,3e-3',
        '--sweep=model.block_sizes=(1,)',
    )
    status, out, err = done
    assert (status, err) == (0, '')
    assert 'trial 001 failed: step ' in out
    again = out.partition('train this setting: ')[2].splitlines()[0]
    assert again.startswith(f'python launch.py {TINY[0]}') and '(1,1)' not in again
    assert "'--config.model.block_sizes=(1,)'" in again
    assert f'sweep.html and sweep.csv are in {tmp_path}/s' in out
    with open(tmp_path / 's' / 'sweep.csv', newline='') as file:
        best, worst = csv.DictReader(file)
    assert best['optimizer.learning_rate'] == '3e-3' and best['state'] == 'done'
    run = tmp_path / 's' / best['folder'] / 'seed0'
    records = (run / 'metrics.jsonl').read_text().splitlines()
    accuracy = json.loads(records[0])['test_accuracy']
    assert float(best['mean']) == pytest.approx(accuracy, rel=1e-5)
    config = json.loads((run / 'config.json').read_text())
    assert config['optimizer']['learning_rate'] == 3e-3
    assert config['model']['block_sizes'] == [1]
    assert (worst['state'], worst['mean']) == ('failed', '')
    (tmp_path / 's' / 'sweep.html').unlink()
    done = main('--mode=report', workdir)
    assert done == (0, f'{tmp_path}/s/sweep.html: open it in a browser\n', '')
    assert (tmp_path / 's' / 'sweep.html').exists()


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp('weights') / 'x.safetensors')


def test_predict(main, weights, tmp_path):
    """Files of all kinds to rows, pictures and features; and what Python says."""
    photos = write_images(tmp_path / 'photos', {'a': 3, 'b': 2})
    for odd in ('new\nline.jpg', 'bytes \udcff.jpg'):
        (photos / odd).write_bytes((photos / 'a/000.jpg').read_bytes())
    (photos / 'bad.jpg').write_text('no image')
    model = ['--mode=predict', f'--config.init_from={weights}', f'--workdir={tmp_path}']
    model += ['--config.data.batch_size=4', '--config.data.threads=2']
    files = [f'--files={photos}', f'--files={photos}/*/000.jpg', '--files=none.jpg']
    places = [f'--explain={tmp_path}/pictures', f'--features={tmp_path}/f.npz']
    done = main(*model, *files, '--out', tmp_path / 'x.csv', '--top=2', *places)
    assert done[:2] == (1, '')
    assert done[2].splitlines() == [
        '9 images: 9 class 2',
        '2 of 11 files could not be read; features are of the others only',
        f'predictions: {tmp_path}/x.csv',
        f'heat maps: {tmp_path}/pictures',
        f'features: {tmp_path}/f.npz',
    ]
    with open(tmp_path / 'x.csv', newline='', errors='surrogateescape') as file:
        rows = list(csv.DictReader(file))
    names = [*(f'a/00{n}.jpg' for n in range(3)), 'b/000.jpg', 'b/001.jpg', 'bad.jpg']
    names += ['bytes \udcff.jpg', 'new\nline.jpg', 'a/000.jpg', 'b/000.jpg']
    expected = [f'{photos}/{name}' for name in names]
    assert [row['path'] for row in rows] == [*expected, 'none.jpg']
    bad = [row['path'] for row in rows if row['error']]
    assert bad == [f'{photos}/bad.jpg', 'none.jpg']
    good = [row['path'] for row in rows if not row['error']]
    trained = load_trained(weights, batch_size=4)
    for row, found in zip(
        (row for row in rows if not row['error']), trained.predict(good), strict=True
    ):
        first, second = found.top(2)
        assert (row['class1'], row['class2']) == (first.class_name, second.class_name)
        assert float(row['probability2']) == pytest.approx(second.probability, rel=1e-5)
    found, paths = feature_files.read(f'{tmp_path}/f.npz')
    assert paths == good
    np.testing.assert_array_equal(found, trained.features(good))
    pictures = sorted((tmp_path / 'pictures').glob('*.jpg'))
    assert len(pictures) == 9 and pictures[0].name == '000001_000.jpg'

    # To the screen; pictures of a class, in the folder that is searched.
    place = f'--explain={photos}/a/why'
    alone = '--config.data.batch_size=1'  # pictures are written before all is listed
    done = main(
        *model, alone, f'--files={photos}/**/0*.jpg', place, '--explain_class=class 1'
    )
    assert done[0] == 0
    assert done[2] == f'5 images: 5 class 2\nheat maps: {photos}/a/why\n'
    assert done[1].split()[:3] == ['path', 'class', 'prob.']
    assert len(done[1].splitlines()) == 1 + 5
    assert f'{photos}/b/001.jpg  class 2' in done[1]
    assert len(list((photos / 'a/why').glob('*.jpg'))) == 5
    done = main(*model, f'--files={photos}/b', '--format=jsonl')
    assert [json.loads(line)['path'] for line in done[1].splitlines()] == [
        f'{photos}/b/000.jpg',
        f'{photos}/b/001.jpg',
    ]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'predict needs images: predict MODEL FILES...'),
        (['--files=none/*.jpg'], '--files=none/*.jpg matches no image'),
        (['--files=x', '--config.data.batch_size=0'], 'data.batch_size=0 must be at'),
        (['--files=x', '--config.data.threads=0'], 'data.threads=0 must be at least 1'),
        (
            ['--files=x', '--config.data.image_size=9'],
            'defines how its images are prepared',
        ),
        (['--files=x', '--config.model.fast=0'], '--config.model.fast: predict takes'),
        (['--files=x', '--top=0'], '--top=0 must be at least 1'),
        (['--files=x', '--format=torch'], 'use table, csv, jsonl'),
        (['--files=x', '--features=x.txt'], 'ends with .npz or .safetensors'),
        (['--files=x', '--explain_class=a'], '--explain_class needs --explain=FOLDER'),
        (['--files=x', '--explain_steps=9'], '--explain_steps needs --explain=FOLDER'),
        (['--files=x', '--num_processes=2'], '--num_processes needs --distributed'),
        (['--files', 'a.jpg', 'b.jpg'], "in quotes: --files='photos/*.jpg'"),
        (['--files=x', '--config.init_from=none'], 'init_from=none: there is no such'),
        (
            ['--files=x', '--config.init_from='],
            'holds no checkpoint: there is no such file',
        ),
        (
            ['--files=x', '--explain={}/new', '--explain_class=claas 2'],
            'did you mean class 2? There are class 0, class 1, class 2',
        ),
    ],
)
def test_mistakes_of_predict(main, weights, tmp_path, arguments, message):
    arguments = [argument.format(tmp_path) for argument in arguments]
    start = [
        '--mode=predict',
        f'--config.init_from={weights}',
        f'--workdir={tmp_path}/r',
    ]
    assert message in one_line_error(*main(*start, *arguments))
    assert list(tmp_path.iterdir()) == []


def test_stopped(main, monkeypatch):
    """Ctrl-C is one word and the status that a shell would give it."""

    def interrupt(*_):
        raise KeyboardInterrupt

    summary = dataclasses.replace(commands.COMMANDS['summary'], run=interrupt)
    monkeypatch.setitem(commands.COMMANDS, 'summary', summary)
    assert main('--mode=summary') == (130, '', 'interrupted\n')


@pytest.mark.slow
def test_head(weights, tmp_path):
    """A reader that goes away ends it without a word."""
    photos = write_images(tmp_path, {'a': 1})
    arguments = [f'--config.init_from={weights}', '--files=-']
    assert piped_away('predict', *arguments, names=[photos / 'a/000.jpg']) == (141, b'')


@pytest.mark.slow
def test_head_of_what_is_printed(weights):
    assert piped_away('summary', f'--config.init_from={weights}') == (141, b'')


def piped_away(mode, *arguments, names=()):
    """Exit status and standard error of a run whose output nobody reads."""
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    # Buffered, as it is by default: what is left would be flushed at the very end.
    env = os.environ | {'PYTHONUNBUFFERED': ''}
    command = [sys.executable, str(ROOT / 'launch.py'), f'--mode={mode}', *arguments]
    with subprocess.Popen(command, env=env, **pipes) as running:
        running.stdout.close()
        given = ''.join(f'{name}\n' for name in names).encode()
        _, err = running.communicate(given, timeout=120)
    return running.returncode, err


@pytest.mark.slow
def test_interrupted(weights, tmp_path):
    """What is done is kept beside the output that was not finished."""
    photos = write_images(tmp_path, {'a': 1})
    start = [sys.executable, str(ROOT / 'launch.py'), '--mode=predict', '--files=-']
    start += [f'--config.init_from={weights}', f'--out={tmp_path}/x.csv']
    pipe = subprocess.PIPE
    part = tmp_path / 'x.csv.part'
    with subprocess.Popen(start, stdin=pipe, stderr=pipe) as running:
        running.stdin.write(f'{photos}/a/000.jpg\n'.encode() * 100)
        running.stdin.flush()
        deadline = time.monotonic() + 600
        while not (part.exists() and len(part.read_bytes().splitlines()) > 1):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        err = running.stderr.read().decode()
    assert running.returncode == 130
    assert err.endswith('interrupted\n') and 'Traceback' not in err
    rows = len(part.read_text().splitlines()) - 1
    assert f'x.csv.part has the {rows} rows so far' in err
