"""Cells and lines of tables that are written in unusual ways."""

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.data import dataset, label_options, label_table
from helpers.runs import write_images

PLAIN = 'image,a,b\nx.png,1,0\ny.png,0,1\nz.png,1,1\n'


def read(tmp_path, text, **options):
    path = tmp_path / 't.csv'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return label_table.read(str(path), label_options.Options(**options))


@pytest.mark.parametrize(
    ('text', 'note'),
    [
        (PLAIN.encode('utf-16-le'), ''),
        (PLAIN.encode('utf-16-be'), ''),
        (PLAIN.encode('utf-32'), ''),
        ('sep=;\n' + PLAIN.replace(',', ';'), ''),
        ('"sep=,"\r\n' + PLAIN.replace('\n', '\r\n'), ''),
        ('# by me\n# in May\n' + PLAIN, '2 lines at its beginning'),
        (PLAIN.replace('image', '#image'), ''),
        (PLAIN.replace('0\n', '0,\n').replace('1\n', '1,\n'), ''),
        (
            'image a b\n"1" "x.png" 1 0\n"2" "y.png" 0 1\n"3" "z.png" 1 1\n',
            'as R writes tables',
        ),
    ],
)
def test_lines_of_a_table(text, note, tmp_path):
    found = read(tmp_path, text)
    assert found.images == ['x.png', 'y.png', 'z.png']
    assert found.names == ('a', 'b')
    assert found.values.tolist() == [[1, 0], [0, 1], [1, 1]]
    assert note in ' '.join(found.notes)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"image": "x.png", "label": 1}\n', 'is JSON, not a table'),
        ('[{"image": "x.png"}]', 'is JSON, not a table'),
        ('<html>\n<body>\n', 'is HTML or XML, not a table'),
        (b'PK\x03\x04', 'is an Excel file'),
        ('image,a\nx.png,1,1\ny.png,1,0\n', 'line 2 has 3 cells, the heading 2'),
        ('image,größe\nx.png,1\n'.encode('latin-1'), 'is not text in UTF-8'),
        ('image,a\nx.png,1\nx.png,0\n', r'x.png is there more than once \(lines 2 and'),
    ],
)
def test_files_that_are_no_table(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def cells(*columns, names='a,b'):
    rows = zip(*columns, strict=True)
    lines = [f'{i}.png,{",".join(row)}' for i, row in enumerate(rows)]
    return '\n'.join([f'image,{names}', *lines])


def test_crosses(tmp_path):
    text = cells(['x', '', 'X', ''], ['', 'x', '', ''])
    with pytest.raises(UserError, match='no image is negative.*blank_labels=negative'):
        read(tmp_path, text)
    found = read(tmp_path, text, blank='negative')
    assert found.values.tolist() == [[1, 0], [0, 1], [1, 0], [0, 0]]
    found = read(tmp_path, cells(['+', '-', '+', '-'], ['0', '1', '1', '']))
    assert found.values[:, 0].tolist() == [1, 0, 1, 0]


def test_tables_without_a_negative(tmp_path):
    """Of -1 and 1 alone, as CelebA has it, and of 1 and blanks."""
    for other, field in (('-1', 'uncertain'), ('', 'blank')):
        text = cells(['1', other, '1', other], ['1', other, other, other])
        message = f'set data.{field}_labels=negative'
        with pytest.raises(UserError, match=message):
            read(tmp_path, text)
        found = read(tmp_path, text, **{field: 'negative'})
        assert found.values[:, 0].tolist() == [1, 0, 1, 0]
        # A model that is measured on such images needs no negative ones.
        found = read(tmp_path, text, for_training=False)
        assert np.isnan(found.values[1, 0])


def test_labels_that_cannot_be_learned_are_named(tmp_path):
    found = read(tmp_path, cells(['1', '0', '1'], ['0', '0', '0']))
    assert any(note.endswith('cannot be learned: b') for note in found.notes)
    found = read(tmp_path, cells(['1', '0', '1'], ['0', '1', '0']))
    assert not any('cannot be learned' in note for note in found.notes)


def test_a_column_that_is_not_used_says_why(tmp_path):
    text = cells(['yes', 'no', 'maybe'] * 2, list('101011'))
    found = read(tmp_path, text)
    assert found.ignored == ('a',)
    assert any("as 'maybe' in line 4" in note for note in found.notes)
    with pytest.raises(UserError, match="line 4, column a: 'maybe' is neither"):
        read(tmp_path, text, columns=('a', 'b'))
    found = read(tmp_path, cells(list('0120120'), names='label'))
    assert found.names == ('0', '1', '2')
    assert not any('is not used' in note for note in found.notes)


def test_words_for_nothing_as_classes(tmp_path):
    text = cells(['none', 'mild', 'severe', 'none', 'mild'], names='severity')
    with pytest.raises(UserError, match="data.label_kind=classes takes 'none' as a cl"):
        read(tmp_path, text)
    found = read(tmp_path, text, kind='classes')
    assert found.names == ('mild', 'none', 'severe')
    text = cells(['none', '', 'severe', 'none'], names='severity')
    with pytest.raises(UserError, match="line 3, column severity: '' is not a class"):
        read(tmp_path, text, kind='classes')


def test_letters_are_classes(tmp_path):
    found = read(tmp_path, cells(['a', 'A', 'b', 'a'], names='label'))
    assert found.names == ('A', 'a', 'b')
    assert any("'A' and 'a' are two classes" in note for note in found.notes)


@pytest.mark.parametrize(
    ('name', 'found', 'separator'),
    [
        ('labels', ['a;b', 'a', 'b', 'b; a'], 'semicolons'),
        ('labels', ['"a, b"', 'a', 'b', '"b,a"'], 'commas'),
        ('tags', ['a b', 'a', 'b', 'b a'], 'spaces'),
        ('Labels', ["\"['a', 'b']\"", "['a']", "['b']", "\"['a', 'b']\""], 'commas'),
        ('findings', ['a|b', 'a', 'b', 'a | b'], ''),
    ],
)
def test_lists(name, found, separator, tmp_path):
    table = read(tmp_path, cells(found, names=name))
    assert table.names == ('a', 'b')
    assert table.values.tolist() == [[1, 1], [1, 0], [0, 1], [1, 1]]
    assert not separator or any(
        f'lists of labels separated by {separator}; data.label_kind=classes' in note
        for note in table.notes
    )
    if separator:
        classes = read(tmp_path, cells(found, names=name), kind='classes')
        assert classes.values.ndim == 1


@pytest.mark.parametrize('name', ['label', 'class', 'species'])
def test_names_of_classes_with_spaces_are_no_lists(name, tmp_path):
    found = read(tmp_path, cells(['great dane', 'dane', 'great dane'], names=name))
    assert found.names == ('dane', 'great dane')


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path, {'x': 6}, size=(8, 8))


def load(tmp_path, names):
    rows = [f'{name},{i % 2}' for i, name in enumerate(names)]
    (tmp_path / 't.csv').write_text('\n'.join(['id,sick', *rows]))
    return dataset.load_source(
        f'folder:{tmp_path}/x', labels=f'{tmp_path}/t.csv', image_size=8
    )


@pytest.mark.parametrize(
    'names',
    [
        [f'{i}.0' for i in range(6)],
        ['000', '001.jpg', '002', '003.png', '004.JPG', '005.jpg'],
        [f'C:\\me\\x\\{i:03}.jpg' for i in range(6)],
    ],
)
def test_names_of_images(names, photos, tmp_path, capsys):
    source = load(tmp_path, names)
    assert len(source.train) + len(source.test) == 6
    assert 'differ from the files' in capsys.readouterr().out


def test_two_rows_of_one_file(photos, tmp_path):
    names = [f'{i:03}.jpg' for i in range(6)]
    with pytest.raises(UserError, match='000.jpg and ./000.jpg are the same file'):
        load(tmp_path, [*names, './000.jpg'])
    # A name that is not there is not taken for an image that has its own row.
    with pytest.raises(UserError, match='1 of its 7 images are not in'):
        load(tmp_path, [*names, '000.png'])
