"""Arguments in all the forms that people type them."""

import pytest

from flax_densenet.cli import command_line, commands
from flax_densenet.errors import UserError
from helpers.paths import ROOT
from helpers.runs import write_images


def parse(*arguments):
    return command_line.parse(['launch.py', *map(str, arguments)], commands.COMMANDS)


def test_train_is_the_default():
    for arguments in ([], ['train'], ['--mode=train'], ['train', '--mode', 'train']):
        found = parse(*arguments, '--config=configs/densenet121.py')
        assert found.command.name == 'train'
        assert found.config.model.variant == 'densenet121'
        assert found.workdir == 'ckpt/densenet121' and found.overrides == {}
    assert parse().workdir == 'ckpt/base'


@pytest.mark.parametrize(
    'recipe',
    [
        ['--config=configs/cifar.py:40_12'],
        ['--config', 'configs/cifar.py:40_12'],
        ['-config=cifar:40_12'],
        ['--config', 'cifar:40_12'],
    ],
)
def test_forms_of_flags(recipe):
    """With overrides before and after it, a space or an equals sign."""
    before = ['--config.train.epochs', '3', '--noconfig.train.report']
    after = ['-config.optimizer.learning_rate=1e-2', '--config.train.tensorboard']
    after += ['False', '--config.model.block_sizes', '(1,2)', '--workdir', 'w']
    found = parse(*before, *recipe, *after)
    assert found.config.model.variant == 'L40k12'
    assert found.config.train.epochs == 3
    assert found.config.optimizer.learning_rate == 1e-2
    assert not (found.config.train.report or found.config.train.tensorboard)
    assert found.fields['model']['block_sizes'] == (1, 2)
    assert found.workdir == 'w' and len(found.overrides) == 5
    assert parse('--config.train.deterministic').config.train.deterministic


def test_flags_of_a_file(tmp_path):
    (tmp_path / 'flags').write_text('--config=cifar\n--config.train.epochs=2\n')
    found = parse('lr_find', f'--flagfile={tmp_path}/flags', '--steps', '50')
    assert (found.config.train.epochs, found.flags.steps) == (2, 50)
    with pytest.raises(UserError, match='none'):
        parse('--flagfile=/none')


