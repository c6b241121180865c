"""Which columns are kept to divide the images; none that tells people apart."""

import numpy as np
import pytest

from flax_densenet import UserError, settings
from flax_densenet.data import dataset, labeled_images, notes, subgroup_columns
from helpers import packs
from helpers.runs import write_images

N = 40
COLUMNS = {
    'Patient Name': [f'p{n % 5}' for n in range(N)],
    'Study Date': [f'2020010{n % 3}' for n in range(N)],
    'StudyInstanceUID': [f'1.2.{n % 4}' for n in range(N)],
    'comment': ['fine', 'blurred'] * (N // 2),
    'note': [f'text {n}' for n in range(N)],
    'number of slices': [str(1000 + n) for n in range(N)],
    'exposure': [str(0.5 * n) for n in range(N)],
    'View Position': ['PA', 'AP', '', 'NA'] * (N // 4),
    'scanner': ['one'] * N,
    'sex': ['M', 'F'] * (N // 2),
    'Patient Age': [f'{20 + n:03}Y' for n in range(N)],
}


def test_found_columns():
    found, line = subgroup_columns.find(COLUMNS, 'auto')
    assert list(found) == ['Patient Age', 'sex', 'View Position', 'exposure']
    assert found['Patient Age'].tolist() == [20.0 + n for n in range(N)]
    assert found['View Position'][:4].tolist() == ['PA', 'AP', '', '']
    assert line == (
        'metrics are also shown by Patient Age, sex, View Position, exposure; '
        'data.subgroups names other columns, or none'
    )
    many = {f'site{n}': ['a', 'b'] * 20 for n in range(9)}
    assert list(subgroup_columns.find(many, 'auto')[0]) == list(many)[:6]
    assert subgroup_columns.find(COLUMNS, 'none') == ({}, '')
    assert subgroup_columns.find({}, 'auto') == ({}, '')


def test_named_columns():
    found, line = subgroup_columns.find(COLUMNS, 'scanner, comment')
    assert list(found) == ['scanner', 'comment'] and line == ''
    for setting, message in (
        ('weight', 'there is no column weight .* there are Patient Name, Study'),
        ('sex,Patient Name', 'Patient Name identifies people'),
        (' ', 'data.subgroups is empty'),
        ('path:(', 'data.subgroups=path:'),
        ('path:x', 'has no named group'),
    ):
        with pytest.raises(UserError, match=message):
            subgroup_columns.find(COLUMNS, setting)
    many = {'note': [f'text {n}' for n in range(60)]}
    with pytest.raises(UserError, match='note has 60 different values'):
        subgroup_columns.find(many, 'note')


def test_parts_of_paths(tmp_path):
    photos = tmp_path / 'photos'
    write_images(photos, {'ants': 8, 'bees': 8}, size=(12, 12))
    for number, path in enumerate(sorted(photos.rglob('*.jpg'))):
        path.rename(path.with_name(f'{"oslo" if number % 2 else "rome"}_{number}.jpg'))
    fields = {'image_size': 8, 'subgroups': r'path:(?P<site>[a-z]+)_\d'}
    source = dataset.load_source(f'folder:{photos}', **fields)
    for part in (source.train, source.test):
        sites = part.subgroups['site (path)']
        assert len(sites) == len(part) and set(sites) == {'oslo', 'rome'}
        assert all(f'/{site}_' in part.name(n) for n, site in enumerate(sites))
    assert subgroup_columns.is_of_paths('site (path)')
    for setting, message in (
        ('path:(?P<x>nowhere)', 'matches no path; the first path is ants/'),
        ('age', 'data.subgroups=age needs a table'),
    ):
        with pytest.raises(UserError, match=message):
            dataset.load_source(f'folder:{photos}', **(fields | {'subgroups': setting}))


def test_columns_of_a_table(tmp_path, monkeypatch):
    """Rows in another order than the files, and one for which there is no image."""
    photos = write_images(tmp_path / 'photos', {'x': 20}, size=(12, 12))
    rows = [
        f'{n:03}.jpg,{n % 2},{"M" if n % 3 else "F"},{20 + n},P{n // 2}'
        for n in reversed(range(21))
    ]
    table = tmp_path / 'labels.csv'
    table.write_text('\n'.join(['image,ill,sex,age,patient', *rows]))
    lines = []
    monkeypatch.setattr(notes, 'say', lines.append)
    data = {'source': f'folder:{photos}', 'labels': str(table), 'bad_images': 'skip'}
    data |= {'image_size': 8, 'resize': 'stretch', 'crop_fraction': 1.0}
    data |= {'interpolation': 'bilinear', 'channels': 3}
    made = settings.from_config({'data': data})
    source = dataset.from_settings(made.data, made.preparation)
    assert any('metrics are also shown by age, sex;' in line for line in lines)
    assert not any('not used' in line for line in lines)
    for part in (source.train, source.test):
        for n in range(len(part)):
            number = int(part.name(n)[-7:-4])
            assert part.subgroups['age'][n] == 20 + number
            assert part.subgroups['sex'][n] == ('M' if number % 3 else 'F')
        joined = labeled_images.join(part)
        np.testing.assert_array_equal(joined.subgroups['sex'], part.subgroups['sex'])
        assert list(labeled_images.Relabeled(part, [1], 2).subgroups) == ['age', 'sex']


def test_packs_keep_them(tmp_path):
    photos = write_images(tmp_path / 'photos', {'x': 20}, size=(12, 12))
    rows = [
        f'{n:03}.jpg,{n % 2},{"MF"[n % 3 > 0]},{20 + n},{n // 2}' for n in range(20)
    ]
    table = tmp_path / 'labels.csv'
    table.write_text('\n'.join(['image,ill,sex,age,patient', *rows]))
    fields = {'labels': str(table)}
    one = packs.load(f'folder:{photos}', **fields)
    packs.make(photos, tmp_path / 'packed', **fields)
    other = packs.load(f'packed:{tmp_path}/packed')
    for name, part in one.parts.items():
        packed = other.parts[name]
        assert list(packed.subgroups) == list(part.subgroups) == ['age', 'sex']
        for column, values in part.subgroups.items():
            np.testing.assert_array_equal(packed.subgroups[column], values)
    found = packs.load(f'packed:{tmp_path}/packed', subgroups='sex')
    assert list(found.test.subgroups) == ['sex']
    for setting, names in ('none', []), (r'path:(?P<tens>\d\d)\d', ['tens (path)']):
        found = packs.load(f'packed:{tmp_path}/packed', subgroups=setting)
        assert list(found.test.subgroups) == names
    with pytest.raises(UserError, match='no column site .* there are'):
        packs.load(f'packed:{tmp_path}/packed', subgroups='site')
