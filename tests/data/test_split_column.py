"""Columns of a table that tell the part: words, numbers, one column each, a setting."""

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset, label_options, label_table
from helpers.runs import write_images


def read(tmp_path, heading, rows, **options):
    """A table of images 0.png, ... and these columns."""
    lines = [f'{i}.png,' + ','.join(map(str, row)) for i, row in enumerate(rows)]
    path = tmp_path / 't.csv'
    path.write_text('\n'.join([f'image,{heading}', *lines]))
    return label_table.read(str(path), label_options.Options(**options))


NUMBERS = [(i % 2, i % 3) for i in range(9)]


@pytest.mark.parametrize('name', ['fold', 'Partition', 'set', 'subset', 'dataset'])
@pytest.mark.parametrize(
    ('parts', 'told'), [(2, '0,1'), (3, '0,1,2'), (5, '0+1+2,3,4')]
)
def test_numbers_of_parts_are_no_labels(name, parts, told, tmp_path):
    """They do not say which part is which: a line asks, and nothing learns them."""
    found = read(tmp_path, f'sick,{name}', [(i % 2, i % parts) for i in range(10)])
    assert (found.names, found.ignored, found.parts) == (('sick',), (name,), None)
    setting = f'column:{name}={told}'
    assert any(note.endswith(f'data.split={setting}') for note in found.notes)
    found = read(
        tmp_path, f'sick,{name}', [(i % 2, i % parts) for i in range(10)], split=setting
    )
    assert set(found.parts) == set(range(min(parts, 3)))
    found = read(
        tmp_path, f'sick,{name}', [(i % 2, i % parts) for i in range(10)], split='none'
    )
    assert found.names == ('sick',)
    assert not any('data.split' in note for note in found.notes)


@pytest.mark.parametrize(
    ('name', 'values', 'told'),
    [
        ('data_split', ['TR', 'VA'], 'data.split=column:data_split=TR,VA'),
        ('subset', ['te', 'va', 'tr'], 'data.split=column:subset=tr,va,te'),
        ('Dataset', ['NIH', 'MIMIC', 'Chex'], 'column:Dataset=Chex,MIMIC,NIH'),
        ('fold', list('abcd'), 'column:fold=TRAIN,VAL,TEST'),
    ],
)
def test_words_that_are_not_known(name, values, told, tmp_path):
    rows = [(i % 2, values[i % len(values)]) for i in range(8)]
    found = read(tmp_path, f'sick,{name}', rows)
    assert found.names == ('sick',) and any(told in note for note in found.notes)


def test_words_beside_train_are_asked_for(tmp_path):
    rows = [(i % 2, ('Training', 'Public', 'Private')[i % 3]) for i in range(9)]
    setting = 'column:Usage=Training,Public,Private'
    with pytest.raises(UserError, match='Usage=Public is not known .line 3.; .*='):
        read(tmp_path, 'sick,Usage', rows)
    found = read(tmp_path, 'sick,Usage', rows, split=setting)
    assert found.parts.tolist() == [0, 1, 2] * 3


def test_a_column_of_parts_alone_is_no_label(tmp_path):
    with pytest.raises(UserError, match='as data.label_columns'):
        read(tmp_path, 'set', [(i % 2,) for i in range(6)])
    found = read(tmp_path, 'set', [(i % 2,) for i in range(6)], columns=('set',))
    assert found.names == ('set',)


def test_a_column_called_split_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r'split=0 .* data.split=column:split=0,1,2'):
        read(tmp_path, 'sick,split', NUMBERS)
    assert read(tmp_path, 'sick,split', NUMBERS, split='none').parts is None


@pytest.mark.parametrize(
    ('setting', 'expected'),
    [
        ('column:fold=0,1,2', [0, 1, 2]),
        ('column:fold=2.0,0', [1, 3, 0]),
        ('column:fold=0+1,2', [0, 0, 1]),
        ('column:fold=1,,2', None),
    ],
)
def test_values_that_are_named(setting, expected, tmp_path):
    rows = [(i % 2, f'{i % 3}.0') for i in range(9)]
    if expected is None:
        found = read(tmp_path, 'sick,fold', rows, split=setting)
        assert found.parts.tolist() == [3, 0, 1] * 3
        return
    found = read(tmp_path, 'sick,fold', rows, split=setting)
    assert found.parts.tolist() == expected * 3


