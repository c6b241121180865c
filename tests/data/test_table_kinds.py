"""Tables as people have them: classes, missing values, parts, patients, odd cells."""

import numpy as np
import pytest

from flax_densenet import UserError, settings
from flax_densenet.data import dataset, label_options, label_table, soft_labels
from helpers.runs import write_images

NAN = np.nan


def read(tmp_path, text, **options):
    path = tmp_path / 't.csv'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return label_table.read(str(path), label_options.Options(**options))


def column(cells, name='a', other=True):
    """A table of images, of these cells, and of a plain label."""
    rows = [f'{i}.png,{c}' + f',{i % 2}' * other for i, c in enumerate(cells)]
    return '\n'.join([f'image,{name}' + ',b' * other, *rows])


@pytest.mark.parametrize(
    'missing', ['', 'NA', 'N/A', 'nan', 'NULL', 'None', '#N/A', '?', '-', 'unknown']
)
def test_missing_values(missing, tmp_path):
    found = read(tmp_path, column(['1', '0', missing, '1.0', '0.00']))
    assert found.names == ('a', 'b')
    np.testing.assert_array_equal(found.values[:, 0], [1, 0, NAN, 1, 0])
    assert any('a 2/2/1, b 2/3/0' in line for line in found.notes)
    assert any('1 empty cells are read as unknown' in line for line in found.notes)
    found = (
        read(tmp_path, column(['1', '0', missing, '1', '0']), blank_labels='x')
        if (False)
        else read(tmp_path, column(['1', '0', missing, '1', '0']), blank='negative')
    )
    assert found.values[:, 0].tolist() == [1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ('yes', 'no'),
    [
        *(('TRUE', 'FALSE'), ('True', 'false'), ('yes', 'No'), ('Y', 'N'), ('t', 'f')),
        *(('1.0', '0.0'), ('"1,0"', '"0,0"'), ('positive', 'negative'), ('+1', '0')),
    ],
)
def test_words_for_yes_and_no(yes, no, tmp_path):
    found = read(tmp_path, column([yes, no, no, yes]))
    assert found.names == ('a', 'b')
    assert found.values[:, 0].tolist() == [1, 0, 0, 1]


def test_what_is_no_label(tmp_path):
    for cells in (['F'] * 4, ['NA'] * 4, ['3', '0', '1', '2'], ['M', 'F', 'F', 'M']):
        found = read(tmp_path, column(cells, name='other'))
        assert (found.names, found.ignored) == (('b',), ('other',))


def test_minus_one(tmp_path):
    text = column(['1', '-1', '0', '-1.0'])
    for meaning, value in (('unknown', NAN), ('negative', 0), ('positive', 1)):
        found = read(tmp_path, text, uncertain=meaning)
        np.testing.assert_array_equal(found.values[:, 0], [1, value, 0, value])
        assert any(f'2 cells of -1 are read as {meaning}' in n for n in found.notes)


def test_soft_targets(tmp_path):
    """Each its own within the span, the same whichever other rows there are."""
    text = column(['1', '-1', '0', '-1', ''])
    found = read(tmp_path, text, uncertain='soft')
    soft = found.values[[1, 3], 0]
    assert (soft > 0.55).all() and (soft < 0.85).all() and soft[0] != soft[1]
    assert 'positive/negative/unknown/soft: a 1/1/1/2, b ' in ' '.join(found.notes)
    assert any(
        '2 cells of -1 are read as soft (0.55 to 0.85)' in n for n in found.notes
    )
    lines = text.splitlines()
    again = read(
        tmp_path, '\n'.join([lines[0], lines[4], *lines[1:4]]), uncertain='soft'
    )
    assert again.values[0, 0] == soft[1]
    fixed = read(tmp_path, text, uncertain='soft', soft=(0.3, 0.3))
    np.testing.assert_allclose(fixed.values[:, 0], [1, 0.3, 0, 0.3, NAN], rtol=1e-6)
    many = [soft_labels.draw(f'{n}.png', 'a', (0.2, 0.6)) for n in range(2000)]
    assert np.histogram(many, 4, (0.2, 0.6))[0].min() > 420
    for span in ((0, 0.5), (0.5, 1), (0.6, 0.5), (0.5,), ('a', 0.5)):
        with pytest.raises(UserError, match=r'data.soft_labels=.* must be two numbers'):
            read(tmp_path, text, soft=span)
    with pytest.raises(UserError, match='blank_labels=soft is not known; use unknown'):
        read(tmp_path, text, blank='soft')


