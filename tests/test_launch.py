"""The command line as a user meets it."""

import subprocess
import sys

import pytest
from conftest import ROOT, write_images

TINY = [
    '--config.model.variant=BC-L10k4',
    '--config.data.image_size=8',
    '--config.data.batch_size=128',
    '--config.train.epochs=2',
    '--config.model.block_sizes=(1,1)',
    '--config.optimizer.learning_rate=3e-3',
]


def launch(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / 'launch.py'), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )


def one_line_error(done):
    assert done.returncode == 2
    assert done.stdout == ''
    (line,) = done.stderr.splitlines()
    assert line.startswith('error: ')
    return line


def test_train_and_evaluate(tmp_path):
    workdir = f'--workdir={tmp_path}/run'
    # Fields before the file, which ml_collections alone would refuse.
    done = launch(*TINY, '--config=configs/densenet121.py', workdir)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:10] for line in lines if line[:6] == 'Epoch:'] == [
        'Epoch:  1.',
        'Epoch:  2.',
    ]
    best = max(
        (line for line in lines if line.startswith('Epoch')),
        key=lambda line: float(line.split('Test_acc: ')[1].split('%')[0]),
    )
    figures = best.split('Test_acc')[1].split(', Lr')[0]
    done = launch('--mode=eval', workdir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'Test_acc{figures} (360 test images of digits')

    # One file of it evaluates to the same, and starts another run.
    file = f'{tmp_path}/birds.safetensors'
    done = launch('--mode=export', workdir, f'--out={file}')
    assert done.stdout == f'{file}: the model of {tmp_path}/run for safetensors\n'
    start = [f'--config.init_from={file}', f'--workdir={tmp_path}/other']
    done = launch('--mode=eval', *start)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'Test_acc{figures} (360 test images of digits')
    assert done.stdout.endswith(f'weights of {file})\n')
    done = launch('--mode=summary', *start)
    assert 'BC-L10k4 with 10 classes' in done.stdout

    # Other data, with some of the classes: all of it is used.
    photos = write_images(tmp_path / 'photos', {'3': 4, '8': 5})
    done = launch('--mode=eval', workdir, f'--config.data.source=folder:{photos}')
    assert done.returncode == 0, done.stderr
    assert f'(9 images of folder:{photos}, best' in done.stdout
    done = launch('--mode=eval', workdir, '--config.model.growth_rate=3')
    assert 'only data.* fields can be set' in one_line_error(done)


@pytest.mark.parametrize(
    ('arguments', 'size'),
    [
        (['--config=configs/cifar.py:L40k12'], '32x32x3'),
        ([], '32x32x3'),
        (['--config.data.source=folder:photos'], '224x224x3'),
    ],
)
def test_summary(arguments, size):
    done = launch('--mode=summary', *arguments)
    assert done.returncode == 0, done.stderr
    assert size in done.stdout


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            ['--config.optimizer.learning_rat=1'],
            'did you mean optimizer.learning_rate?',
        ),
        (['--config.train.epochs=many'], '--config.train.epochs=many: invalid literal'),
        (['--config.train.epochs=1.5'], '--config.train.epochs=1.5: invalid literal'),
        (['--config.optimizer.learning_rate=fast'], 'could not convert'),
        (['--config=configs/none.py'], '--config=configs/none.py: there is no such'),
        (['--mode=dance'], '--mode=dance is not known; use train, eval'),
        (['--color=red'], "Unknown command line flag 'color'"),
        (['photos'], 'photos is not a flag'),
        (['--config.data.source=folder:/none'], 'there is no such folder'),
        (['--mode=eval', '--workdir=/none'], '--workdir=/none holds no checkpoint'),
        (['--config.init_from=/none.pth'], 'init_from=/none.pth: there is no such'),
        (['--mode=export'], '--mode=export needs --out=FILE'),
        (['--mode=lr_find', '--steps=3'], '--steps=3 are too few; use 40 or more'),
        (
            ['--mode=export', '--out=x.pth'],
            '--out=x.pth: a file of --format=safetensors ends with .safetensors',
        ),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    if not any('workdir' in argument for argument in arguments):
        arguments = [*arguments, f'--workdir={tmp_path}/run']
    assert message in one_line_error(launch(*arguments))
    assert not (tmp_path / 'run').exists()
