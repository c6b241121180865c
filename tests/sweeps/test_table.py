"""What the table and the page of a sweep say."""

import csv
import os

import pytest

from flax_densenet.errors import UserError
from flax_densenet.sweeps import page as sweep_page
from flax_densenet.sweeps import record as sweep_record
from flax_densenet.sweeps import table as sweep_table
from helpers.pages import BOOK, make_book


def test_table():
    rows = sweep_table.make_rows(make_book(**BOOK))
    assert [row.setting.state for row in rows] == [
        *('done', 'done', 'training', 'pruned', 'failed')
    ]
    first, second = rows[:2]
    assert (first.mean, first.best, first.best_seed) == (pytest.approx(0.675), 0.7, '0')
    assert second.mean == pytest.approx(0.6)
    assert second.spread == pytest.approx(0.02**0.5)
    text = sweep_table.format_rows(make_book(**BOOK), rows).splitlines()
    assert text[0].split() == [
        *('trial', 'learning_rate', 'mean', 'spread', 'best', 'seeds', 'state')
    ]
    assert text[2].split('  ')[0] == '001' and '60.0%   14.1%  70.0%' in text[2]
    pruned = next(line for line in text if 'pruned at epoch 1' in line)
    assert pruned.split()[-7:-3] == ['-', '90.0%', '1', 'pruned']
    assert text[-1] == 'trial 004 failed: not <finite>'


def test_page(tmp_path):
    """It comes from sweep.json alone, and shows what that says as text."""
    make_book(**BOOK).save(str(tmp_path))
    kept = sweep_record.load(str(tmp_path))
    rows = sweep_page.save(str(tmp_path), kept)
    text = (tmp_path / sweep_page.FILE).read_text()
    body = text[text.index('<body>') : text.index('<script type')]
    assert '<b>' not in body.replace('<small>', '').partition('headline')[0]
    assert '&lt;/script&gt;&lt;b&gt;' in body and 'not &lt;finite&gt;' in body
    assert 'optimistic' in body and 'pruned at epoch 1' in body
    assert 'behind it by less than seeds' in body.lower()
    assert '&#39;--config=configs/cifar.py:&lt;b&gt;&#39;' in body
    with open(tmp_path / sweep_table.FILE, newline='') as file:
        table = list(csv.DictReader(file))
    assert [row['trial'] for row in table] == [
        os.path.basename(row.folder) for row in rows
    ]
    assert table[0]['mean'] == '0.675' and table[0]['spread'] == '0.0353553'
    assert table[-1]['why'] == 'not <finite>' and table[-1]['mean'] == ''


@pytest.mark.parametrize(
    'damage',
    [
        lambda text: text[:40],
        lambda text: '[]',
        lambda text: text.replace('"settings"', '"set"'),
        lambda text: text.replace('0.65', '"x"'),
        lambda text: text.replace('"done"', '"fine"'),
        lambda text: text.replace('"axes"', '"axe"'),
        lambda text: text.replace('"best_epoch": 1', '"best_epoch": 7'),
    ],
)
def test_a_damaged_record(tmp_path, damage):
    make_book(**BOOK).save(str(tmp_path))
    file = tmp_path / sweep_record.FILE
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match='sweep.json is not a record of a sweep'):
        sweep_record.load(str(tmp_path))