def test_ignore_is_a_word_for_unknown(tmp_path):
    text = column(['1', '-1', '0', ''])
    found = read(tmp_path, text, uncertain='ignore', blank='ignore')
    np.testing.assert_array_equal(found.values[:, 0], [1, NAN, 0, NAN])
    given = {'blank_labels': 'ignore', 'uncertain_labels': 'ignore'}
    data = settings.from_config({'data': given}).data
    assert (data.blank_labels, data.uncertain_labels) == ('unknown', 'unknown')
    for name in ('blank', 'uncertain'):
        with pytest.raises(UserError, match=f'did you mean data.{name}_labels?'):
            settings.from_config({'data': {name: 'ignore'}})


def test_odd_cells_are_named(tmp_path):
    with pytest.raises(UserError, match="line 9, column a: 'x2' is neither yes nor no"):
        read(tmp_path, column(['0', '1'] * 3 + ['1', 'x2', '0', '0']))
    found = read(
        tmp_path, column(['0', '1'] * 3 + ['1', 'x2', '0', '0']), columns=('b',)
    )
    assert (found.names, found.ignored) == (('b',), ('a',))
    with pytest.raises(UserError, match='line 2, column a: .5. is neither'):
        read(tmp_path, column(['5', '1']), columns=('a', 'b'))
    with pytest.raises(UserError, match='has no column c; it has image, a, b'):
        read(tmp_path, column(['1', '1']), columns=('c',))


@pytest.mark.parametrize(
    'name', ['label', 'Class', 'class_name', 'diagnosis', 'dx', 'z']
)
def test_one_class_an_image(name, tmp_path):
    found = read(tmp_path, column(['dog', 'cat', 'cat', 'dog'], name, other=False))
    assert found.names == ('cat', 'dog') and found.values.tolist() == [1, 0, 0, 1]
    assert f'the column {name} is read as the class' in found.notes[-1]
    assert 'cat 2, dog 2' in found.notes[-1]


def test_numbers_as_classes(tmp_path):
    cells = ['10', '2.0', '2', '10', '0', '0']
    found = read(tmp_path, column(cells, 'grade', other=False))
    assert found.names == ('0', '2', '10') and found.values.tolist() == [
        2,
        1,
        1,
        2,
        0,
        0,
    ]


def test_zero_and_one(tmp_path):
    """One yes/no label, as ever, with a line; two classes where that is said."""
    text = column(['1', '0', '0', '1'], 'label', other=False)
    found = read(tmp_path, text)
    assert found.values.tolist() == [[1], [0], [0], [1]]
    assert 'label is read as one yes/no label (a sigmoid)' in found.notes[-1]
    found = read(tmp_path, text, kind='classes')
    assert found.names == ('0', '1') and found.values.tolist() == [1, 0, 0, 1]


def test_one_of_several_columns(tmp_path):
    text = 'image,mel,nv,bcc\na.jpg,1,0,0\nb.jpg,0,0,1\nc.jpg,0,1,0\n'
    found = read(tmp_path, text)
    assert found.values.shape == (3, 3)
    assert 'each image has exactly one of the labels' in found.notes[-1]
    found = read(tmp_path, text, kind='classes')
    assert found.names == ('mel', 'nv', 'bcc') and found.values.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (
            column(['cat', 'Cat', 'dog', 'dog', 'cat'], 'label', False),
            'only in case or',
        ),
        (
            column(['cat', '', 'dog', 'dog', 'cat'], 'label', False),
            "line 3.*'' is not a cl",
        ),
        (
            column(['cat', 'NA', 'dog', 'dog'], 'label', False),
            "line 3, column label: 'NA'",
        ),
        (column(list('qwertz'), 'label', False), 'has 6 different values for 6 images'),
        (
            column(['1.5', '2', '2', '1.5'], 'label', False),
            'numbers such as 1.5, which are no',
        ),
        (
            column(['cat', 'dog', 'cat'], 'label'),
            'label holds classes and b yes and no',
        ),
        ('image,p,q\na,x,y\nb,z,y\nc,x,w\n', 'none called label or class the classes'),
        ('image,label,species\na,x,y\nb,z,y\nc,x,y\nd,z,w\n', None),
    ],
)
def test_classes_that_are_unclear(text, message, tmp_path):
    if message is None:
        assert read(tmp_path, text).names == ('x', 'z')
        return
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)
    with pytest.raises(UserError, match='data.label_kind=x is not known'):
        read(tmp_path, text, kind='x')


