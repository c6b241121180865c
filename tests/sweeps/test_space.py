"""What the flags of a sweep mean."""

import pytest

from flax_densenet.errors import UserError
from flax_densenet.sweeps import record, space


def test_values():
    found = space.parse(
        [
            'model.block_sizes=(6,6), (6,12,24)',
            "data.labels='a,b',c,''",
            'optimizer.name=sgd optimizer.momentum=0.9; optimizer.name=adam',
            'train.seed=3,4',
        ]
    )
    assert found.seeds == ('3', '4')
    sizes, labels, sets = (axis.options for axis in found.axes)
    assert [row['model.block_sizes'] for row in sizes] == ['(6,6)', '(6,12,24)']
    assert [row['data.labels'] for row in labels] == ['a,b', 'c', '']
    assert sets == (
        {'optimizer.name': 'sgd', 'optimizer.momentum': '0.9'},
        {'optimizer.name': 'adam'},
    )
    assert len(list(found.grid())) == 2 * 3 * 2
    assert found.fields[-2:] == ('optimizer.name', 'optimizer.momentum')


def test_sets_of_a_file(tmp_path):
    file = tmp_path / 'sets.txt'
    file.write_text("# two\na.x=1  a.y='1, 2'\n\na.x=2\n")
    (axis,) = space.parse([f'@{file}']).axes
    assert axis.options == ({'a.x': '1', 'a.y': '1, 2'}, {'a.x': '2'})


@pytest.mark.parametrize(
    ('text', 'log'),
    [
        ('1e-4..1e-1', True),
        ('0.1..0.5:linear', False),
        ('0..0.5', False),
        ('1..64', False),
        ('1..64:log', True),
        ('-2..2', False),
    ],
)
def test_ranges(text, log):
    (axis,) = space.parse([f'a.x={text}']).axes
    assert isinstance(axis, space.Range) and axis.log == log
    assert [axis.low, axis.high] == text.partition(':')[0].split('..')


def test_paths_are_no_ranges():
    (axis,) = space.parse(['data.source=folder:../photos']).axes
    assert axis.options == ({'data.source': 'folder:../photos'},)


def test_former_names_of_fields(caplog):
    flags = ['data.colour_jitter=0,0.4', 'train.epochs=1 data.colour_jitter=0.2; a=1']
    axes = space.parse(flags[:1]).axes + space.parse(flags[1:]).axes
    assert [axis.fields for axis in axes] == [
        ('data.color_jitter',),
        ('train.epochs', 'data.color_jitter', 'a'),
    ]
    assert 'data.colour_jitter is now called data.color_jitter' in caplog.text


def test_records_with_former_names(tmp_path):
    definition = {'axes': [{'fields': ['data.colour_jitter']}]}
    values = {'data.colour_jitter': '0.4'}
    setting = {'fields': values, 'values': values, 'number': 0}
    saved = record.SweepRecord(definition, [], settings=[setting])
    saved.save(str(tmp_path))
    read = record.load(str(tmp_path))
    assert read.fields == ['data.color_jitter']
    assert read.settings[0].fields == {'data.color_jitter': '0.4'}


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ([], 'needs --sweep=FIELD=VALUE,VALUE'),
        (['a'], '--sweep=a needs the form'),
        (['a=1,,2'], 'a value is empty'),
        (['a='], 'a value is empty'),
        (['a=1,2,1'], 'a=1 comes twice'),
        (['a=1', 'a=2'], 'a is already in another --sweep'),
        (['a=1 b=2; a=1,3'], 'needs the form FIELD=VALUE with one value'),
        (['a=2..1'], 'from a lower to a higher number'),
        (['a=1..inf'], 'from a lower to a higher number'),
        (['a=1..2:cubic'], 'use 1..2:log or 1..2:linear'),
        (['a=0..1:log'], 'starts above 0'),
        (['@none'], 'the file cannot be read'),
        (['train.seed=0..3'], 'seeds are a list'),
        (['train.seed=0 a=1; train.seed=1'], 'a flag of its own'),
        (['train.deterministic=True,False'], 'applies to the whole process'),
    ],
)
def test_what_cannot_be_read(flags, message):
    with pytest.raises(UserError, match=None) as error:
        space.parse(flags)
    assert message in str(error.value)