def test_a_column_that_is_named(tmp_path):
    rows = [(i % 2, ('train', 'val')[i % 3 == 0], 'train') for i in range(6)]
    found = read(tmp_path, 'sick,a=b,split', rows, split='column:a=b')
    assert found.parts.tolist() == [1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        ('fold', 'data.split=fold is not known; use auto, none, column:NAME'),
        ('column:', 'is not known'),
        ('column:x', 'has no such column; it has image, sick, fold'),
        ('column:fold=0', 'give the values of train and val, or of train'),
        ('column:fold=0,0', '0 is given for two parts'),
        ('column:fold=0,7', 'no cell is 7; the column holds 0, 1, 2'),
        ('column:fold', 'fold=0 is not known'),
    ],
)
def test_settings_that_are_wrong(setting, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, 'sick,fold', NUMBERS, split=setting)


def test_a_column_for_each_part(tmp_path):
    rows = [(i % 2, *np.eye(3, dtype=int)[i % 3]) for i in range(6)]
    found = read(tmp_path, 'sick,train,Valid,test', rows)
    assert (found.names, found.parts.tolist()) == (('sick',), [0, 1, 2] * 2)
    # Vehicles, of which a picture may have several.
    found = read(tmp_path, 'bus,train,test', [(1, 1, 1), (0, 0, 1), (1, 1, 0)])
    assert found.names == ('bus', 'train', 'test') and found.parts is None
    assert any('train is read as a label; if it tells' in n for n in found.notes)


def test_rows_of_one_part(tmp_path):
    found = read(tmp_path, 'sick,split', [(i % 2, 'train') for i in range(4)])
    assert found.parts.tolist() == [0] * 4
    assert any('none of val or test' in note for note in found.notes)
    with pytest.raises(UserError, match='no row of its column split is of train'):
        read(tmp_path, 'sick,split', [(i % 2, ('val', 'test')[i % 2]) for i in (0, 1)])


def test_training_rows_alone_are_split(tmp_path):
    write_images(tmp_path, {'x': 10}, size=(8, 8))
    rows = [
        f'{i:03}.jpg,{i % 2},{"train" if i < 8 else "unlabeled"}' for i in range(10)
    ]
    (tmp_path / 't.csv').write_text('\n'.join(['image,sick,split', *rows]))
    source = dataset.load_source(
        f'folder:{tmp_path}/x', labels=f'{tmp_path}/t.csv', image_size=8
    )
    assert (len(source.train), len(source.test), source.has_test) == (6, 2, False)


@pytest.mark.parametrize('setting', ['auto', 'column:who'])
def test_patients_in_both_parts_are_reported(setting, tmp_path, capsys):
    """The table's own split is taken, with a warning that it divides patients."""
    name = 'patient' if setting == 'auto' else 'who'
    write_images(tmp_path, {'x': 8}, size=(8, 8))
    table = tmp_path / 't.csv'

    def load(is_val):
        rows = [
            f'{i:03}.jpg,{i % 2},p{i // 2},{"val" if is_val(i) else "train"}'
            for i in range(8)
        ]
        table.write_text('\n'.join([f'image,sick,{name},split', *rows]))
        dataset.load_source(
            f'folder:{tmp_path}/x', labels=str(table), image_size=8, groups=setting
        )
        return capsys.readouterr().out

    assert (
        f'warning: grouped by the column {name}, 2 of 4 groups are on both sides '
        f'({tmp_path}/x/001.jpg and {tmp_path}/x/000.jpg are of one group)'
    ) in load(lambda i: i % 4 == 0)
    assert '0 of 4 groups are on both sides' in load(lambda i: i < 4)


def test_patients_without_a_number(tmp_path):
    """Each is one of its own: all blanks as one patient would be a large group."""
    rows = [(i % 2, '' if i % 2 else f'p{i // 4}') for i in range(8)]
    found = read(tmp_path, 'sick,patient_id', rows)
    assert len(set(found.groups.tolist())) == 6
    assert any('4 images have no patient_id (line 3)' in n for n in found.notes)


def test_one_patient_only(tmp_path):
    rows = [(i % 2, 'p') for i in range(8)]
    found = read(tmp_path, 'sick,patient_id', rows)
    assert found.groups is None
    assert any('all images have the same patient_id' in note for note in found.notes)
    with pytest.raises(UserError, match='all images are of one group'):
        read(tmp_path, 'sick,patient_id', rows, groups='column:patient_id')