def test_lists_with_blanks(tmp_path):
    for name in ('Finding Labels', 'labels', 'tags'):
        text = (
            f'image,{name}\na,Effusion | Mass\nb,Mass|Effusion \nc, no finding\nd,Mass'
        )
        found = read(tmp_path, text)
        assert found.names == ('Effusion', 'Mass')
        assert found.values.tolist() == [[1, 1], [1, 1], [0, 0], [0, 1]]


@pytest.mark.parametrize(
    'text',
    [
        'image;a;b\nx.png;1;0\ny.png;0;1\n',
        'image\ta\tb\nx.png\t1\t0\ny.png\t0\t1\n',
        'image a b\nx.png 1 0\ny.png 0 1\n',
        'image|a|b\nx.png|1|0\ny.png|0|1\n',
        '\ufeffimage;a;b\r\nx.png;"1,0";0\r\ny.png;"0,0";1\r\n',
        'image,a,b\nx.png,1,0\ny.png,0,1\n'.encode('utf-16'),
        'image\ta\tb\nx.png\t1\t0\ny.png\t0\t1\n'.encode('utf-16'),
        ',image,a,b\n0,x.png,1,0\n1,y.png,0,1\n',
        'Unnamed: 0,image,a,b\n0,x.png,1,0\n1,y.png,0,1\n',
        'index,a,Image Name,b\n,1,x.png,0\n,0,y.png,1\n',
    ],
)
def test_ways_to_write_a_table(text, tmp_path):
    found = read(tmp_path, text)
    assert (found.images, found.names[-2:]) == (['x.png', 'y.png'], ('a', 'b'))
    assert found.values[:, -2:].tolist() == [[1, 0], [0, 1]]


def test_no_heading(tmp_path):
    found = read(tmp_path, 'x.png,1,0\ny.png,0,1\nz.png,0,1\n')
    assert found.images == ['x.png', 'y.png', 'z.png']
    assert found.names == ('column 2', 'column 3')
    assert 'its first line is not a heading' in found.notes[0]
    found = read(tmp_path, 'x/1.jpg cat\ny/2.jpg dog\nx/3.jpg cat\ny/4.jpg dog\n')
    assert (found.names, found.values.tolist()) == (('cat', 'dog'), [0, 1, 0, 1])


@pytest.mark.parametrize(
    'name', ['split', 'Fold', 'set', 'subset', 'dataset', 'partition', 'phase', 'which']
)
@pytest.mark.parametrize(
    'words', [('train', 'val'), ('TRAIN', 'Validate'), ('training', 'test')]
)
def test_columns_of_parts(name, words, tmp_path):
    found = read(tmp_path, column([words[i % 3 == 0] for i in range(6)], name))
    assert found.parts.tolist() == [1, 0, 0, 1, 0, 0]
    assert any(f'by its column {name}: 4 images to train' in n for n in found.notes)


def test_three_parts_in_a_column(tmp_path):
    found = read(
        tmp_path, column(['train', 'train', 'val', 'test', 'unlabeled'], 'fold')
    )
    assert found.parts.tolist() == [0, 0, 1, 2, 3]
    assert '1 of val, which chooses the best epoch; 1 of test, which is measured' in (
        ' '.join(found.notes)
    )
    found = read(tmp_path, column(['0', '1', '0', '1'], 'is_valid'))
    assert (found.parts.tolist(), found.names) == ([0, 1, 0, 1], ('b',))
    found = read(tmp_path, column(['0', '1', '2', '3'], 'fold'))
    assert found.parts is None and found.ignored == ('fold',)
    with pytest.raises(UserError, match=r'fold=other is not known \(line 4\)'):
        read(tmp_path, column(['train', 'test', 'other'], 'fold'))


