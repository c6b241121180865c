"""Which column names the patients, which images are of one, and what is said of it."""

import numpy as np
import pytest

from flax_densenet.data import (
    cells,
    dataset,
    group_columns,
    group_names,
    label_options,
    label_table,
    path_groups,
    subgroup_columns,
)
from helpers.runs import write_images

ROWS = 60


def fives(i):
    return f'n{i // 5}'


def read(tmp_path, options=None, rows=ROWS, **columns):
    """A table of 60 images with a function of the row, or cells, for each column."""
    names = [name.replace('__', ' ') for name in columns]
    lines = [','.join(['image', *names])]
    lines += [
        ','.join([f'{i}.png', *(str(column(i)) for column in columns.values())])
        for i in range(rows)
    ]
    path = tmp_path / 't.csv'
    path.write_text('\n'.join(lines))
    return label_table.read(str(path), label_options.Options(**options or {}))


def sick(i):
    return i // 2 % 2


NOT_PATIENTS = 'not taken for patients; data.groups=column:'


@pytest.mark.parametrize(
    'name', ['person', 'mouse', 'animal', 'group', 'individual', 'case', 'subject']
)
def test_a_label_with_a_name_of_patients_stays_a_label(name, tmp_path):
    columns = {name: lambda i: i % 2, 'dog': lambda i: i // 2 % 2, 'car': sick}
    found = read(tmp_path, **columns)
    assert found.names == (name, 'dog', 'car') and found.groups is None
    assert any(NOT_PATIENTS + name in line for line in found.notes)
    named = read(tmp_path, {'groups': f'column:{name}'}, **columns)
    assert named.names == ('dog', 'car') and len(set(named.groups)) == 2


@pytest.mark.parametrize('name', ['person', 'patient_id', 'mrn'])
def test_a_named_label_is_never_the_group(name, tmp_path):
    found = read(
        tmp_path,
        {'columns': (name, 'dog')},
        **{name: lambda i: i % 2, 'dog': sick},
    )
    assert found.names == (name, 'dog') and found.groups is None


@pytest.mark.parametrize(
    ('name', 'values'),
    [
        ('animal', ('cat', 'dog')),
        ('group', ('control', 'treated')),
        ('animal', [f'species{i}' for i in range(10)]),
    ],
)
def test_the_only_column_is_the_class(name, values, tmp_path):
    found = read(tmp_path, **{name: lambda i: values[i % len(values)]})
    assert found.names == tuple(sorted(values)) and found.groups is None
    assert any(f'the column {name} ' in line for line in found.notes)


@pytest.mark.parametrize(
    ('name', 'values', 'is_group'),
    [
        ('patient_id', ('a', 'b'), True),
        ('mrn', ('7', '8', '9'), True),
        ('mouse', ('m1', 'm2', 'm3'), True),
        ('subject', ('1', '2', '3'), True),
        ('subject', ('Ann', 'Bob', 'Cem', 'Dee', 'Eva'), True),
        ('donor', ('living', 'deceased'), False),
        ('group', ('1', '2', '3'), False),
        ('pt', ('1', '2', '3'), False),
        ('pT', ('T1', 'T1a', 'T1b', 'T2', 'T3', 'T4'), False),
        ('specimen', ('blood', 'tissue'), False),
    ],
)
def test_few_values(name, values, is_group, tmp_path):
    """Names that mean only patients are believed; others need several values."""
    found = read(tmp_path, **{name: lambda i: values[i % len(values)], 'sick': sick})
    assert (found.groups is not None) == is_group
    assert found.names == ('sick',)


@pytest.mark.parametrize(
    'name',
    [
        *('case', 'patient_nr', 'Pat. ID', 'pt_id', 'ptid', 'pt', 'RID', 'patients'),
        *('Patient Nummer', 'Patienten-ID', 'subj', 'subj_id', 'slide_id', 'specimen'),
        *('case_no', 'case_number', 'anon_id', 'empi', 'study_id', 'StudyInstanceUID'),
        *('AccessionNumber', 'hadm_id', 'encounter_id', 'video_id', 'biopsy_id'),
        *('cow_id', 'Patient', 'lesion_id', 'group_id'),
    ],
)
def test_names_of_groups(name, tmp_path):
    found = read(tmp_path, **{name: fives, 'sick': sick})
    assert found.grouped_by == f'the column {name}' and found.names == ('sick',)
    assert len(set(found.groups)) == ROWS // 5


@pytest.mark.parametrize(
    ('columns', 'expected', 'line'),
    [
        ({'group': lambda i: f'g{i % 6}', 'mrn': fives}, 'mrn', 'mrn, not by group;'),
        (
            {'lesion_id': lambda i: f'l{i // 2}', 'mrn': fives},
            'mrn',
            'grouped by the column mrn, not by lesion_id; data.groups=column:NAME',
        ),
        ({'study_id': lambda i: i // 2, 'subject_id': fives}, 'subject_id', 'study_id'),
        ({'lesion_id': lambda i: i // 2, 'study_id': fives}, 'study_id', 'lesion_id'),
        (
            {'patient_id': lambda i: 0, 'subject_id': fives},
            'subject_id',
            'subject_id, not by patient_id (the same in all rows)',
        ),
        (  # a picture's number
            {'pid': lambda i: i, 'subject_id': fives},
            'subject_id',
            'subject_id, not by pid',
        ),
        ({'group': lambda i: 'AB'[i % 2], 'mrn': fives}, 'mrn', NOT_PATIENTS),
    ],
)
def test_of_several_columns_the_patient_is_chosen(columns, expected, line, tmp_path):
    found = read(tmp_path, **columns, sick=sick)
    assert found.grouped_by == f'the column {expected}'
    assert len(set(found.groups)) == ROWS // 5
    assert any(line in note for note in found.notes)


@pytest.mark.parametrize(
    ('one', 'other'), [('P01', 'p01'), ('5', '5.0'), ('P 1', 'P1'), ('7', '7,00')]
)
def test_spellings_of_a_patient_are_merged(one, other):
    """The number stays that of the first spelling, so that splits stay, too."""
    cells_of = [one, 'x', other, 'x']
    groups, (line,) = group_names.number(cells_of, 'the column id', 'id')
    assert groups[0] == groups[2] and len(set(groups)) == 2
    assert groups[0] == cells.hash_names([min(one, other)])[0]
    assert f'are written in several ways, such as {one!r} and {other!r}' in line


@pytest.mark.parametrize(('one', 'other'), [('001', '1'), ('P01', 'P1'), ('5', '5.5')])
def test_spellings_that_may_be_two_patients(one, other):
    groups, lines = group_names.number([one, other, one], 'the column id', 'id')
    assert groups[0] == groups[2] != groups[1]
    assert [f'{one!r} and {other!r}' in line for line in lines] == [True] * (one != '5')


def test_numbers_of_groups_are_as_before():
    names = ['P1', '', 'b', 'P1', 'nan']
    own = ['P1', '\0001', 'b', 'P1', '\0004']
    groups, lines = group_names.number(names, 'the column id', 'id', [2, 3, 4, 5, 6])
    np.testing.assert_array_equal(groups, cells.hash_names(own))
    assert lines == ['2 images have no id (line 3); each counts as a separate group']


HINT = 'so images are split one by one unless their paths do; the column '


@pytest.mark.parametrize(
    ('name', 'cell'),
    [
        ('farmer_id', lambda i: i // 5),
        ('FarmNo', lambda i: i // 5),
        ('owner', fives),
        ('Farm Nr', fives),
    ],
)
def test_a_column_that_may_name_patients_is_pointed_out(name, cell, tmp_path):
    columns = {name: cell, 'sick': sick}
    found = read(tmp_path, **columns)
    (line,) = (note for note in found.notes if HINT in note)
    value = f"'column:{name}'" if ' ' in name else f'column:{name}'
    assert f'{name} has 12 values in 60 rows: data.groups={value} keeps' in line
    assert read(tmp_path, {'groups': f'column:{name}'}, **columns).groups is not None
    parts = {'split': lambda i: ('train', 'test')[i % 5 == 0]}
    for options, more in (
        ({'groups': 'none'}, {}),
        ({'for_training': False}, {}),
        ({}, parts),
        ({}, {'patient': fives}),
    ):
        notes = read(tmp_path, options, **columns, **more).notes
        assert not any(HINT in note for note in notes)


@pytest.mark.parametrize(
    ('name', 'cell'),
    [
        ('age', lambda i: 30 + i // 3),
        ('sex', lambda i: 'MF'[i % 2]),
        ('site', fives),
        ('site_id', fives),
        ('view', fives),
        ('label_id', lambda i: i % 12),
        ('date', lambda i: f'2020-01-{i // 5 + 1:02}'),
        ('seen', lambda i: f'2020-01-{i // 5 + 1:02}'),
        ('dose', lambda i: i // 5),
        ('score', lambda i: i // 5 / 10),
        ('fluid', lambda i: f'{i // 5}.5'),
        ('remark', lambda i: f'text {i // 5}'),
        ('serial_no', lambda i: i),
        ('shade', lambda i: 'abc'[i % 3]),
    ],
)
def test_other_columns_are_not_pointed_out(name, cell, tmp_path):
    found = read(tmp_path, **{name: cell, 'sick': sick})
    assert not any(HINT in note for note in found.notes)


def paths(*, named, alone):
    named = [f'B/person{i // 3}_{i}.png' for i in range(named)]
    return named + [f'A/IM-{i:04}.png' for i in range(alone)]


@pytest.mark.parametrize(
    ('named', 'alone', 'groups', 'count'),
    [
        (60, 60, 'auto', 80),
        (21, 900, 'auto', 907),
        (12, 4, 'auto', 8),  # more than half of them
        (12, 400, 'auto', None),
        (12, 400, 'path', 404),
        (60, 60, 'none', None),
        (1, 60, 'auto', None),
    ],
)
def test_some_paths_name_an_owner(named, alone, groups, count, capsys):
    below = paths(named=named, alone=alone)
    found, origin = path_groups.find(below, groups, 'x')
    out = capsys.readouterr().out
    if count is None:
        assert found is None and not origin
        is_said = groups == 'auto' and named > 3
        assert ("12 of 412 paths name an owner such as 'person0'" in out) == is_said
        return
    assert origin == "'person0' and the like in their paths"
    assert len(set(found)) == count and found[0] == found[1] == found[2] != found[3]
    assert f"{alone} images have no owner such as 'person0' in their paths" in out


@pytest.mark.parametrize('above', ['', 'train', 'data/train'])
def test_how_to_keep_subfolders_together(above, tmp_path, capsys):
    for number in range(8):
        patient = f'{100 + number // 2 + number % 2}'  # 101 to 103 are in both classes
        folder = tmp_path / 'x' / above / 'ab'[number % 2]
        write_images(folder, {patient: 3}, size=(8, 8))
    fields = {'image_size': 8, 'duplicates': 'ignore'}
    source = f'folder:{tmp_path / "x"}'
    assert dataset.load_source(source, **fields).train.groups is None
    out = capsys.readouterr().out
    assert 'belong to these classes, and are split one by one; data.groups=' in out
    setting = out.split("one by one; data.groups='")[1].split("' keeps those of a")[0]
    found = dataset.load_source(source, groups=setting, **fields)
    groups = [set(part.groups) for part in (found.train, found.test)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 5
    assert 'one by one' not in capsys.readouterr().out
    dataset.load_source(source, groups='none', **fields)
    assert 'one by one' not in capsys.readouterr().out


def test_subfolders_that_do_not_divide_the_images():
    for below in (
        ['a/images/1.png', 'b/images/2.png'],
        ['a/1.png', 'a/x/1.png', 'b/y/z/1.png'],
    ):
        assert not path_groups.describe_subfolders(below, '.')


def test_kinds_of_studies_may_be_subgroups():
    columns = {'study': ['a', 'b'] * 6, 'case': ['a', 'b'] * 6, 'mrn': ['1', '2'] * 6}
    found, _ = subgroup_columns.find(columns, 'auto')
    assert set(found) == {'study', 'case'}
    assert group_columns.group_of(columns) == 'mrn'
