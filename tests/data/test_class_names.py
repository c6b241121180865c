"""Names of classes that look like numbers, and lists with missing or odd parts."""

import pytest

from flax_densenet import UserError
from flax_densenet.data import label_options, label_table


def read(tmp_path, heading, cells, **options):
    rows = [f'{i}.png,"{cell}"' for i, cell in enumerate(cells)]
    path = tmp_path / 't.csv'
    path.write_text('\n'.join([f'image,{heading}', *rows]))
    return label_table.read(str(path), label_options.Options(**options))


@pytest.mark.parametrize(
    ('cells', 'names'),
    [
        (['1', '2.0', '10', '1.0'], ('1', '2', '10')),
        (['0,0', '1,0', '2,0'], ('0', '1', '2')),
        (['001', '002', '010'], ('001', '002', '010')),
        (['09', '10', '11'], ('09', '10', '11')),
        (['1_0', '2_0', '30'], ('1_0', '2_0', '30')),
        (['1E2', '100', '1e3'], ('100', '1E2', '1e3')),
        (['1,000', '2,000', '1'], ('1', '1,000', '2,000')),
        (['9' * 5000, '1', '10'], ('1', '10', '9' * 5000)),
        (['1.0', '1', 'cat'], ('1', 'cat')),
        (['1.0', '2.0', 'cat'], ('1.0', '2.0', 'cat')),
    ],
)
def test_numbers_are_names_as_written(cells, names, tmp_path):
    found = read(tmp_path, 'label', cells * 2)
    assert found.names == names
    assert [names[v] for v in found.values][: len(cells)] == [
        name if name in names else name.rstrip('0').rstrip('.,') for name in cells
    ]


@pytest.mark.parametrize('cells', [['001', '002', '1'], ['01', 'cat', '1.0']])
def test_two_spellings_of_a_number_are_refused(cells, tmp_path):
    with pytest.raises(UserError, match="'01?0?1' .* are the same number; write them"):
        read(tmp_path, 'label', cells * 2)


def test_numbers_with_decimals_are_no_classes(tmp_path):
    with pytest.raises(UserError, match='holds numbers such as 1.5, which are not'):
        read(tmp_path, 'label', ['1.5', '2', '3'] * 2)


@pytest.mark.parametrize('missing', ['NA', 'nan', 'none', 'None', 'N/A', ''])
@pytest.mark.parametrize('heading', ['Finding Labels', 'labels'])
def test_missing_words_in_lists(heading, missing, tmp_path):
    cells = ['Mass', 'Mass|Effusion', missing, 'Effusion', missing]
    found = read(tmp_path, heading, cells)
    assert found.names == ('Effusion', 'Mass')
    assert found.values[2].tolist() == [0, 0]
    named = f' ({missing})' if missing else ''
    line = f'2 blank cells of {heading}{named} are read as no label'
    assert line in found.notes


def test_missing_words_inside_lists(tmp_path):
    found = read(tmp_path, 'Finding Labels', ['Mass', 'Mass|nan', 'Effusion'])
    assert found.names == ('Effusion', 'Mass')
    assert any('1 missing values inside the lists of' in n for n in found.notes)


@pytest.mark.parametrize(
    ('separator', 'name'), [(';', 'semicolons'), ('; ', 'semicolons'), (', ', 'commas')]
)
@pytest.mark.parametrize('most', [2, 4])
def test_findings_with_other_separators(separator, name, most, tmp_path):
    cells = [f'Mass{separator}Effusion', 'No Finding', 'Mass', 'Effusion'][:most]
    found = read(tmp_path, 'Finding Labels', cells)
    assert found.names == ('Effusion', 'Mass')
    assert any(f'lists of labels separated by {name};' in n for n in found.notes)


def test_bars_come_before_other_separators(tmp_path):
    found = read(tmp_path, 'Finding Labels', ['Mass, left|Cyst', 'Cyst', 'Mass, left'])
    assert found.names == ('Cyst', 'Mass, left')