@pytest.mark.parametrize(
    'name',
    ['Patient ID', 'patient_id', 'subject_id', 'SubjectID', 'lesion_id', 'participant'],
)
def test_columns_of_patients(name, tmp_path):
    found = read(tmp_path, column(['p1', 'p2', 'p1', 'p3'], name))
    assert found.groups[0] == found.groups[2] and len(set(found.groups)) == 3
    assert found.grouped_by == f'the column {name}'
    assert read(tmp_path, column(['p1', 'p2'], name), groups='none').groups is None


def test_a_group_that_is_named(tmp_path):
    found = read(tmp_path, column(['s', 't', 's'], 'site'), groups='column:site')
    assert found.groups[0] == found.groups[2] != found.groups[1]
    for groups, message in (
        ('column:x', 'the table has no such column'),
        ('x', 'data.groups=x is not known'),
        ('path:(', 'data.groups=path:'),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path, column(['s'], 'site'), groups=groups)


def load(tmp_path, rows, heading='image,a', root='x', **fields):
    table = tmp_path / 't.csv'
    table.write_text('\n'.join([heading, *rows]))
    fields = {'labels': str(table), 'image_size': 8, **fields}
    return dataset.load_source(f'folder:{tmp_path / root}', **fields)


def names_of(source):
    parts = (source.train, source.test)
    return {
        part.name(i)[-7:]: int(part.labels[i][0])
        for part in parts
        for i in range(len(part))
    }


@pytest.mark.parametrize(
    'style',
    [
        '{i:03}',
        'set/x/{i:03}.jpg',
        'x/{i:03}',
        '/home/me/data/x/{i:03}.jpg',
        'C:\\data\\x\\{i:03}.jpg',
        './{i:03}.jpg',
        '{i:03}.JPG',
        '{i}',
    ],
)
def test_names_that_are_not_quite_those_of_the_files(style, tmp_path, capsys):
    write_images(tmp_path, {'x': 9}, size=(8, 8))
    source = load(tmp_path, [f'{style.format(i=i)},{i % 2}' for i in range(9)])
    assert names_of(source) == {f'{i:03}.jpg': i % 2 for i in range(9)}
    said = 'its names differ from the files' in capsys.readouterr().out
    assert said == (style != './{i:03}.jpg')


def test_a_root_above_the_folders_of_the_table(tmp_path):
    write_images(tmp_path / 'x' / 'set', {'u': 6, 'v': 6}, size=(8, 8))
    rows = [f'{k}/{i:03}.jpg,{i % 2}' for k in 'uv' for i in range(6)]
    assert len(load(tmp_path, rows).train) > 0
    with pytest.raises(UserError, match='12 of its 12 images are not in'):
        load(tmp_path, [row.replace('u/', 'w/').replace('v/', 'z/') for row in rows])
    with pytest.raises(UserError, match='in several folders'):
        load(tmp_path, ['000.jpg,1', '001.jpg,0'])
    with pytest.raises(UserError, match='in several folders'):
        load(tmp_path, ['000,1', '001,0'])


@pytest.mark.parametrize(
    'of', ['patient{:05}/s1/{}.png', 'sub-{:02}/{}.png', 'p{:08}_{}.png']
)
def test_patients_in_paths(of, tmp_path, capsys):
    write_images(tmp_path, {'y': 1}, size=(8, 8))
    content = (tmp_path / 'y' / '000.jpg').read_bytes()
    names = [of.format(p, v) for p in range(10) for v in range(4)]
    for name in names:
        path = tmp_path / 'x' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + name.encode())
    rows = [f'{name},{i % 2}' for i, name in enumerate(names)]
    source = load(tmp_path, rows)
    assert '0 of 10 groups are on both sides; data.groups=none splits image by' in (
        capsys.readouterr().out
    )
    owner = of.split('/')[0].split('_')[0]
    tested = [source.test.name(i).split('/x/')[1] for i in range(len(source.test))]
    for p in range(10):
        assert sum(n.startswith(owner.format(p)) for n in tested) in (0, 4)
    source = load(tmp_path, rows, groups='none')
    assert 'groups' not in capsys.readouterr().out


