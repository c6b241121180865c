"""Epochs on a terminal: aligned rows of 80 columns; elsewhere the line of always."""

import re

import pytest

from flax_densenet.system import terminal
from flax_densenet.train import epoch_lines

FIELDS = {
    'train_accuracy': 0.543,
    'train_loss': 0.681,
    'test_loss': 0.656,
    'learning_rate': 7.8e-4,
}
ACCURACIES = (0.588, 0.725, 0.693)
RECORDS = [
    {'epoch': n, 'test_accuracy': accuracy} | FIELDS
    for n, accuracy in enumerate(ACCURACIES, 1)
]


@pytest.fixture
def on_terminal(monkeypatch):
    monkeypatch.setattr(terminal, 'is_interactive', lambda: True)
    monkeypatch.delenv('NO_COLOR', raising=False)
    monkeypatch.setenv('TERM', 'xterm')


def lines(records=RECORDS, epochs=100):
    made = epoch_lines.EpochLines(epochs, 0)
    text = [made.line(records[: n + 1]) for n in range(len(records))]
    return '\n'.join(text).splitlines()


def test_rows_on_a_terminal(on_terminal, monkeypatch):
    monkeypatch.setenv('NO_COLOR', '1')
    head, *rows = lines()
    names = 'epoch train acc loss test acc loss rate time left'
    assert ' '.join(head.split()) == names
    assert [row[0] for row in rows] == ['*', '*', ' ']  # the best so far
    assert rows[1].split()[:4] == ['*', '2/100', '54.3%', '0.681']
    assert len({len(row) for row in rows}) == 1 and rows[0].endswith(' s')
    areas = [record | {'test_mean_auroc': 0.9} for record in RECORDS]
    diverged = [record | {'test_loss': 6e11} for record in areas]
    for records in (RECORDS, areas, diverged):
        assert max(map(len, lines(records, epochs=1000))) <= 80
    assert lines(epochs=3)[-1] == lines(epochs=3)[-1].rstrip() + ' ' * 12


def test_colors_only_on_a_terminal(on_terminal, monkeypatch):
    assert re.match('\x1b\\[1m  +epoch', lines()[0])
    assert lines()[1].startswith('\x1b[32m* ')
    for name, value in (('NO_COLOR', '1'), ('TERM', 'dumb')):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert '\x1b' not in ''.join(lines())


def test_the_line_of_files():
    assert (
        lines()[1]
        == epoch_lines.format_epoch(RECORDS[1])
        == (
            'Epoch:  2. Train_acc: 54.3%, Train_loss: 0.681, Test_acc: 72.5%, '
            'Test_loss: 0.656, Lr: 7.80E-04'
        )
    )