def test_paths_in_both_parts(tmp_path, capsys):
    """Classes may hold the same folders, if these are patients."""
    for place in ('train/a', 'train/b', 'val/a', 'val/b'):
        folders = {f'patient{i:05}': 2 for i in range(4)}
        write_images(tmp_path / place, folders, size=(8, 8))
    dataset.load_source(f'folder:{tmp_path}', image_size=8, duplicates='ignore')
    assert "patient00000' and the like in their paths, 4 of 4 groups are on both" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ('name', 'values', 'why', 'setting'),
    [
        ('role', ['train', 'test', 'excluded'], "'excluded' is not", 'train,test'),
        ('tvt', ['val', 'trian', 'train', 'test'], "'trian' is not", 'train,val,test'),
        ('mode', ['train', 'test', ''], 'an empty cell is not', 'train,test'),
        ('x', ['train', 'training', 'dev', '?'], "'?' is not", 'train+training,dev'),
        ('cohort', ['train', 'external'], "'external' is not", 'train,external'),
        ('x', ['val', 'test'], 'no cell is of train', 'val,test'),
    ],
)
def test_columns_that_look_like_a_split(name, values, why, setting, tmp_path):
    """They are never passed over in silence, and the setting in the line works."""
    rows = [(i // 4 % 2, values[i % len(values)]) for i in range(12)]
    found = read(tmp_path, f'sick,{name}', rows)
    assert (found.names, found.parts) == (('sick',), None)
    [line] = [note for note in found.notes if 'looks like a split' in note]
    assert line.startswith(f'the column {name} looks like a split, but {why}')
    assert f'at random; data.split=column:{name}={setting} uses it' in line
    found = read(tmp_path, f'sick,{name}', rows, split=f'column:{name}={setting}')
    assert {0, 1} <= set(found.parts)
    assert read(tmp_path, f'sick,{name}', rows, split='none').names == ('sick',)


def test_columns_that_do_not_look_like_a_split(tmp_path):
    rows = [(i % 2, ('train', 'car', 'bus')[i % 3]) for i in range(12)]
    found = read(tmp_path, 'sick,vehicle', rows)
    assert not any('looks like' in note for note in found.notes)
    texts = [
        (i % 2, f'test {i}' if i % 2 else f'a train {chr(97 + i)}')
        for i in (*range(25),)
    ]
    found = read(tmp_path, 'sick,note', texts)
    assert not any('looks like' in note for note in found.notes)


@pytest.mark.parametrize('name', ['cv', 'cv_fold', 'outer_fold', 'Fold 1', 'foldIndex'])
@pytest.mark.parametrize(('parts', 'told'), [(2, '0,1'), (5, '0+1+2,3,4')])
def test_folds_under_other_names(name, parts, told, tmp_path):
    rows = [(i // 2 % 2, i % parts) for i in range(10)]
    found = read(tmp_path, f'sick,{name}', rows)
    assert (found.names, found.parts) == (('sick',), None)
    assert any(f'data.split=column:{name}={told}' in note for note in found.notes)
    scaffold = read(tmp_path, 'sick,scaffold', [(i // 2 % 2, i % 2) for i in range(8)])
    assert scaffold.names == ('sick', 'scaffold')


def test_numbers_that_begin_at_one(tmp_path):
    found = read(tmp_path, 'sick,fold', [(i % 2, i % 3 + 1) for i in range(9)])
    assert any('such as data.split=column:fold=1,2,3' in n for n in found.notes)


def test_rows_that_are_only_measured(tmp_path):
    """Of a model that is evaluated, no row needs to be of train."""
    rows = [(i % 2, 'test') for i in range(4)]
    found = read(tmp_path, 'sick,split', rows, for_training=False)
    assert found.parts.tolist() == [1] * 4
    assert 'by its column split: 4 images of test' in found.notes
    rows = [(i % 2, ('val', 'test')[i // 2 % 2]) for i in range(8)]
    for name in ('split', 'subset'):
        found = read(tmp_path, f'sick,{name}', rows, for_training=False)
        assert found.parts.tolist() == [1, 1, 2, 2] * 2
        assert f'by its column {name}: 4 images of val; 4 of test' in found.notes
    rows = [(i % 2, 'extra') for i in range(4)]
    with pytest.raises(UserError, match='of train, val or test; .* to measure all'):
        read(tmp_path, 'sick,split', rows, for_training=False)


def test_no_row_of_train(tmp_path):
    rows = [(i % 2, ('dev', 'dev', 'test')[i % 3]) for i in range(9)]
    with pytest.raises(UserError, match='use data.split=column:split=dev,test, or set'):
        read(tmp_path, 'sick,split', rows)
    found = read(tmp_path, 'sick,split', rows, split='column:split=dev,test')
    assert found.parts.tolist() == [0, 0, 1] * 3