def test_patients_in_the_paths_of_classes(tmp_path, capsys):
    """Images of one person are on one side, unless it is not wanted."""
    for number in range(24):
        folder = tmp_path / 'x' / 'ab'[number % 2]
        write_images(folder.parent, {folder.name: 0}, size=(8, 8))
        write_images(tmp_path / 'y', {'a': number + 1}, size=(8, 8))
        path = folder / f'person{number // 6}_{number}.jpg'
        path.write_bytes((tmp_path / 'y/a' / f'{number:03}.jpg').read_bytes())
    found = dataset.load_source(f'folder:{tmp_path / "x"}', image_size=8)
    assert "grouped by 'person0' and the like in their paths: 0 of 4 groups are on" in (
        capsys.readouterr().out
    )
    assert not set(found.train.groups) & set(found.test.groups)
    plain = dataset.load_source(f'folder:{tmp_path / "x"}', image_size=8, groups='none')
    assert plain.train.groups is None and len(plain.test) == 5
    assert 'groups are on' not in capsys.readouterr().out
    source = dataset.load_source(
        f'folder:{tmp_path / "x"}', image_size=8, groups='path:(person.)'
    )
    assert (len(source.train), len(source.test)) == (18, 6)
    with pytest.raises(UserError, match='data.groups=path:z: some paths have no group'):
        dataset.load_source(f'folder:{tmp_path / "x"}', groups='path:z')


def test_the_table_is_not_passed_over(tmp_path, capsys):
    """It lies among the images and is read; another table is not."""
    write_images(tmp_path, {'x': 12}, size=(8, 8))
    rows = [f'{i:03}.jpg,{("cat", "dog")[i % 2]}' for i in range(12)]
    table = tmp_path / 'labels.csv'
    table.write_text('\n'.join(['image,label', *rows]))
    dataset.load_source(f'folder:{tmp_path}', labels=str(table), image_size=8)
    assert 'skipped' not in capsys.readouterr().out
    (tmp_path / 'x' / 'labels.csv').write_text('')
    dataset.load_source(f'folder:{tmp_path}', labels=str(table), image_size=8)
    assert 'skipped 1 .csv' in capsys.readouterr().out


def test_classes_of_a_table(tmp_path, capsys):
    write_images(tmp_path, {'x': 12}, size=(8, 8))
    rows = [f'{i:03}.jpg,{("cat", "dog")[i % 2]},p{i // 2}' for i in range(10)]
    source = load(tmp_path, rows, 'image,label,patient')
    assert source.class_names == ('cat', 'dog') and not source.multi_label
    assert source.train.labels.dtype == np.int32
    tested = {source.test.name(i)[-7:-4] for i in range(len(source.test))}
    assert len(tested) == 2 and len({int(name) // 2 for name in tested}) == 1
    out = capsys.readouterr().out
    assert '2 classes (cat, dog) of 10 images' in out
    assert '2 images are not in the table' in out
    source = load(
        tmp_path,
        [f'{r},{"train" if i < 7 else "val"}' for i, r in enumerate(rows)],
        'image,label,patient,fold',
    )
    assert (len(source.train), len(source.test), source.has_test) == (7, 3, True)


def test_a_label_that_has_the_name_of_patients_is_pointed_out(tmp_path):
    rows = [f'{n}.png,p{n // 2},{n % 2},{n % 3 > 0:d}' for n in range(12)]
    table = '\n'.join(['image,patient,sick,animal_id', *rows])
    (note,) = (line for line in read(tmp_path, table).notes if 'animal_id' in line)
    assert 'animal_id is taken for one of patients by its name' in note
    found = read(tmp_path, table, columns=('sick', 'animal_id'))
    assert found.names == ('sick', 'animal_id')
    assert not any('by its name' in line for line in found.notes)