def test_flags_keep_their_types():
    found = parse('sweep', '--sweep=a=1', '--sweep=b=2', '--noretry_failed')
    assert (found.flags.sweep, found.flags.retry_failed) == (['a=1', 'b=2'], False)
    found = parse('train', '--distributed', '--coordinator=h:1', '--process_id=0')
    assert found.flags.coordinator_address == 'h:1' and found.flags.distributed
    assert parse('serve').flags.max_megabytes == 20.0


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['train', 'PHOTOS'], {'data.source': 'folder:PHOTOS'}),
        (['lr_find', 'tfds:mnist'], {'data.source': 'tfds:mnist'}),
        (['sweep', 'PHOTOS/'], {'data.source': 'folder:PHOTOS/'}),
        (['train', 'a.tar'], {'data.source': 'tar:a.tar'}),
        (['train', 'PACKED'], {'data.source': 'packed:PACKED'}),
        (['eval', 'run'], {'workdir': 'run'}),
        (['eval', 'run', 'PHOTOS'], {'workdir': 'run', 'data.source': 'folder:PHOTOS'}),
        (['eval', 'FILE'], {'workdir': 'ckpt/x-eval', 'init_from': 'FILE'}),
        (['report', 'a', 'b'], {'workdir': ['a', 'b']}),
        (['predict', 'run', 'x', 'y/*'], {'workdir': 'run', 'files': ['x', 'y/*']}),
        (['predict', 'FILE', '-'], {'workdir': 'FILE', 'files': ['-']}),
        (['predict', 'run', '--top=1', '--', '-x'], {'files': ['-x'], 'top': 1}),
        (['export', 'run', 'x.onnx'], {'workdir': 'run', 'out': 'x.onnx'}),
        (['serve', 'run'], {'workdir': 'run', 'port': 8000}),
        (['pack', 'PHOTOS', 'o'], {'data.source': 'folder:PHOTOS', 'out': 'o'}),
        (['summary', 'BC-L10k4'], {'model.variant': 'BC-L10k4'}),
        (['summary', 'FILE'], {'init_from': 'FILE'}),
    ],
)
def test_arguments_without_names(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'PHOTOS', {'a': 1})
    (tmp_path / 'FILE').touch()
    (tmp_path / 'FILE').rename(tmp_path / 'x.pth')
    (tmp_path / 'PACKED').mkdir()
    (tmp_path / 'PACKED' / 'pack.json').touch()
    arguments = [a.replace('FILE', 'x.pth') for a in arguments]
    found = parse(*arguments)
    for name, value in expected.items():
        if isinstance(value, str):
            value = value.replace('FILE', 'x.pth')
        if name in found.flags:
            assert getattr(found.flags, name) == value
        else:
            assert found.overrides[name] == value
    if arguments[0] in ('train', 'lr_find', 'sweep'):
        assert found.config.model.variant == 'densenet121'
        assert parse(*arguments, '--config=small').recipe.text == 'small'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['evla'], 'evla is not a command; did you mean eval? The commands are'),
        (['--mode=evla'], '--mode=evla is not known; did you mean eval?'),
        (['eval', '--mode=train'], 'both eval and --mode=train; give one'),
        (['/tmp'], 'the command comes first, as in `train /tmp`'),
        (['--workdr=x'], 'not a flag of train; did you mean --workdir?'),
        (['sweep', '--retry-failed'], 'did you mean --retry_failed?'),
        (['--learning_rate=1'], 'did you mean --config.optimizer.learning_rate?'),
        (['train', 'digits', '--lr=1'], 'mean --config.optimizer.learning_rate?'),
        (['--data.source=x'], 'did you mean --config.data.source?'),
        (['--config.train.learning_rate=1'], 'did you mean optimizer.learning_rate?'),
        (['--config.trian.epochs=1'], 'did you mean train.epochs?'),
        (['--config.model'], '--config.model is not a field; the fields are model.b'),
        (['--config.=1'], '--config. is not a field; '),
        (['eval', '--top=3'], '--top is a flag of predict; eval does not take it'),
        (['--port=1'], '--port is a flag of serve; train does not take it'),
        (['export', '--format=onnx', '--noretry_failed'], 'flag of sweep; export does'),
        (['settings', '--config=cifar'], '--config: settings has no settings'),
        (['--workdir'], '--workdir needs a value: --workdir=VALUE'),
        (['--config.train.epochs'], '--config.train.epochs needs a value'),
        (['train', '/none'], '/none: there is no such folder; name a folder of images'),
        (['train', 'digits', 'x'], 'x: too many arguments; the arguments are PHOTOS'),
        (['export', 'a', 'b', 'c'], 'c: too many arguments; the arguments are MODEL'),
        (['eval', 'a', '--workdir=b'], 'a and --workdir mean the same; give one'),
        (
            ['predict', 'a', 'b', '--config.init_from=c'],
            'a and --config.init_from mean the same; give one',
        ),
        (['predict', 'a', 'b', '--files=c'], 'b and --files mean the same; give one'),
        (
            ['train', 'digits', '--config.data.source=digits'],
            'digits and --config.data.source mean the same; give one',
        ),
        (
            ['train', 'digits', '--pretrained', '--config.model.variant=L40k12'],
            '--pretrained: there are no published weights of L40k12, only of ',
        ),
        (['--config=cifr'], 'there is no such recipe; did you mean cifar? The recipes'),
    ],
)
def test_mistakes_name_what_was_meant(arguments, message):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert message in str(caught.value)


def test_recipes_from_another_folder(tmp_path, monkeypatch):
    """One's own comes first; `from configs import` finds ours, and those beside it."""
    monkeypatch.chdir(tmp_path)
    assert parse('--config=configs/small.py:p').config.data.source == 'folder:p'
    assert parse('--config=small.py:p').config.data.source == 'folder:p'
    assert parse(f'--config={ROOT}/configs/small.py').workdir == 'ckpt/small'
    mine = tmp_path / 'configs'
    mine.mkdir()
    (mine / 'shared_mine.py').write_text('epochs = 7\n')
    lines = ['from configs import base, shared_mine', 'def get_config():']
    lines += ['    config = base.get_config()', '    config.train.patience = 5']
    lines += ['    config.train.epochs = shared_mine.epochs', '    return config']
    (mine / 'small.py').write_text('\n'.join(lines))
    found = parse('--config=configs/small.py')
    assert (found.config.train.epochs, found.config.train.patience) == (7, 5)
    assert parse('--config=small').config.train.patience == 0
