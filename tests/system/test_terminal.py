"""Lines on a terminal have its width; in files they are not broken."""

import io
import os

from flax_densenet.system import logs, terminal


class Screen(io.StringIO):
    def isatty(self):
        return True


LINE = (
    'data.source=folder:photos: 245 images in train to train on, 153 in val, which '
    'chooses the best epoch'
)


def test_long_lines_are_broken_between_words(monkeypatch):
    monkeypatch.setattr(
        terminal.shutil, 'get_terminal_size', lambda: os.terminal_size((80, 24))
    )
    screen, file = Screen(), io.StringIO()
    terminal.say(LINE, screen)
    terminal.say(LINE, file)
    rows = screen.getvalue().splitlines()
    assert len(rows) == 2 and all(len(row) <= 80 for row in rows)
    assert rows[1].startswith('  ') and ' '.join(map(str.strip, rows)) == LINE
    assert file.getvalue() == LINE + '\n'


def test_tables_colors_and_long_words_stay():
    kept = (
        'class     precision  recall  and more than fits',
        '\x1b[32m* epoch 1 of 2 and more than fits in 20\x1b[0m',
        'short',
        'train it: python launch.py train photos --workdir=run',
        'train it: flax-densenet train photos --workdir=run',
        '/a/path/without/any/place/to/break/it',
        '',
    )
    for line in kept:
        assert terminal.wrap(line, 20) == line
    both = terminal.wrap('one\n  a path is /a/path/that/is/much/too/long here', 12)
    assert both.split('\n') == [
        'one',
        '  a path is',
        '    /a/path/that/is/much/too/long',
        '    here',
    ]


def test_wide_letters_take_two_columns():
    rows = terminal.wrap('蜜蜂 蜜蜂 蜜蜂 蜜蜂', 12).split('\n')
    assert rows == ['蜜蜂 蜜蜂', '  蜜蜂 蜜蜂']


def test_messages_are_wrapped(monkeypatch):
    monkeypatch.setattr(
        terminal.shutil, 'get_terminal_size', lambda: os.terminal_size((60, 24))
    )
    screen = Screen()
    monkeypatch.setattr('sys.stdout', screen)
    printer = logs._Printer()
    printer.emit(logs.logging.makeLogRecord({'msg': LINE, 'levelno': 20}))
    assert max(map(len, screen.getvalue().splitlines())) <= 60
